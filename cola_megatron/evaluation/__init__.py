"""Benchmarks: the eight published tasks, their prompts and matching rules, and one harness for any model family."""
