"""Notices that a rank of the job is lost, and ends the others with one line that names it.

Left alone, the others would wait inside a collective: under nccl until its timeout (`parallel.timeout_minutes`), and
the error then names a collective, not a rank. So two threads stand beside the training of every rank.

The heartbeat thread posts this rank's step to the job's store once a second, and reads. A rank is lost when

* its process ends: a neighbour on the same machine holds a handle to it and knows at once;
* nothing was heard of it for `timeout` seconds: rank 0 looks at the heartbeats of all ranks, the others at rank 0's;
* it says so itself: it failed with an exception;
* the store is gone, and with it the machine that holds it, which is rank 0's.

Whoever notices writes the verdict into the store; the first one stands, and every rank reads it with its next
heartbeat. Every rank makes two small requests a second, rank 0 one that reads N heartbeats: O(N) in all.

The guard thread ends the process once there is a verdict: a main thread that waits inside a collective cannot be
interrupted. It is a thread of its own because the store's client waits without limit for a store that fell silent.

A heartbeat says that a process lives, not that it advances: a rank whose main thread hangs still beats. That is noticed
by `hang_watch`, which tells it here.
"""

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch.distributed as dist

from cola_megatron.errors import ExitCode, UserError
from cola_megatron.parallel.groups import ProcessGroups
from cola_megatron.parallel.heartbeats import Board, Heartbeat, Silence
from cola_megatron.parallel.process_ends import ProcessEnds, this_machine

# How long the main thread may take from its exception to the end of the block: it closes logs and loaders.
LEAVE_SECONDS = 30.0

# All ranks of a job train the same runs in the same order: the same number is the same watch on each of them.
_numbers = itertools.count()


class RankLost(UserError):
    """Another rank of the job died, failed or fell silent; the message names it."""

    exit_code = ExitCode.RANK_LOST


