"""Weights on disk: checkpoints of ours and files in the layouts of other programs, one tensor at a time."""
