"""Skill-SD: the method, the bank of skills, and how they are made, kept, found and tried."""

from opd.trainers.skill_sd.method import SkillSd