class PeerWatch:
    """Watches the other ranks of the job while the block runs; in a job of one process it does nothing.

    The block keeps `step`, the optimiser step in hand (from 1; 0 before the first), current: errors name it.

    A block that ends without an exception tells the others that this rank is done. An exception of this rank's own is
    told to the others and goes on unchanged. One out of a collective becomes `RankLost` where a rank is lost.
    """

    def __init__(self, groups: ProcessGroups, timeout: float, before_hung_end: Callable[[], object] = lambda: None):
        """
        Args:
            before_hung_end: called on every rank, in another thread, before a job that hangs is ended.
        """
        self.groups, self.timeout, self.step = groups, timeout, 0
        self._before_hung_end = before_hung_end
        # A verdict is read within a second, and 1,000 ranks make no more requests than the store answers in passing.
        self.interval = min(1.0, timeout / 20)
        self._verdict: str | None = None
        self._code = ExitCode.RANK_LOST
        self._accusation: str | None = None
        self._explained: BaseException | None = None
        self._rounds, self._done = 0, False
        self._decided, self._leaving, self._out = threading.Event(), threading.Event(), threading.Event()
        self._silence = Silence(longest_look=2 * self.interval)

    def __enter__(self) -> "PeerWatch":
        if self.groups.world_size == 1:
            return self
        # Rank 0 is followed by all of its machine: its end may take the store away, and a verdict with it.
        self._followed = {0, self._neighbour()} - {self.groups.rank}
        self._watched = range(self.groups.world_size) if self.groups.is_main else sorted(self._followed)
        self._ends = ProcessEnds()
        self._board = Board(f"peer_watch/{next(_numbers)}", self.timeout)
        self._board.prepare([self.groups.rank, *self._watched])
        self._board.post(self._heartbeat())
        self._threads = [
            threading.Thread(target=self._exchange_heartbeats, name="peer watch: heartbeats", daemon=True),
            threading.Thread(target=self._guard, name="peer watch: guard", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.groups.world_size == 1:
            return
        try:
            if error is not None:
                self._explain(error)
        finally:
            self._done = error is None
            self._out.set()
            self._ends.wake()
            for thread in self._threads:
                thread.join(5 * self.interval)  # a silent store may hold its thread; it must not hold the process
            if not any(thread.is_alive() for thread in self._threads):
                self._ends.close()

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turns the failure of a collective into `RankLost` at the end of a part of the block.

        The block does so at its own end; this is for what must still be in force while the verdict is waited for.
        """
        try:
            yield
        except BaseException as error:
            if self.groups.world_size > 1:
                self._explain(error)
            raise

    def report(self, text: str, code: ExitCode) -> None:
        """Ends the job with this line and exit code on every rank; from any thread."""
        self._accuse(f"{self._heartbeat().name}: {text}", code)

    # ---- the main thread, on its way out ----------------------------------------------------------------------------

    def _explain(self, error: BaseException) -> None:
        """Tells the others of an error of this rank's own; raises `RankLost` from one that a lost rank caused."""
        if error is self._explained or isinstance(error, RankLost):
            return
        self._explained = error
        self._leaving.set()
        # A broken collective tells that a rank is gone, not which: the verdict comes from whoever knows.
        lost = _is_of_a_collective(error) and self._decided.wait(self.timeout + 5 * self.interval)
        if not lost:
            # What would fail again on this rank would so on any: all of them end with its exit code.
            code = getattr(error, "exit_code", ExitCode.RANK_LOST)
            self._accuse(
                f"{self._heartbeat().name} failed {self._when()}: {_one_line(error)}",
                ExitCode.RANK_LOST if code.is_worth_another_try else code,
            )
            self._decided.wait(5 * self.interval)
        # Time for the others to read the verdict: the store may end with this process's launcher.
        time.sleep(2 * self.interval)
        if lost:
            raise self._rank_lost() from error

    # ---- the heartbeat thread ---------------------------------------------------------------------------------------

    def _exchange_heartbeats(self) -> None:
        last = False
        try:
            while not last:
                last = self._out.is_set()
                self._board.post(self._heartbeat())
                verdict, beats = self._board.read(self._watched)
                self._rounds += 1
                if verdict is None:
                    self._look_for_lost_ranks(beats)
                    verdict = self._board.judge(self._accusation) if self._accusation is not None else None
                if verdict is not None:
                    self._decide(verdict)
                if not last:
                    # Soon again at the start, while ranks arrive: one that was never heard of cannot be named.
                    self._ends.wait(self.interval if self._heard_of_all() else self.interval / 10)
        except RuntimeError as error:  # what the store's client raises
            self._decide(f"{ExitCode.RANK_LOST:d} {self._store_lost(_one_line(error))}")

    def _look_for_lost_ranks(self, beats: dict[int, bytes]) -> None:
        self._silence.count(beats)
        for rank in self._followed:
            beat = self._silence.last(rank)
            if beat is not None:
                self._ends.follow(beat)
        for rank in self._ends.ended():
            _, newest = self._board.read([rank])  # again: it may have been done, and ended, since
            beat = Heartbeat.read(newest[rank])
            if beat is not None and not beat.done:  # it was followed from its first heartbeat on
                self._accuse(self._died(beat))
        for beat in self._silence.longer_than(self.timeout):
            self._accuse(
                f"{beat.name} has not been heard of for {self.timeout:g} s, {self._when()}: {beat.host} is down or out "
                "of reach, or the process is stopped"
            )

    def _heard_of_all(self) -> bool:
        return all(self._silence.last(rank) is not None for rank in self._followed)

    def _store_lost(self, reason: str) -> str:
        main = self._silence.last(0)
        # A process that is killed loses its connections a moment before it has ended.
        if main is not None and 0 in self._ends.ended(within=self.interval):
            return self._died(main)
        return (
            f"{main.name if main is not None else 'rank 0'}, its machine or its launcher is lost {self._when()}: "
            f"the job's store on {os.environ.get('MASTER_ADDR', 'that machine')} is gone ({reason})"
        )

    # ---- the guard thread -------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        rounds, unanswered, decided = 0, 0.0, 0.0
        while not self._out.wait(self.interval):
            unanswered = unanswered + self.interval if self._rounds == rounds else 0.0
            rounds = self._rounds
            if unanswered > self.timeout:
                self._decide(f"{ExitCode.RANK_LOST:d} {self._store_lost(f'no answer for {self.timeout:g} s')}")
            if self._decided.is_set():
                decided += self.interval
                # A main thread that runs leaves the block by itself; one that waits inside a collective never does.
                if decided >= (LEAVE_SECONDS if self._leaving.is_set() else 5 * self.interval):
                    if self._code == ExitCode.HUNG:
                        self._before_hung_end()
                    _end_process(self._message(), self._code)

    # ---- what they share --------------------------------------------------------------------------------------------

    def _neighbour(self) -> int:
        """The next rank on this machine: every rank is followed by one that sees its process."""
        rank, size = self.groups.rank, self.groups.world_size
        local = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return (rank - local + (local + 1) % local_size) % size

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            rank=self.groups.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            machine=this_machine(),
            step=self.step,
            done=self._done,
            count=self._rounds,
        )

    def _when(self) -> str:
        # This rank's step: the ranks step together, and the lost one's last heartbeat may be some steps old.
        return f"in step {self.step}" if self.step else "before the first step"

    def _died(self, beat: Heartbeat) -> str:
        return f"{beat.name} died {self._when()}: killed, out of memory or crashed; see the kernel's log on {beat.host}"

    def _accuse(self, text: str, code: ExitCode = ExitCode.RANK_LOST) -> None:
        """Has the heartbeat thread propose this verdict, unless there is another already."""
        if self._accusation is None:
            self._accusation = f"{code:d} {text}"
            self._ends.wake()

    def _decide(self, verdict: str) -> None:
        """`verdict`: exit code and text."""
        if self._verdict is None:
            code, _, self._verdict = verdict.partition(" ")
            self._code = ExitCode(int(code))
            self._decided.set()

    def _rank_lost(self) -> RankLost:
        error = RankLost(self._message())
        error.exit_code = self._code
        return error

    def _message(self) -> str:
        if not self._code.is_worth_another_try:
            return f"{self._verdict}; this job ends: started again, it would fail again"
        return f"{self._verdict}; this job ends: started again, it resumes from its newest checkpoint"


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Whether gloo, nccl or the store is at the bottom of it: torch has no one class for the errors of collectives."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and re.search(r"gloo|nccl", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _end_process(message: str, code: ExitCode) -> None:
    """Prints one line and ends the process as `RankLost` would, whatever its other threads are doing."""
    print(f"cola: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
