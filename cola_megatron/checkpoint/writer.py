"""Writes checkpoints: beside the training, into a folder of another name, moved into place when complete.

A save goes through these phases; between them stands a step of training, and all ranks agree on when they change:

    copying      the main thread of every rank copies what the next step would change (the only time training waits)
    writing      a thread of every rank writes its copies, with checksums, to the disk
    finishing    a thread of the main process writes index and state, renames the folder and removes old checkpoints

Threads never communicate. A save that is not asynchronous goes through the same phases at once, without the copies.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cola_megatron.checkpoint.errors import CheckpointError, NotFinite
from cola_megatron.checkpoint.folder import begin_folder, complete_folder, folder_of, prune, unfinished_folder
from cola_megatron.checkpoint.pieces import TrainingState, frozen_pieces, state_of_average, trained_pieces
from cola_megatron.checkpoint.sharded_tensors import Piece, Written, cut, write_index, write_pieces
from cola_megatron.checkpoint.staging import StagingBuffers
from cola_megatron.checkpoint.state_file import TENSORS, write_state
from cola_megatron.checkpoint.tokenizer import store_tokenizer
from cola_megatron.config import RunConfig, stored_tree
from cola_megatron.data.manifest import TOKENIZER_NAME
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.consensus import any_rank, together
from cola_megatron.records.provenance import versions

LEAVE_SECONDS = 30.0
"""How long a run that failed waits for its thread: a disk that hangs must not hold the process."""


@dataclass(frozen=True)
class Saved:
    """What a complete checkpoint took."""

    step: int
    blocked: float
    """Seconds in which training waited for it, the end of the run included."""
    seconds: float
    """From its beginning until it was complete."""
    bytes: int
    """Of all tensors, over all ranks; 0 elsewhere than on the main process."""


class Abandoned(Exception):
    """The writing was given up."""


class CheckpointWriter:
    """Saves the state of a run; as a context, it leaves nothing unfinished behind.

    All ranks call all methods, at the same steps. It is a `Participant` of `StepConsensus`: at every step boundary
    it learns how the writing goes on, and a failure on one rank becomes the same CheckpointError on all of them.

    A block that ends without an exception waits for the save in hand; after one, what is not yet written on every rank
    is given up, and the checkpoint before stays the newest.

    Args:
        on_saved: called in the main thread of every rank when a checkpoint is complete.
        more_state: asked at a save for what else belongs into state.json.
    """

    def __init__(
        self,
        engine: TrainingState,
        data_fingerprint: str,
        groups: ProcessGroups,
        asynchronous: bool,
        on_saved: Callable[[Saved], None] = lambda saved: None,
        more_state: Callable[[], dict[str, Any]] = dict,
    ):
        self.engine, self.data_fingerprint, self.groups = engine, data_fingerprint, groups
        self.asynchronous, self.on_saved = asynchronous, on_saved
        self.more_state = more_state
        self._copies = StagingBuffers(pinned=groups.device.type == "cuda")
        self._save: _Save | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        elif self._save is not None and self._save.work is not None:
            self._save.abandoned.set()
            wait([self._save.work], LEAVE_SECONDS)

    def save(self, step: int) -> None:
        """Saves the state after `step` optimiser steps, having waited for the save before.

        Returns when the state may change: at once when asynchronous, else when the checkpoint is complete.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; NotFinite: a value is not a number. The
            previous checkpoint stays good.
        """
        self.wait()
        save = self._save = _Save(step, folder_of(self.engine.config.run_folder, step))
        with self._failing_together(save), save.blocking():
            sizes = together(self.groups, lambda: self._copy(save))
            save.bytes = sum(sizes)
            together(self.groups, (lambda: _begin(save)) if self.groups.is_main else None)
            save.work = self._start(lambda: self._write(save))
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; raises CheckpointError."""
        while self._save is not None:
            with self._save.blocking():
                wait([self._save.phase])
                raised = any_rank(self.groups, self.flags())
            self.on_consensus(raised)

    def flags(self) -> Sequence[bool]:
        """Whether this rank still writes, and whether it failed."""
        if self._save is None:
            return False, False
        done = self._save.phase.done()
        return not done, done and self._save.phase.exception() is not None

    def on_consensus(self, raised: Sequence[bool]) -> None:
        """Goes on to the next phase when all ranks are through with this one; raises CheckpointError."""
        writing, failed = raised
        save = self._save
        if save is None or (writing and not failed):
            return
        with self._failing_together(save), save.blocking():
            if failed:
                save.abandoned.set()
            parts = together(self.groups, save.outcome)
        if save.finishing:
            self._save = None
            self.on_saved(Saved(save.step, save.blocked, save.ended - save.began, save.bytes))
            return
        save.finishing = True
        written = [piece for pieces in parts for piece in pieces]
        finish = (lambda: self._finish(save, written)) if self.groups.is_main else (lambda: None)
        with save.blocking():
            save.work = self._start(finish)

    def _copy(self, save: "_Save") -> int:
        """Returns the bytes that this rank will write."""
        save.more_state = {**self.more_state(), **state_of_average(self.engine)}
        updates = save.step - self.engine.skipped_updates
        trained: list[Piece] | Iterator[Piece] = trained_pieces(self.engine, updates)
        if self.asynchronous:
            trained = self._copies.take(trained)
        save.pieces = [*frozen_pieces(self.engine), *trained]
        return sum(4 * piece.values.numel() for piece in save.pieces)

    def _write(self, save: "_Save") -> list[Written]:
        folder, stem = save.unfinished / TENSORS, f"rank_{self.groups.rank:05d}"
        try:
            return write_pieces(folder, stem, save.pieces_until_abandoned())
        except OSError:
            with contextlib.suppress(OSError):  # what went wrong with the write is what counts
                for file in folder.glob(f"{stem}_*"):
                    file.unlink()  # at once: a full disk is full for the log of the run, too
            raise

    def _finish(self, save: "_Save", written: list[Written]) -> None:
        config = self.engine.config
        write_index(save.unfinished / TENSORS, written)
        state = _state(config, save.step, self.data_fingerprint, self.groups)
        tokenizer = store_tokenizer(config.run_folder / TOKENIZER_NAME, save.unfinished)
        write_state(save.unfinished, {**state, **tokenizer, **save.more_state})
        complete_folder(save.final)
        prune(config.run_folder, config.training.checkpoint)
        save.ended = time.perf_counter()

    def _start(self, work: Callable[[], Any]) -> Future:
        """Runs `work`, in a thread of its own where saves are asynchronous."""
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # raised again by the main thread
                future.set_exception(error)

        if self.asynchronous:
            threading.Thread(target=run, name="checkpoint writer", daemon=True).start()
        else:
            run()
        return future

    @contextlib.contextmanager
    def _failing_together(self, save: "_Save") -> Iterator[None]:
        """Makes one line of what `together` raises on all ranks, and forgets the save."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            self._save = None
            raise CheckpointError(
                f"{save.final}: the checkpoint could not be written ({str(error).splitlines()[0]}); the one before "
                "stays good: see that the disk has space (training.checkpoint.keep_last, keep_every and at say which "
                "checkpoints stay), and run again"
            ) from error


def save_checkpoint(engine: TrainingState, step: int, data_fingerprint: str, groups: ProcessGroups) -> Path:
    """Writes the state after `step` optimiser steps and returns its folder; all ranks call it.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the previous checkpoint stays good.
    """
    with CheckpointWriter(engine, data_fingerprint, groups, asynchronous=False) as writer:
        writer.save(step)
    return folder_of(engine.config.run_folder, step)


@dataclass
class _Save:
    """A save under way, on this rank."""

    step: int
    final: Path
    pieces: list[Piece] = field(default_factory=list)
    more_state: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    work: Future | None = None
    """Of the phase in hand: writing or finishing."""
    finishing: bool = False
    abandoned: threading.Event = field(default_factory=threading.Event)
    blocked: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    @property
    def phase(self) -> Future:
        assert self.work is not None, "`save` ends with the first phase begun, or with an error"
        return self.work

    @property
    def unfinished(self) -> Path:
        return unfinished_folder(self.final)

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked += time.perf_counter() - began

    def pieces_until_abandoned(self) -> Iterator[Piece]:
        for piece in chain.from_iterable(map(cut, self.pieces)):
            if self.abandoned.is_set():
                raise Abandoned
            if not piece.values.isfinite().all():
                raise NotFinite(
                    f"step {self.step}: {piece.name} is not finite: the run has diverged, and nothing of this step was "
                    "saved; start again under another name= with a lower training.optimizer.learning_rate"
                )
            yield piece

    def outcome(self) -> Any:
        """What the work came to; nothing where it was given up because another rank's failed."""
        try:
            return self.phase.result()
        except Abandoned:
            return None


def _begin(save: _Save) -> None:
    begin_folder(save.final, save.bytes)
    (save.unfinished / TENSORS).mkdir()


def _state(config: RunConfig, step: int, data_fingerprint: str, groups: ProcessGroups) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": step * config.training.global_batch_size,
        "layout": {
            "tensor_parallel": groups.tensor_parallel_size,
            "pipeline_parallel": groups.pipeline_parallel_size,
            "context_parallel": groups.context_parallel_size,
            "data_parallel": groups.data_parallel_size,
            "zero_stage": config.parallel.zero_stage,
        },
        "data_fingerprint": data_fingerprint,
        "versions": versions(),
        "config": stored_tree(config),
    }
