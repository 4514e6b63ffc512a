"""The processes of a run: how they start, exchange small values and notice each other's end."""
