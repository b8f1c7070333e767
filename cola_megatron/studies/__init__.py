"""Scaling studies: from a file to runs, from their folders to a table."""
