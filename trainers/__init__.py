"""The training loop, and one file a method. A method annotates; the loop trains and knows none by name."""
