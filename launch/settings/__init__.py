"""What a file and a command line say: reading them, and one typed, strict tree of settings."""
