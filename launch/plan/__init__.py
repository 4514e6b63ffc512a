"""What a run will do, need and send, and what a store holds, found without loading a model."""
