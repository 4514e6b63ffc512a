"""Teachers: models that score the student's tokens, what they are shown, and stores of their scores."""
