"""Who scores the student's tokens, what it is shown, and what is stored of it."""
