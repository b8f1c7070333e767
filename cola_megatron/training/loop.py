"""The training loop: resume, step, save, measure, until the end or a signal."""

import contextlib
import functools
import gc
import logging
import time
from dataclasses import replace

from cola_megatron.checkpoint.folder import step_folders, step_of
from cola_megatron.checkpoint.fork import record_fork, start_of_fork
from cola_megatron.checkpoint.load import divergence_of, load_optimizer, load_weights
from cola_megatron.checkpoint.resume import resume_from
from cola_megatron.checkpoint.tokenizer import keep_tokenizer
from cola_megatron.checkpoint.writer import CheckpointWriter, Saved
from cola_megatron.config import RunConfig
from cola_megatron.data import TokenShards, training_samples
from cola_megatron.data.manifest import TOKENIZER_NAME
from cola_megatron.data.run_shards import open_shards
from cola_megatron.families import family_of
from cola_megatron.held_out.measure import evaluate
from cola_megatron.held_out.texts import Decode, decoder_for, held_out_texts
from cola_megatron.parallel import HangWatch, PeerWatch, ProcessGroups, initialize_parameters
from cola_megatron.parallel.consensus import StepConsensus, from_main
from cola_megatron.planning.flops import training_flops
from cola_megatron.records.output import outliving_its_readers
from cola_megatron.records.recorder import RunRecorder, open_recorder
from cola_megatron.records.run_folder import (
    Summary,
    finished_summary,
    lock_run_folder,
    read_history,
    write_summary,
)
from cola_megatron.records.tensorboard_log import require_tensorboard
from cola_megatron.training.bad_steps import (
    BAD_STEPS,
    add_roll_back,
    batch_of,
    inherit_roll_backs,
    read_roll_backs,
    record_bad_step,
)
from cola_megatron.training.batches import MicroBatches, micro_batches_per_step
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.divergence import BadStep, Divergence, TrainingDiverged, require_finite
from cola_megatron.training.engine import Engine
from cola_megatron.training.loader import BatchLoader
from cola_megatron.training.stop_signals import StopSignals

logger = logging.getLogger(__name__)


def train(config: RunConfig, progress: bool = True) -> Summary:
    """Runs one stage to its end, resuming where a checkpoint is found; every process of the job calls it.

    Raises:
        ConfigError, ShardError, CheckpointError: before the first step, one line each.
        TrainingDiverged: in the step that produced it.
        CheckpointError: a save failed.
        RankLost: another rank died, failed or fell silent. Where a rank cannot raise, because it waits for the lost
            one, its process ends instead, with the same line and exit code.
    """
    require_tensorboard(config)
    groups = initialize_run(config)
    hang = HangWatch(config.run_folder, config.training.hang_seconds, groups.rank, groups.world_size)
    with (
        outliving_its_readers(),
        hang,
        PeerWatch(groups, config.parallel.peer_timeout_seconds, hang.write_stacks) as watch,
    ):
        hang.peers = watch
        while (summary := _train(config, groups, watch, hang, progress)) is None:
            # The engine of the state that was given up; its parameters go in the second round, when torch has let go.
            gc.collect()
            gc.collect()
        return summary


