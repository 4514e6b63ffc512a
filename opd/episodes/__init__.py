"""Plays episodes: the scheduler, environments' hosts and processes, faults."""
