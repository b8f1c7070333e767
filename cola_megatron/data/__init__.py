"""Reading of prepared token shards, and the order in which training visits them."""

from cola_megatron.data.folder import PreparedFolder
from cola_megatron.data.manifest import BadShardError, Manifest, ShardError, read_manifest
from cola_megatron.data.order import GlobalOrder
from cola_megatron.data.samples import SampleSequence, held_out_samples, training_samples
from cola_megatron.data.shards import TokenShards
from cola_megatron.data.tokenizers import read_tokenizer, require_same_tokenizer, tokenizer_file, tokenizer_fingerprint

__all__ = [
    "BadShardError",
    "GlobalOrder",
    "Manifest",
    "PreparedFolder",
    "SampleSequence",
    "ShardError",
    "TokenShards",
    "held_out_samples",
    "read_manifest",
    "read_tokenizer",
    "require_same_tokenizer",
    "tokenizer_file",
    "tokenizer_fingerprint",
    "training_samples",
]
