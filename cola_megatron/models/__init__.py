"""The models: each a list of layers that training runs in order and that a pipeline can cut."""

from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE

__all__ = ["DiT", "TextVAE"]
