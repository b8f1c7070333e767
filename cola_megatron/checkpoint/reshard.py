"""A checkpoint in other files: one even part for each process of the job that will read it."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.sharded_tensors import Box, Piece, StoredTensors, Written, write_index, write_pieces
from cola_megatron.checkpoint.state_file import STATE, TENSORS, open_tensors, read_state, write_state
from cola_megatron.config import stored_config, stored_tree
from cola_megatron.errors import UserError

SMALL = 2**18
"""A tensor of fewer elements stays whole."""


def reshard(checkpoint: Path, output: Path, ranks: int, progress: bool = True) -> Path:
    """Writes the tensors of a checkpoint, or of a run's newest one, into `ranks` even parts, and compares them.

    Large tensors are cut along their first dimension, as tensor parallelism cuts most of them and ZeRO 3 all of them;
    the others are dealt out. Needs memory for one tensor's part and one file.

    Raises:
        UserError: `output` exists. CheckpointError: files are missing or damaged, or differ when read again.
    """
    if output.exists():
        raise UserError(f"{output} exists; give a new folder")
    checkpoint = require_checkpoint(checkpoint)
    source = open_tensors(checkpoint)
    plan = _deal_out(source.shapes, ranks)
    unfinished = output.with_name(f".resharding_{output.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, ignore=shutil.ignore_patterns(TENSORS, STATE))
    (unfinished / TENSORS).mkdir()
    with tqdm(total=2 * sum(map(len, plan)), disable=not progress, unit="piece", desc="write, compare") as bar:

        def pieces(part: list[tuple[str, Box]]) -> Iterator[Piece]:
            for name, box in part:
                yield Piece(name, source.shapes[name], box[0], source.read(name, box))
                bar.update()

        written: list[Written] = []
        for rank, part in enumerate(plan):
            written += write_pieces(unfinished / TENSORS, f"rank_{rank:05d}", pieces(part))
        write_index(unfinished / TENSORS, written)
        copy = StoredTensors(unfinished / TENSORS)
        for name, box in (each for part in plan for each in part):
            first, second = (stored.read(name, box).view(torch.int32) for stored in (source, copy))
            if not torch.equal(first, second):
                raise CheckpointError(f"{unfinished}: {name} is not what {checkpoint} holds; check the disk, try again")
            bar.update()
    write_state(unfinished, _moved(read_state(checkpoint), checkpoint, output))
    unfinished.rename(output)
    return output


def _moved(state: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """An imported checkpoint names itself as the place of its tokenizer."""
    config = stored_config(state["config"], old)
    if config.data.path != str(old.absolute()):
        return state
    data = config.data.model_copy(update={"path": str(new.absolute())})
    return {**state, "config": stored_tree(config.model_copy(update={"data": data}))}


def _deal_out(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[list[tuple[str, Box]]]:
    """Which rectangles go into the files of each rank."""
    parts: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
    sizes = [0] * ranks
    for name, shape in sorted(shapes.items(), key=lambda each: -math.prod(each[1])):
        if math.prod(shape) < SMALL or shape[0] < ranks:
            least = sizes.index(min(sizes))
            parts[least].append((name, ((0,) * len(shape), shape)))
            sizes[least] += math.prod(shape)
            continue
        for rank, part in enumerate(parts):
            start, stop = (shape[0] * end // ranks for end in (rank, rank + 1))
            part.append((name, ((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))))
            sizes[rank] += (stop - start) * math.prod(shape[1:])
    return parts
