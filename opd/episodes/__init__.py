"""How episodes are played: the scheduler, environments' hosts and processes, faults."""
