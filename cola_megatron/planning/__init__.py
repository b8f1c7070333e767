"""Compute accounting: what a run costs, and where it fits."""
