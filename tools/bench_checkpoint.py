"""For how long a save keeps training waiting: asynchronous against synchronous, on the same state in one process.

    python -m tools.bench_checkpoint
    torchrun --nproc-per-node 8 -m tools.bench_checkpoint base --folder /scratch parallel.zero_stage=1

Trains on random tokens and saves alternately in both forms; between two saves the disk has nothing left to do. What
counts as waiting for an asynchronous save: the copying, and what the step boundaries after it take until the checkpoint
is complete. The first asynchronous save stands alone: it brings in the host memory that the later ones find. Steps are
timed beside the writing and without it.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cola_megatron.checkpoint.writer import CheckpointWriter, Saved
from cola_megatron.config import RunConfig, load_config
from cola_megatron.parallel import ProcessGroups, initialize_parameters
from cola_megatron.parallel.consensus import StepConsensus, from_main
from cola_megatron.training.batches import MicroBatches
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.engine import Engine
from cola_megatron.training.stop_signals import StopSignals
from tools.bench_ranks import RandomSamples

RUN = ("stage=2", "training.vae_update.from_scratch=true", "training.checkpoint.keep_last=1")
SHAPE = (
    "model.dit.num_layers=12",
    "model.dit.hidden_size=512",
    "model.vae.hidden_size=512",
    "model.vae.ffn_hidden_size=2048",
    "model.vae.num_attention_heads=8",
    "data.sequence_length=64",
    "training.global_batch_size=4",
    "training.micro_batch_size=4",
    "training.precision=fp32",
)
"""About 80 M trained parameters, with steps that two cores take in about a second."""


def main() -> None:
    """Prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="preset or file (by default `small`, made larger), section.key=value")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default that of temporary files")
    parser.add_argument("--saves", type=int, default=4, help="of each form, the first included")
    parser.add_argument("--steps", type=int, default=4, help="steps without a save that are timed, after each save")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args()
    given, overrides = arguments.config[:1], arguments.config[1:]
    if not given or "=" in given[0]:
        given, overrides = ["small"], [*SHAPE, *arguments.config]
    config = load_config(given[0], [*RUN, *overrides])
    groups = initialize_run(config)
    folder = Path(from_main(groups, lambda: tempfile.mkdtemp(dir=arguments.folder)))
    try:
        config = config.model_copy(update={"runs_folder": folder})
        answer = Measurement(config, groups).run(arguments.saves, arguments.steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if groups.is_main:
        print(json.dumps(answer, indent=1) if arguments.json else _table(answer))


class Measurement:
    """A run of both forms of saving on one engine."""

    def __init__(self, config: RunConfig, groups: ProcessGroups):
        model = build_model(config, groups)
        initialize_parameters(model, config.seed, groups)
        self.groups, self.engine, self.step = groups, Engine(model.to(groups.device), config, groups), 0
        self.batches = MicroBatches(config, RandomSamples(config), groups.data_parallel_rank, groups.data_parallel_size)
        self.saved: list[Saved] = []

    def run(self, saves: int, steps: int) -> dict[str, Any]:
        """Seconds of both forms, of the steps alone and of those beside a write; bytes of one checkpoint."""
        forms = {
            name: CheckpointWriter(self.engine, "random", self.groups, name == "asynchronous", self.saved.append)
            for name in ("synchronous", "asynchronous")
        }
        consensus = StepConsensus(self.groups, StopSignals(), forms["asynchronous"])
        alone, beside = [], []
        self._one_step(consensus)  # warms up
        for _ in range(saves):
            for name, writer in forms.items():
                alone += [self._one_step(consensus) for _ in range(steps)]
                done = len(self.saved)
                writer.save(self.step)
                if name == "synchronous":
                    continue
                while len(self.saved) == done:
                    beside.append(self._one_step(consensus))
        synchronous, asynchronous = self.saved[0::2], self.saved[1::2]
        first, *later = asynchronous
        waits = {
            "synchronous": statistics.median(saved.blocked for saved in synchronous),
            "asynchronous, first": first.blocked,
            "asynchronous, later": statistics.median(saved.blocked for saved in later or [first]),
        }
        return {
            "ranks": self.groups.world_size,
            "gigabytes": first.bytes / 1e9,
            "blocked": waits,
            "ratio": {name: seconds / waits["synchronous"] for name, seconds in waits.items()},
            "all_blocked": {
                "synchronous": [saved.blocked for saved in synchronous],
                "asynchronous": [saved.blocked for saved in asynchronous],
            },
            "writing": statistics.median(saved.seconds for saved in asynchronous),
            "step_alone": statistics.median(alone),
            "step_beside_a_write": statistics.median(beside),
            "steps_beside_a_write": len(beside),
        }

    def _one_step(self, consensus: StepConsensus) -> float:
        """Its seconds, without what the step boundary takes."""
        began = time.perf_counter()
        self.engine.step(self._next_batches(), self.step)
        if self.groups.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.step += 1
        consensus.reach()
        return seconds

    def _next_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        first = self.step * self.batches.per_step
        for index in range(first, first + self.batches.per_step):
            yield {name: tensor.to(self.groups.device) for name, tensor in self.batches[index].tensors.items()}


def _table(answer: dict[str, Any]) -> str:
    slower = answer["step_beside_a_write"] / answer["step_alone"] - 1
    return "\n".join(
        [
            f"{answer['gigabytes']:.2f} GB of state, {answer['ranks']} ranks",
            "",
            "| save | training waits, s | of the synchronous save |",
            "| --- | --- | --- |",
            *(
                f"| {name} | {seconds:.3f} | {answer['ratio'][name]:.3f} |"
                for name, seconds in answer["blocked"].items()
            ),
            "",
            f"written beside the training in {answer['writing']:.2f} s",
            f"step {answer['step_alone']:.3f} s, beside a write {answer['step_beside_a_write']:.3f} s "
            f"({slower:+.0%}, {answer['steps_beside_a_write']} steps)",
        ]
    )


if __name__ == "__main__":
    main()
