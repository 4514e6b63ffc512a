"""Rollout engines turn prompts into sampled ids. `base` is their interface."""
