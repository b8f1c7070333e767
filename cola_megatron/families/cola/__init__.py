"""Cola DLM: a Text VAE, and over its latents a block-causal diffusion prior."""
