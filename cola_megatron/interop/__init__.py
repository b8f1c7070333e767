"""Names and reshapes between our state dict and published layouts; nothing here computes."""

from cola_megatron.interop.errors import PublishedError
from cola_megatron.interop.published import HeldWeights, PublishedModel, read_published, write_published

__all__ = ["HeldWeights", "PublishedError", "PublishedModel", "read_published", "write_published"]
