"""From samples with weights to the loss of a micro-batch."""
