"""Plaid: diffusion over learned embeddings of the tokens (Gulrajani and Hashimoto, arXiv 2305.18619)."""
