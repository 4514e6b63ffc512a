"""Skill-SD: the method, the bank of skills, who makes them, and how they are kept, found and tried."""

from opd.trainers.skill_sd.method import SkillSd
