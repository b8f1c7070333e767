"""The shards of a run, checked against its config."""

import logging
from pathlib import Path

import torch.distributed as dist

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.data import TokenShards
from cola_megatron.data.manifest import Manifest, Verify
from cola_megatron.data.mixture import passes_and_shares
from cola_megatron.parallel import ProcessGroups

logger = logging.getLogger(__name__)

# Text seen more often teaches little that is new ("Scaling Data-Constrained Language Models", arXiv 2305.16264).
MANY_PASSES = 4


def open_shards(
    config: RunConfig, folder: str | Path | None, splits: list[str], groups: ProcessGroups
) -> list[TokenShards]:
    """The given splits of a prepared folder; only the main process reads the files through to check their hashes.

    Raises:
        ConfigError: no folder, or sequence length or vocabulary are not the model's. ShardError: damaged files.
    """
    if folder is None:
        raise ConfigError("data.path is not set: give the folder that `cola prep run` wrote, data.path=FOLDER")
    data, skip = config.data, config.data.bad_shards == "skip"

    def opened(verify: Verify) -> list[TokenShards]:
        return [TokenShards(folder, split, verify, skip, data.cache_folder, data.cache_bytes) for split in splits]

    if groups.is_main:
        shards = opened(data.verify)
    groups.barrier()
    if not groups.is_main:
        shards = opened("size")
    for key, wanted, found in (
        ("data.sequence_length", data.sequence_length, shards[0].sequence_length),
        ("model.vocab_size", config.model.vocab_size, shards[0].vocab_size),
    ):
        if wanted != found:
            raise ConfigError(f"{key}={wanted}, but the shards in {folder} have {found}; set {key}={found}")
    if skip:
        for split in shards:
            _agree_on_bad_shards(split, groups)
    if groups.is_main:
        _warn_of_a_small_cache(config, shards[0])
        if "train" in splits:
            _say_the_mixture(shards[0].manifest)
    return shards


def _say_the_mixture(manifest: Manifest) -> None:
    """What every source gives, and by name those that give nothing."""
    seen = passes_and_shares(manifest)
    for name, record in manifest.mixture.items():
        if name not in seen:
            logger.warning("source %s gives no training sample: none of its documents was kept", name)
            continue
        passes, share = seen[name]
        weight = "" if record.weight is None else f" (weight {record.weight:g})"
        level = logging.WARNING if passes > MANY_PASSES else logging.INFO
        logger.log(
            level, "source %s%s: %.1f%% of the samples, each %.3g times an epoch", name, weight, 100 * share, passes
        )


def _agree_on_bad_shards(shards: TokenShards, groups: ProcessGroups) -> None:
    """What one rank found at opening, no rank reads: all of them must replace the same samples."""
    of_ranks: list[dict[str, str]] = [{}] * groups.world_size
    dist.all_gather_object(of_ranks, shards.bad)
    for bad in of_ranks:
        shards.exclude(bad)
    if groups.is_main:
        for problem in shards.bad.values():
            logger.warning("%s; samples of it will be replaced by others (data.bad_shards=skip)", problem)


def _warn_of_a_small_cache(config: RunConfig, shards: TokenShards) -> None:
    """Shards that go through a cache smaller than they are want an order that keeps to a few of them."""
    data, folder = config.data, shards.folder
    if not folder.uses_cache or shards.raw_bytes <= data.cache_bytes:
        return
    if data.shuffle_block_shards is None:
        logger.warning(
            "data.cache_bytes=%d holds a part of the %d bytes of %s, so that most samples fetch a shard anew; set "
            "data.shuffle_block_shards, or raise data.cache_bytes",
            data.cache_bytes,
            shards.raw_bytes,
            folder,
        )
        return
    needed = sum(2 * data.shuffle_block_shards * stream.largest_shard_bytes for stream in shards.streams)
    if needed > data.cache_bytes:
        logger.warning(
            "data.cache_bytes=%d is less than the %d bytes of two blocks of shards of every source; raise it, or lower "
            "data.shuffle_block_shards",
            data.cache_bytes,
            needed,
        )
