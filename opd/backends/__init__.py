"""Backends train: one process of plain torch (`local`), or many with DeepSpeed (`zero`)."""
