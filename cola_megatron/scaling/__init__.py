"""Compute accounting."""
