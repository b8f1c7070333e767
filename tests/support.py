"""Plain helpers of the tests."""

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_megatron.config import RunConfig
from cola_megatron.families.samples import training_sample

TINY = [
    "model.vocab_size=300",
    "model.vae.hidden_size=32",
    "model.vae.ffn_hidden_size=64",
    "model.vae.latent_dim=4",
    "model.dit.hidden_size=32",
    "model.dit.head_dim=8",
    "model.dit.rotary_dim=6",
    "model.dit.num_layers=2",
    "model.dit.latent_dim=4",
    "model.dit.block_size=8",
    "data.sequence_length=32",
    "training.steps=6",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.loader_workers=0",
    "training.schedule.warmup_steps=2",
    "training.schedule.decay_steps=20",
    "training.evaluation.every=100",
    "training.evaluation.samples=8",
    "training.evaluation.texts=0",
    "training.checkpoint.every=100",
    "training.log.every=1",
    "training.log.wandb=disabled",
    "training.vae_update.from_scratch=true",
]


def make_text(path: Path, documents: int) -> None:
    """Sentences of invented grammar: enough structure to compress, no corpus needed."""
    chooser = random.Random(0)
    words = [
        "the",
        "prior",
        "writes",
        "latent",
        "blocks",
        "of",
        "noise",
        "and",
        "meaning",
        "flows",
        "back",
        "to",
        "words",
    ]
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(chooser.choice(words) for _ in range(60 + number % 40))
            file.write(json.dumps({"text": f"{number}: {text}."}) + "\n")


def prepared(output: Path, inputs: list[Path], sequence_length: int = 32, vocab_size: int = 300, **sections) -> Path:
    """A prepared folder with its own small tokenizer."""
    from data_prep.prepare import prepare
    from launchers.prep_recipes import from_options

    sections = {
        "tokenizer": {"vocab_size": vocab_size},
        "packing": {"sequence_length": sequence_length},
        "held_out_fraction": 0.1,
        **sections,
    }
    return prepare(from_options([str(path) for path in inputs], output, **sections), progress=False)


def random_batch(config: RunConfig, samples: range, step: int = 0, documents: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens with the draws that training would use for these global sample indices.

    Args:
        documents: a sample has several, of every length, and up to three tokens of padding.
    """
    rows, (padding, end) = [], (2, 1) if documents else (-1, -1)
    for index in samples:
        tokens = np.random.default_rng(index).integers(0, config.model.vocab_size, config.data.sequence_length)
        if documents:
            tokens[tokens % 8 == 0] = end
            tokens[len(tokens) - index % 4 :] = padding
        rows.append(training_sample(config, tokens, padding, end, index, step))
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def perturbed(module: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Moves every parameter away from its start, so that zero-initialised gates let gradients through."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return module


@contextlib.contextmanager
def package_in(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`folder` holds a package that is found before any other of that name, and forgotten afterwards."""

    def forget() -> None:
        for module in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[module]

    forget()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    forget()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size, mounted for the time of the block; skips the test where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
