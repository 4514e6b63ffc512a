"""The training loop and what every method is made of. It knows no method by name."""
