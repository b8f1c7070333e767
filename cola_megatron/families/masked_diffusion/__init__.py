"""Masked diffusion of tokens: LLaDA (arXiv 2502.09992), and by blocks BD3-LM (arXiv 2503.09573)."""
