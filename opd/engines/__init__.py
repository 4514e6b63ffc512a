"""Rollout engines: what turns a prompt into sampled ids. `base` says what one must do."""
