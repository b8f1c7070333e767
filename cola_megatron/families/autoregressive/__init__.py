"""Autoregressive language model: the LLaMA-shaped baseline, one token after another."""
