"""What a run keeps of steps that went wrong, and of the batches that it leaves out because of them.

bad_steps/step_00000123/    step.json: why, metrics, positions of the samples; tokens.safetensors: the global batch
roll_backs.json             to which step the run returned, and how many batches it leaves out from there on

The data of a step are a pure function of its number and of roll_backs.json: step t reads the batch t + (the sum of what
roll backs to steps up to t left out). So a run that is killed and resumed, in any layout, reads the same.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cola_megatron.config import RunConfig
from cola_megatron.errors import UserError
from cola_megatron.records.json_files import write_json
from cola_megatron.training.batches import Samples
from cola_megatron.training.divergence import BadStep

BAD_STEPS, ROLL_BACKS = "bad_steps", "roll_backs.json"


@dataclass(frozen=True)
class RollBack:
    """One return to a checkpoint."""

    at: int
    """The bad step, counted from 1."""
    to: int
    """Steps that were done at the checkpoint."""
    left_out: int
    """Batches."""


def read_roll_backs(run_folder: Path) -> list[RollBack]:
    """All of a run, oldest first.

    Raises:
        UserError: they cannot be read. A run does not guess what it reads.
    """
    path = run_folder / ROLL_BACKS
    try:
        return [RollBack(**each) for each in json.loads(path.read_bytes())] if path.is_file() else []
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), and says which batches this run leaves out: bring it back from a copy, "
            "or delete it to train on all of them"
        ) from None


def add_roll_back(run_folder: Path, at: int, to: int) -> None:
    """Notes a return from bad step `at` to the checkpoint after `to` steps; on the disk when it returns."""
    _write(run_folder, [*read_roll_backs(run_folder), RollBack(at, to, at - to)])


def inherit_roll_backs(run_folder: Path, checkpoint: Path, step: int) -> None:
    """Notes what the run of a checkpoint left out until its step, so that a new run that goes on from there reads what
    that run reads next, and nothing twice. Nothing where the new run has roll backs of its own already."""
    known = [back for back in read_roll_backs(checkpoint.absolute().parent.parent) if back.to <= step]
    if known and not (run_folder / ROLL_BACKS).exists():
        _write(run_folder, known)


def _write(run_folder: Path, known: Sequence[RollBack]) -> None:
    path = run_folder / ROLL_BACKS
    unfinished = path.with_suffix(".writing")
    with unfinished.open("w") as file:
        json.dump([asdict(each) for each in known], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def batch_of(step: int, roll_backs: Sequence[RollBack]) -> int:
    """Number of the global batch that a step (from 0) reads."""
    return step + sum(each.left_out for each in roll_backs if each.to <= step)


def record_bad_step(
    config: RunConfig, bad: BadStep, metrics: Mapping[str, float], samples: Samples, batch: int
) -> Path:
    """Writes why a step was bad and what it read; the main process calls it. Returns the folder."""
    folder = config.run_folder / BAD_STEPS / f"step_{bad.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    size = config.training.global_batch_size
    tokens = np.stack([sample.tokens for sample in samples.read(batch * size, size)])
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    described = {
        **asdict(bad),
        "metrics": {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()},
        "batch": batch,
        "first_sample": batch * size,
        "samples": size,
    }
    write_json(folder / "step.json", described)
    return folder
