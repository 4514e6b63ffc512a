"""Where gradients live: one process of plain torch (`local`)."""
