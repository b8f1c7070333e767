"""The one layer library: tensor-parallel, blind to the layout beyond its process groups.

Shape suffixes: S sequence on this rank, B batch, H hidden, A heads on this rank, G heads of keys and values, D head
channels, L full length, K keys, T distinct times, C latent channels, V vocabulary on this rank, P tokens per latent.
"""
