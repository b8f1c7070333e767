"""Checkpoints: found, written beside the training, verified, read by any layout, and written anew."""
