"""Places that are given to the next request, against batches that wait for their last sample.

Requests of mixed lengths, of prompts and of continuations, as they come. Part of `tools/bench_inference.py`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cola_megatron.inference import text_generation
from cola_megatron.inference.protocol import Piece, Preview, Request, Session, TokenBlock, TokenPreview
from cola_megatron.inference.settings import CommonSettings

Start = Callable[[Sequence[Request]], Session]


@dataclass(frozen=True)
class Work:
    """The requests of a comparison."""

    places: int
    """Samples under way at once."""
    requests: int
    prompt_tokens: int
    """Of the longest prompt; the lengths are spread evenly below it."""
    new_tokens: int
    """Of the longest continuation; lengths fall off exponentially, a quarter of it on average."""
    vocab_size: int

    def draw(self) -> list[Request]:
        """Alike in every run."""
        chooser, found = random.Random(66), []
        for index in range(self.requests):
            prompt = [chooser.randrange(self.vocab_size) for _ in range(chooser.randint(1, self.prompt_tokens))]
            new = min(self.new_tokens, 1 + int(chooser.expovariate(4 / self.new_tokens)))
            found.append(Request(prompt, index, new))
        return found


@dataclass(frozen=True)
class Slots:
    """What the same requests take in both ways; seconds are medians, the two ways alternate."""

    family: str
    work: Work
    tokens: int
    passes: int
    """Blocks of the batch, or tokens where a block is one, when places are given on."""
    passes_of_batches: int
    seconds: float
    seconds_of_batches: float
    same_tokens: bool


COLUMNS = (
    f"{'family':>15}{'places':>8}{'requests':>10}{'tokens':>8}{'passes':>8}{'in batches':>12}"
    f"{'seconds':>9}{'in batches':>12}{'ratio':>7}  same tokens"
)


def as_row(found: Slots) -> str:
    """A line of the table under `COLUMNS`."""
    work, ratio = found.work, found.seconds_of_batches / found.seconds
    return (
        f"{found.family:>15}{work.places:>8}{work.requests:>10}{found.tokens:>8}{found.passes:>8}"
        f"{found.passes_of_batches:>12}{found.seconds:>9.2f}{found.seconds_of_batches:>12.2f}{ratio:>7.2f}"
        f"  {found.same_tokens}"
    )


class _Counted:
    """A session that counts its passes."""

    def __init__(self, session: Session):
        self.session, self.passes = session, 0

    @property
    def running(self) -> Sequence[int]:
        return self.session.running

    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        self.passes += 1
        return self.session.advance(preview_steps)

    def drop(self, samples: Sequence[int]) -> None:
        self.session.drop(samples)

    def admit(self, requests: Sequence[Request]) -> None:
        self.session.admit(requests)


def compare(
    family: str,
    start: Start,
    settings: CommonSettings,
    work: Work,
    repeats: int,
    now: Callable[[], float],
) -> Slots:
    """Both ways of the same requests.

    Args:
        start: begins a session.
        now: the clock, in seconds.
    """
    requests = work.draw()
    sessions: list[_Counted] = []

    def counted(batch: Sequence[Request]) -> Session:
        sessions.append(_Counted(start(batch)))
        return sessions[-1]

    def in_places() -> Iterator[tuple[int, Piece | Preview]]:
        for piece in text_generation.stream(counted, requests, lambda ids: "", settings, work.places):
            yield piece.sample, piece

    def in_batches() -> Iterator[tuple[int, Piece | Preview]]:
        by_length = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
        for first in range(0, len(by_length), work.places):
            members = by_length[first : first + work.places]
            batch = [requests[index] for index in members]
            for piece in text_generation.stream(counted, batch, lambda ids: "", settings):
                yield members[piece.sample], piece

    passes: list[int] = []
    tokens: list[list[list[int]]] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for way, taken in zip((in_places, in_batches), seconds, strict=True):
            sessions.clear()
            written: list[list[int]] = [[] for _ in requests]
            began = now()
            for index, piece in way():
                assert isinstance(piece, Piece), "no previews are asked for"
                written[index] += piece.token_ids
            taken.append(now() - began)
            if repeat == 0:  # which also warms up
                passes.append(sum(session.passes for session in sessions))
                tokens.append(written)
                taken.clear()
    return Slots(
        family,
        work,
        sum(map(len, tokens[0])),
        passes[0],
        passes[1],
        statistics.median(seconds[0]),
        statistics.median(seconds[1]),
        tokens[0] == tokens[1],
    )
