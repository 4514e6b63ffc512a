"""What a run will do, need and send, and what a store holds: said without doing it."""
