"""The training loop: resume, step, save, measure, until the end or a signal."""

import contextlib
import math
import time
from collections.abc import Iterator

from tqdm import tqdm

from cola_megatron.config import RunConfig
from cola_megatron.data import TokenShards, training_samples
from cola_megatron.errors import ExitCode, UserError
from cola_megatron.parallel import PeerWatch, ProcessGroups, initialize_parameters
from cola_megatron.scaling.flops import training_flops
from cola_megatron.training.agreement import Agreement
from cola_megatron.training.batches import MicroBatches, micro_batches_per_step
from cola_megatron.training.checkpoint import load_optimizer, load_weights
from cola_megatron.training.checkpoint_writer import CheckpointWriter, Saved
from cola_megatron.training.engine import Engine
from cola_megatron.training.evaluation import evaluate
from cola_megatron.training.layout import build_model, initialize_run
from cola_megatron.training.loader import BatchLoader
from cola_megatron.training.metrics import MetricsLog
from cola_megatron.training.open_shards import open_shards
from cola_megatron.training.resume import resume_from
from cola_megatron.training.run_folder import (
    Summary,
    finished_summary,
    lock_run_folder,
    read_history,
    record_start,
    write_summary,
)
from cola_megatron.training.starting_weights import load_starting_weights
from cola_megatron.training.stop_signals import StopSignals


class TrainingDiverged(UserError, ArithmeticError):
    """A loss or gradient that is not a number; nothing of the step was saved."""

    exit_code = ExitCode.DIVERGED


def train(config: RunConfig, progress: bool = True) -> Summary:
    """Runs one stage to its end, resuming where a checkpoint is found; every process of the job calls it.

    Raises:
        ConfigError, ShardError, CheckpointError: before the first step, one line each.
        TrainingDiverged: in the step that produced it.
        CheckpointError: a save failed.
        RankLost: another rank died, failed or fell silent. Where a rank cannot raise, because it waits for the lost
            one, its process ends instead, with the same line and exit code.
    """
    groups = initialize_run(config)
    with PeerWatch(groups, config.parallel.peer_timeout_seconds) as watch:
        return _train(config, groups, watch, progress)


def _train(config: RunConfig, groups: ProcessGroups, watch: PeerWatch, progress: bool) -> Summary:
    train_shards, held_out_shards = open_shards(config, config.data.path, ["train", "held_out"], groups)
    micro_batches_per_step(config, groups.data_parallel_size)  # refuse here what the engine would refuse late
    with lock_run_folder(config.run_folder) if groups.is_main else contextlib.nullcontext():
        checkpoint, start = resume_from(config, train_shards.fingerprint, groups)
        finished = finished_summary(config, start)
        if finished is not None:
            return finished
        model = build_model(config, groups)
        if checkpoint is None:
            initialize_parameters(model, config.seed, groups)
            load_starting_weights(model, config, groups)
        else:
            load_weights(model, checkpoint, groups)
        engine = Engine(model.to(groups.device), config, groups)
        if checkpoint is not None:
            load_optimizer(engine, checkpoint)
        # From here on the folder is written to: all that could refuse this start has had its say.
        with _open_log(config, start, groups) as log:
            return _Run(config, groups, engine, train_shards, held_out_shards, start, log, watch, progress).to_the_end()


