"""Reading of prepared token shards, and the order in which training visits them."""

from cola_megatron.data.order import GlobalOrder
from cola_megatron.data.shards import Manifest, ShardError, TokenShards, read_manifest

__all__ = ["GlobalOrder", "Manifest", "ShardError", "TokenShards", "read_manifest"]
