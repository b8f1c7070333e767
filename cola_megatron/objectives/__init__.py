"""The losses: one equation, one function. And the random draws that they consume."""
