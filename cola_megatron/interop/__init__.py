"""Names and reshapes between our state dict and published layouts; nothing here computes."""

from cola_megatron.interop.published import PublishedError, read_published, write_published

__all__ = ["PublishedError", "read_published", "write_published"]
