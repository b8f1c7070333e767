"""Reading of prepared token shards, and the order in which training visits them."""

from cola_megatron.data.manifest import Manifest, ShardError, read_manifest
from cola_megatron.data.order import GlobalOrder
from cola_megatron.data.shards import TokenShards

__all__ = ["GlobalOrder", "Manifest", "ShardError", "TokenShards", "read_manifest"]
