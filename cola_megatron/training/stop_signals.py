"""Ending a run in good order when the machine is wanted for something else."""

import signal
import threading
from collections.abc import Sequence

from cola_megatron.parallel import RankLost

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """SIGTERM and SIGUSR1 (pre-emption, time limit), Ctrl-C and SIGHUP (the terminal is gone) end the run after the
    step in hand, having saved.

    A second Ctrl-C interrupts at once. A signal that is ignored already, as SIGHUP is under nohup, stays so; in another
    thread than the main one, where Python handles none, the handlers of the process stay. It is a `Participant` of
    `StepConsensus`: one that was signalled stops all of them at the same step.
    """

    def __init__(self):
        self.received = self._requested = False

    def __enter__(self) -> "StopSignals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, RankLost):
            return  # the launcher's SIGTERM, on its way, must not take the process away before its last words
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def flags(self) -> Sequence[bool]:
        """Whether this rank was signalled."""
        return (self.received,)

    def on_consensus(self, raised: Sequence[bool]) -> None:
        """Whether any rank was."""
        (self._requested,) = raised

    def requested(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self._requested


def leave_stopping_to_the_main_process(worker: int) -> None:
    """For loader workers: a signal to the whole process group must not take them away before the last step ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
