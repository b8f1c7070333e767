"""The training loop: resume, step, measure, save, until the end or a signal."""

import json
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from cola_megatron.config import ConfigError, RunConfig, dump_config
from cola_megatron.data import TokenShards
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import ProcessGroups, initialize_parallel, initialize_parameters
from cola_megatron.scaling.flops import training_flops
from cola_megatron.training.batches import MicroBatches, micro_batch_loader
from cola_megatron.training.checkpoint import (
    CheckpointError,
    check_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from cola_megatron.training.engine import Engine
from cola_megatron.training.evaluation import evaluate
from cola_megatron.training.metrics import MetricsLog, read_metrics
from cola_megatron.training.starting_weights import load_starting_weights
from cola_megatron.training.versions import provenance

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run_folder: str
    step: int
    finished: bool
    """False: stopped by `stop_after` or a signal; the run resumes from its checkpoint."""
    tokens: int
    model_flops: float
    seconds: float
    """Time in training steps, measurements and saves, over all jobs of this run."""
    metrics: dict[str, float]
    """The last held-out measurement."""


def train(config: RunConfig, progress: bool = True) -> Summary:
    """Runs one stage to its end, resuming where a checkpoint is found; every process of the job calls it.

    Raises:
        ConfigError, ShardError, CheckpointError: before the first step, one line each.
    """
    if config.data.path is None:
        raise ConfigError("data.path is not set: give the folder that `cola prep` wrote, data.path=FOLDER")
    groups = initialize_parallel(
        config.parallel.tensor_parallel_size, config.parallel.sequence_parallel, config.parallel.timeout_minutes
    )
    train_shards, held_out_shards = _open_shards(config, groups)
    _open_run_folder(config, groups)

    checkpoint, start = newest_checkpoint(config.run_folder), 0
    if checkpoint is not None:
        start = check_checkpoint(checkpoint, config, train_shards.fingerprint, groups)
        finished = _finished_summary(config, start)
        if finished is not None:
            return finished
    model = Cola(config, groups)
    if checkpoint is None:
        initialize_parameters(model, config.seed, groups)
        load_starting_weights(model, config, groups)
    engine = Engine(model.to(groups.device), config, groups)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
    return _Run(config, groups, engine, train_shards, held_out_shards, start, progress).to_the_end()


class _Run:
    """The state of a run between its steps."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        engine: Engine,
        train_shards: TokenShards,
        held_out_shards: TokenShards,
        start: int,
        progress: bool,
    ):
        self.config, self.groups, self.engine = config, groups, engine
        self.train_shards, self.held_out_shards = train_shards, held_out_shards
        self.step, self.saved_at = start, start if start else None
        self.progress = progress and groups.is_main
        self.seconds_before, self.measured = _history(config.run_folder, start)
        self.began = time.perf_counter()
        self.log = MetricsLog(config, start) if groups.is_main else None

    def to_the_end(self) -> Summary:
        training = self.config.training
        last = min(training.steps, training.stop_after or training.steps)
        batches = micro_batch_loader(
            MicroBatches(
                self.config, self.train_shards, self.groups.data_parallel_rank, self.groups.data_parallel_size
            ),
            self.step,
            self.groups.device,
        )
        bar = tqdm(
            total=training.steps, initial=self.step, disable=not self.progress, unit="step", desc=self.config.name
        )
        with _StopSignals(self.groups) as stop, bar:
            while self.step < last:
                self._one_step(batches, bar)
                if stop.requested():
                    break
            if self.saved_at != self.step:
                self._save()
        return self._finish()

    def _one_step(self, batches, bar: tqdm) -> None:
        training = self.config.training
        step_began = time.perf_counter()
        metrics = self.engine.step(batches, self.step)
        seconds = time.perf_counter() - step_began
        self.step += 1
        at_end = self.step == training.steps
        tokens = training.global_batch_size * self.config.data.sequence_length
        bar.update()
        if self.step % training.log.every == 0 or at_end or self.step == 1:
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {tokens / seconds:,.0f} tokens/s")
            self._write("train", {**metrics, "tokens_per_second": tokens / seconds, "seconds": self._seconds()})
        if self.step % training.evaluation.every == 0 or at_end:
            self.measured = evaluate(self.engine.model, self.held_out_shards, self.config, self.groups)
            self._write("evaluation", {**self.measured, "seconds": self._seconds()})
        if self.step % training.checkpoint.every == 0 or at_end:
            self._save()

    def _save(self) -> None:
        save_checkpoint(self.engine, self.step, self.train_shards.fingerprint, self.groups)
        self.saved_at = self.step

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self.log is not None:
            self.log.write(kind, self.step, values)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _finish(self) -> Summary:
        config = self.config
        summary = Summary(
            run_folder=str(config.run_folder),
            step=self.step,
            finished=self.step == config.training.steps,
            tokens=self.step * config.training.global_batch_size * config.data.sequence_length,
            model_flops=training_flops(config, self.step),
            seconds=self._seconds(),
            metrics=self.measured,
        )
        if self.log is not None:
            self.log.close()
            (config.run_folder / SUMMARY).write_text(json.dumps(asdict(summary), indent=1) + "\n")
        return summary


class _StopSignals:
    """SIGTERM and SIGUSR1 (pre-emption, time limit) end the run after the step in hand, with a checkpoint.

    The ranks agree on it: one that was signalled stops all of them at the same step.
    """

    def __init__(self, groups: ProcessGroups):
        self.groups, self.received = groups, False

    def __enter__(self) -> "_StopSignals":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def requested(self) -> bool:
        """Whether any rank was signalled (a collective)."""
        if self.groups.world_size == 1:
            return self.received
        flag = torch.tensor([float(self.received)], device=self.groups.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())


def _open_shards(config: RunConfig, groups: ProcessGroups) -> tuple[TokenShards, TokenShards]:
    """Both splits; only the main process reads the files through to check their hashes."""
    if groups.is_main:
        shards = [TokenShards(config.data.path, split, verify=config.data.verify) for split in ("train", "held_out")]
    groups.barrier()
    if not groups.is_main:
        shards = [TokenShards(config.data.path, split, verify="size") for split in ("train", "held_out")]
    for key, wanted, found in (
        ("data.sequence_length", config.data.sequence_length, shards[0].sequence_length),
        ("model.vocab_size", config.model.vocab_size, shards[0].vocab_size),
    ):
        if wanted != found:
            raise ConfigError(f"{key}={wanted}, but the shards in {config.data.path} have {found}; set {key}={found}")
    return shards[0], shards[1]


def _open_run_folder(config: RunConfig, groups: ProcessGroups) -> None:
    folder = config.run_folder
    if config.training.resume == "never" and newest_checkpoint(folder) is not None:
        raise CheckpointError(f"{folder} holds checkpoints and training.resume=never; use another name=")
    if groups.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
        _record_start(folder / "manifest.json")
    groups.barrier()


def _record_start(path: Path) -> None:
    """manifest.json: what the run began with, and under `resumed` what each later start found."""
    manifest = json.loads(path.read_text()) if path.is_file() else {}
    if manifest:
        manifest.setdefault("resumed", []).append(provenance())
    else:
        manifest = provenance()
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps(manifest, indent=1) + "\n")
    unfinished.replace(path)


def _finished_summary(config: RunConfig, step: int) -> Summary | None:
    """What a run that has nothing left to do left behind."""
    path = config.run_folder / SUMMARY
    if step < config.training.steps or not path.is_file():
        return None
    summary = Summary(**json.loads(path.read_text()))
    return summary if summary.step == step else None


def _history(run_folder: Path, start: int) -> tuple[float, dict[str, float]]:
    """Seconds spent and the last measurement before a resumed step."""
    path = run_folder / "metrics.jsonl"
    records = [record for record in read_metrics(path) if record["step"] <= start] if path.exists() and start else []
    seconds = max((record["seconds"] for record in records), default=0.0)
    measured = next((record for record in reversed(records) if record["kind"] == "evaluation"), {})
    return seconds, {name: value for name, value in measured.items() if name not in ("kind", "step", "seconds")}
