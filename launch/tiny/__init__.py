"""The small models that this machine builds for itself: `tiny:<env>`."""
