"""The page about a run: its pictures, samples and numbers."""
