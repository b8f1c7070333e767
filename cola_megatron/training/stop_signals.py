"""Ending a run in good order when the machine is wanted for something else."""

import signal
from collections.abc import Sequence

from cola_megatron.parallel import RankLost

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """SIGTERM and SIGUSR1 (pre-emption, time limit) and Ctrl-C end the run after the step in hand, having saved.

    A second Ctrl-C interrupts at once. It is a `Participant` of `StepConsensus`: one that was signalled stops all of
    them at the same step.
    """

    def __init__(self):
        self.received = self._requested = False

    def __enter__(self) -> "StopSignals":
        self.previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
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
