"""A run: its parts, its folder, its stages, its checkpoints."""
