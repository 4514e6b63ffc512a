"""Holds the environments that come with the package."""