@contextlib.contextmanager
def _open_log(config: RunConfig, start: int, groups: ProcessGroups) -> Iterator[MetricsLog | None]:
    """The main process's log; every rank waits until the records after `start` are gone from it."""
    with contextlib.ExitStack() as at_the_end:
        log = None
        if groups.is_main:
            record_start(config)
            log = at_the_end.enter_context(contextlib.closing(MetricsLog(config, start)))
        groups.barrier()
        yield log


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
        log: MetricsLog | None,
        watch: PeerWatch,
        progress: bool,
    ):
        self.config, self.groups, self.engine = config, groups, engine
        self.train_shards, self.held_out_shards = train_shards, held_out_shards
        self.step, self.saved_at = start, start
        self.log, self.watch, self.progress = log, watch, progress and groups.is_main
        history = read_history(config.run_folder, start)
        self.seconds_before, self.measured_at, self.measured = history.seconds, history.measured_at, history.measured
        self.began = time.perf_counter()
        self.writer = CheckpointWriter(
            engine, train_shards.fingerprint, groups, config.training.checkpoint.asynchronous, self._record_save
        )

    def to_the_end(self) -> Summary:
        training = self.config.training
        last = min(training.steps, training.stop_after or training.steps)
        groups, data = self.groups, self.config.data
        samples = training_samples(
            self.train_shards, data.seed, data.shuffle_block_shards, skip_bad=data.bad_shards == "skip"
        )
        batches = BatchLoader(
            MicroBatches(self.config, samples, groups.data_parallel_rank, groups.data_parallel_size),
            self.step,
            groups,
            known_bad=self.train_shards.bad,
        )
        bar = tqdm(
            total=training.steps, initial=self.step, disable=not self.progress, unit="step", desc=self.config.name
        )
        with (
            StopSignals() as stop,
            bar,
            contextlib.closing(batches),
            self.watch.naming_lost_ranks(),
            self.writer,
        ):
            agreement = Agreement(groups, stop, self.writer)
            self._measure_if_due()  # a job that died between a save and its measurement left it to us
            while self.step < last:
                self._one_step(batches, bar)
                if self.step % training.checkpoint.every == 0 or self.step >= training.steps:
                    self._save()
                agreement.reach()
                if stop.requested():
                    break  # whoever asked will not wait for a measurement; the resumed job makes it up
                self._measure_if_due()
            if self.saved_at != self.step:
                self._save()
        return self._finish()

    def _one_step(self, batches: BatchLoader, bar: tqdm) -> None:
        began, self.watch.step = time.perf_counter(), self.step + 1
        metrics = self.engine.step(batches, self.step)
        seconds = time.perf_counter() - began
        self._stop_if_diverged(metrics)
        self.step += 1
        bar.update()
        if self.step % self.config.training.log.every == 0 or self.step in (1, self.config.training.steps):
            speed = self._tokens(1) / seconds
            bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {speed:,.0f} tokens/s")
            times = {"tokens_per_second": speed, **batches.measured(), "seconds": self._seconds()}
            self._write("train", {**metrics, **times})

    def _stop_if_diverged(self, metrics: dict[str, float]) -> None:
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            self.writer.wait()  # what was good and is being written is not given up
            raise TrainingDiverged(
                f"step {self.step + 1}: {', '.join(bad)}; nothing of it was saved. Start again under another name= "
                "with a lower training.optimizer.learning_rate, or look at the data of that step"
            )

    def _measure_if_due(self) -> None:
        training = self.config.training
        due = self.step and (self.step % training.evaluation.every == 0 or self.step >= training.steps)
        if not due or self.measured_at == self.step:
            return
        self.measured = evaluate(self.engine.model, self.held_out_shards, self.config, self.groups)
        self.measured_at = self.step
        self._write("evaluation", {**self.measured, "seconds": self._seconds()})

    def _save(self) -> None:
        self.writer.save(self.step)
        self.saved_at = self.step

    def _record_save(self, saved: Saved) -> None:
        took = {"blocked": saved.blocked, "writing": saved.seconds, "bytes": saved.bytes, "seconds": self._seconds()}
        self._write("checkpoint", took, saved.step)

    def _write(self, kind: str, values: dict[str, float], step: int | None = None) -> None:
        if self.log is not None:
            self.log.write(kind, self.step if step is None else step, values)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _tokens(self, steps: int) -> int:
        return steps * self.config.training.global_batch_size * self.config.data.sequence_length

    def _finish(self) -> Summary:
        summary = Summary(
            run_folder=str(self.config.run_folder),
            step=self.step,
            finished=self.step >= self.config.training.steps,
            tokens=self._tokens(self.step),
            model_flops=training_flops(self.config, self.step),
            seconds=self._seconds(),
            metrics=self.measured or {},
        )
        if self.groups.is_main:
            write_summary(summary)
        return summary
