"""What the ranks of a job write into its store to tell each other that they live."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_NOTHING_YET = b"-"  # reading a key that is not there would wait for it


@dataclass(frozen=True)
class Heartbeat:
    """One sign of life of a rank."""

    rank: int
    host: str
    process: int
    machine: str
    """Two ranks with the same value can see each other's processes."""
    step: int
    """The optimiser step in hand, from 1; 0 before the first."""
    done: bool
    """The rank ended well and will not be heard of again."""
    count: int
    """Differs from the heartbeat before, whatever else is the same."""

    @property
    def name(self) -> str:
        """The rank, and where it is to be looked for."""
        return f"rank {self.rank} ({self.host}, process {self.process})"

    @classmethod
    def read(cls, written: bytes) -> "Heartbeat | None":
        """What `Board.post` wrote; None where the rank has not posted yet."""
        return None if written == _NOTHING_YET else cls(**json.loads(written))


class Board:
    """The keys of one watch in the job's store: a heartbeat of each rank, and the verdict.

    Not for two threads at once. All methods raise RuntimeError (torch's store errors) once the store is gone, and wait
    without limit for a store that is there but silent.
    """

    def __init__(self, name: str, timeout: float):
        # A connection of its own: the default store's would wait behind whatever the main thread waits for.
        default: Any = dist.distributed_c10d._get_default_store()  # torch's stubs know no `clone`
        store = default.clone()
        store.set_timeout(timedelta(seconds=timeout))
        self._store = dist.PrefixStore(name, store)

    def prepare(self, ranks: list[int]) -> None:
        """Makes these ranks' heartbeats, and the verdict, readable before they are posted."""
        for key in ["verdict", *map(_key, ranks)]:
            self._store.compare_set(key, "", _NOTHING_YET.decode())

    def post(self, beat: Heartbeat) -> None:
        """Writes a rank's heartbeat; it has arrived when a later `read` returns."""
        self._store.set(_key(beat.rank), json.dumps(asdict(beat)))

    def read(self, ranks: Sequence[int]) -> tuple[str | None, dict[int, bytes]]:
        """The verdict if there is one, and the heartbeats of `ranks` as written, in one request."""
        verdict, *beats = self._store.multi_get(["verdict", *map(_key, ranks)])
        return None if verdict == _NOTHING_YET else verdict.decode(), dict(zip(ranks, beats, strict=True))

    def judge(self, verdict: str) -> str:
        """Proposes a verdict and returns the one that stands: the first."""
        return self._store.compare_set("verdict", _NOTHING_YET.decode(), verdict).decode()


class Silence:
    """For how long each rank has not been heard of.

    Counted between looks, a look never for more than `longest_look` seconds: a process that was held up itself (a
    suspended machine, C++ code that keeps Python's lock) has heard of nobody in that time.
    """

    def __init__(self, longest_look: float):
        self._longest_look, self._looked = longest_look, time.monotonic()
        self._heard: dict[int, tuple[bytes, float]] = {}

    def count(self, beats: dict[int, bytes]) -> None:
        """Takes in what `Board.read` returned."""
        now = time.monotonic()
        since, self._looked = min(now - self._looked, self._longest_look), now
        for rank, written in beats.items():
            before, silent = self._heard.get(rank, (None, 0.0))
            self._heard[rank] = (written, silent + since if written == before else 0.0)

    def last(self, rank: int) -> Heartbeat | None:
        """The newest heartbeat of a rank."""
        written, _ = self._heard.get(rank, (_NOTHING_YET, 0.0))
        return Heartbeat.read(written)

    def seconds(self, rank: int) -> float:
        """How long nothing was heard of a rank."""
        return self._heard[rank][1]

    def longer_than(self, seconds: float) -> list[Heartbeat]:
        """The last heartbeats of the ranks that fell silent without being done, longest silence first."""
        silent = sorted(((-silent, rank) for rank, (_, silent) in self._heard.items() if silent > seconds))
        beats = [self.last(rank) for _, rank in silent]
        return [beat for beat in beats if beat is not None and not beat.done]


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