def _train(
    config: RunConfig, groups: ProcessGroups, watch: PeerWatch, hang: HangWatch, progress: bool
) -> Summary | None:
    """None: the run went back to a checkpoint, and is to be resumed from there."""
    train_shards, held_out_shards = open_shards(config, config.data.path, ["train", "held_out"], groups)
    micro_batches_per_step(config, groups.data_parallel_size)  # refuse here what the engine would refuse late
    with lock_run_folder(config.run_folder) if groups.is_main else contextlib.nullcontext():
        checkpoint, start = resume_from(config, train_shards.fingerprint, groups)
        finished = finished_summary(config, start)
        if finished is not None:
            return finished
        forked = checkpoint is None and config.training.start_from is not None
        has_optimizer = checkpoint is not None
        if forked:
            checkpoint, start, has_optimizer = start_of_fork(config, groups)
        model = build_model(config, groups)
        if checkpoint is None:
            initialize_parameters(model, config.seed, groups)
            family_of(config).load_starting_weights(model, config, groups)
        else:
            load_weights(model, checkpoint, groups)
        engine = Engine(model.to(groups.device), config, groups)
        if checkpoint is not None and has_optimizer:
            load_optimizer(engine, checkpoint)
        from_main(groups, functools.partial(keep_tokenizer, config, checkpoint, train_shards))
        if forked and checkpoint is not None:
            from_main(groups, functools.partial(record_fork, config, checkpoint))
            from_main(groups, functools.partial(inherit_roll_backs, config.run_folder, checkpoint, start))
        # From here on the folder is written to: all that could refuse this start has had its say.
        hang.progress()
        with open_recorder(config, start, groups, progress) as recorder:
            judged = Divergence(config.training.divergence, None if checkpoint is None else divergence_of(checkpoint))
            run = _Run(config, groups, engine, train_shards, held_out_shards, start, recorder, watch, hang, judged)
            summary = run.to_the_end()
        if summary is None:
            engine.close()  # the next one needs its memory
        groups.barrier()  # a launcher ends what is left when the first rank has ended: not before the last is through
        return summary


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
        recorder: RunRecorder,
        watch: PeerWatch,
        hang: HangWatch,
        divergence: Divergence,
    ):
        self.divergence = divergence
        self.bad_step: int | None = None
        self.roll_backs = read_roll_backs(config.run_folder)
        self.config, self.groups, self.engine = config, groups, engine
        self.train_shards, self.held_out_shards = train_shards, held_out_shards
        self.began_at = self.step = self.saved_at = start
        self.recorder, self.watch, self.hang = recorder, watch, hang
        self.stopped = False
        self.decode: Decode | None = None
        history = read_history(config.run_folder, start)
        self.seconds_before, self.measured_at, self.measured = history.seconds, history.measured_at, history.measured
        self.began = time.perf_counter()
        self.writer = CheckpointWriter(
            engine,
            train_shards.fingerprint,
            groups,
            config.training.checkpoint.asynchronous,
            self._record_save,
            more_state=lambda: {"divergence": divergence.state()},
        )

    def to_the_end(self) -> Summary | None:
        """None where a bad step sent the run back to its newest checkpoint."""
        training = self.config.training
        last = min(training.steps, training.stop_after or training.steps)
        groups, data = self.groups, self.config.data
        samples = self.samples = training_samples(
            self.train_shards, data.seed, data.shuffle_block_shards, skip_bad=data.bad_shards == "skip"
        )
        batches = BatchLoader(
            MicroBatches(
                self.config,
                samples,
                groups.data_parallel_rank,
                groups.data_parallel_size,
                functools.partial(batch_of, roll_backs=self.roll_backs),
            ),
            self.step,
            groups,
            known_bad=self.train_shards.bad,
        )
        with (
            StopSignals() as stop,
            contextlib.closing(batches),
            self.watch.naming_lost_ranks(),
            self.writer,
        ):
            consensus = StepConsensus(groups, stop, self.writer)
            self._measure_if_due()  # a job that died between a save and its measurement left it to us
            while self.step < last:
                self._one_step(batches)
                if self.bad_step is not None:
                    break
                if training.checkpoint.is_due(self.step) or self.step >= training.steps:
                    self._save()
                consensus.reach()
                if stop.requested():
                    self.stopped = self.step < last
                    break  # whoever asked will not wait for a measurement; the resumed job makes it up
                self._measure_if_due()
            if self.saved_at != self.step and self.bad_step is None:
                self._save()
        if self.bad_step is not None:
            from_main(groups, functools.partial(self._note_roll_back, self.bad_step))
            return None
        return self._finish()

    def _one_step(self, batches: BatchLoader) -> None:
        began, self.watch.step = time.perf_counter(), self.step + 1
        accepts = self._accepts if self.divergence.refuses_updates else None
        metrics = self.engine.step(batches, self.step, accepts)
        seconds = time.perf_counter() - began
        self.hang.progress()
        bad = self.divergence.judge(self.step + 1, metrics)
        if bad is not None:
            self._answer(bad, metrics)
            return
        self.divergence.accept(metrics)
        self.step += 1
        self.recorder.stepped(self.step, metrics["loss"], self._tokens(1))
        if self.step % self.config.training.log.every == 0 or self.step in (1, self.config.training.steps):
            skipped = {"skipped_updates": self.divergence.skipped_updates} if self.divergence.skipped_updates else {}
            measured = {**skipped, "tokens_per_second": self._tokens(1) / seconds, **batches.measured()}
            self.recorder.train(self.step, {**metrics, **measured}, self._seconds())

    def _accepts(self, metrics: dict[str, float]) -> bool:
        return self.divergence.judge(self.step + 1, metrics) is None

    def _answer(self, bad: BadStep, metrics: dict[str, float]) -> None:
        """Does what the policy says about a bad step, having recorded it."""
        policy, action = self.config.training.divergence, bad.action
        if action == "roll_back" and len(self.roll_backs) >= policy.max_roll_backs:
            bad = replace(bad, action="stop", reason=f"{bad.reason}, after {len(self.roll_backs)} roll backs")
        folder = self.config.run_folder / BAD_STEPS
        if self.groups.is_main:
            batch = batch_of(self.step, self.roll_backs)
            folder = record_bad_step(self.config, bad, metrics, self.samples, batch)
            logger.warning("step %d: %s; %s; its batch is in %s", bad.step, bad.reason, bad.action, folder)
        self.recorder.record("divergence", bad.step, {"action": bad.action, "seconds": self._seconds()})
        if bad.action == "skip":
            self.divergence.skip(bad)
            self.step += 1
        elif bad.action == "roll_back":
            self.bad_step = bad.step
        else:
            self.writer.wait()  # what was good and is being written is not given up
            raise TrainingDiverged(
                f"step {bad.step}: {bad.reason}; nothing of it was saved. Look at its batch in {folder}, set "
                "training.divergence, or start again under another name= with a lower training.optimizer.learning_rate"
            )

    def _note_roll_back(self, bad_step: int) -> None:
        folders = step_folders(self.config.run_folder)
        to = step_of(folders[-1]) if folders else self.began_at
        add_roll_back(self.config.run_folder, bad_step, to)
        logger.warning("back to step %d; the %d batches from there are left out", to, bad_step - to)

    def _measure_if_due(self) -> None:
        training = self.config.training
        due = self.step and (self.step % training.evaluation.every == 0 or self.step >= training.steps)
        if not due or self.measured_at == self.step:
            return
        self.recorder.state("measuring")
        self.measured = evaluate(
            self.engine.model, self.held_out_shards, self.config, self.groups, on_batch=self.hang.progress
        )
        self._write_texts()
        self.measured_at = self.step
        self.recorder.record("evaluation", self.step, {**self.measured, "seconds": self._seconds()})
        require_finite(self.step, self.measured)

    def _write_texts(self) -> None:
        """Before the record of the measurement: a job that dies in between makes up for both."""
        count = self.config.training.evaluation.texts
        if not count:
            return
        texts = held_out_texts(self.engine.model, self.held_out_shards, self.config, count, self.hang.progress)
        if self.groups.is_main:
            self.decode = self.decode or decoder_for(self.config.run_folder / TOKENIZER_NAME)
            readable = [text.readable(self.decode) for text in texts]
            self.recorder.texts(texts[0].kind, self.step, readable)

    def _save(self) -> None:
        self.recorder.state("saving")
        self.writer.save(self.step)
        self.saved_at = self.step
        self.hang.progress()

    def _record_save(self, saved: Saved) -> None:
        took = {"blocked": saved.blocked, "writing": saved.seconds, "bytes": saved.bytes, "seconds": self._seconds()}
        self.recorder.record("checkpoint", saved.step, took)
        self.hang.progress()

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
            measured_at=self.measured_at,
            stopped_by_signal=self.stopped,
            **self.recorder.goodput(self._seconds()),
        )
        self.recorder.state("stopped" if not summary.finished else "finished")
        if self.groups.is_main:
            write_summary(summary)
        return summary
