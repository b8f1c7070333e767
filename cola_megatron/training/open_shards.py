"""The shards of a run, checked against its config."""

from pathlib import Path

from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.data import TokenShards
from cola_megatron.parallel import ProcessGroups


def open_shards(config: RunConfig, folder: Path | None, splits: list[str], groups: ProcessGroups) -> list[TokenShards]:
    """The given splits of a prepared folder; only the main process reads the files through to check their hashes.

    Raises:
        ConfigError: no folder, or sequence length or vocabulary are not the model's. ShardError: damaged files.
    """
    if folder is None:
        raise ConfigError("data.path is not set: give the folder that `cola prep run` wrote, data.path=FOLDER")
    if groups.is_main:
        shards = [TokenShards(folder, split, verify=config.data.verify) for split in splits]
    groups.barrier()
    if not groups.is_main:
        shards = [TokenShards(folder, split, verify="size") for split in splits]
    for key, wanted, found in (
        ("data.sequence_length", config.data.sequence_length, shards[0].sequence_length),
        ("model.vocab_size", config.model.vocab_size, shards[0].vocab_size),
    ):
        if wanted != found:
            raise ConfigError(f"{key}={wanted}, but the shards in {folder} have {found}; set {key}={found}")
    return shards
