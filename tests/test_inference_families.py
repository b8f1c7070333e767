"""What stands above a session knows no family: an autoregressive toy, one token at a time and without latents."""

from collections.abc import Iterator, Sequence

import pytest

from cola_megatron.inference import text_generation
from cola_megatron.inference.protocol import Piece, Request, TokenBlock
from cola_megatron.inference.settings import CommonSettings


class Alphabet:
    """Continues a prompt with the bytes that follow its last one."""

    def __init__(self, requests: Sequence[Request], settings: CommonSettings):
        self.next: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.settings, self.passes = settings, 0
        self.admit(requests)

    def admit(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests, len(self.next)):
            self.next[index] = request.token_ids[-1]
            new = self.settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            self.left[index] = new

    @property
    def running(self) -> list[int]:
        return list(self.left)

    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenBlock]:
        for index in self.running:
            self.passes += 1
            self.next[index] += 1
            self.left[index] -= 1
            last = self.left[index] == 0
            if last:
                self.drop([index])
            yield TokenBlock(index, [self.next[index]], repeated=0, last=last)

    def drop(self, samples: Sequence[int]) -> None:
        for index in samples:
            del self.left[index]


def requests(*prompts: str, **options) -> list[Request]:
    return [Request(list(prompt.encode()), index, **options) for index, prompt in enumerate(prompts)]


def run(prompts: list[Request], sessions: list[Alphabet] | None = None, batch_size: int | None = None, **options):
    settings, sessions = CommonSettings(**options), [] if sessions is None else sessions

    def start(batch: Sequence[Request]) -> Alphabet:
        sessions.append(Alphabet(batch, settings))
        return sessions[-1]

    def decode(token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")

    return text_generation.stream(start, prompts, decode, settings, batch_size)


def test_texts_come_back_in_the_order_of_the_prompts_whatever_the_batches():
    prompts = requests("xyzA", "M", "aa", "cde")
    for batch_size in (None, 1, 2, 3):
        found = text_generation.collect(run(prompts, batch_size=batch_size, max_new_tokens=4), 4)
        assert [generation.text for generation in found] == ["BCDE", "NOPQ", "bcde", "fghi"]
        assert {generation.finish_reason for generation in found} == {"length"}
        assert found[0].latents is None and found[0].token_ids.tolist() == list(b"BCDE")


def test_samples_that_ended_cost_nothing_more():
    sessions: list[Alphabet] = []
    found = text_generation.collect(
        run(requests("A", "a"), sessions, max_new_tokens=9, stop="DE", end_of_text=ord("d")), 2
    )
    assert [(generation.text, generation.finish_reason) for generation in found] == [
        ("BC", "stop"),
        ("bc", "end_of_text"),
    ]
    assert sessions[0].passes == 4 + 3


def test_a_request_takes_the_place_of_a_sample_that_ended():
    sessions: list[Alphabet] = []
    prompts = [
        Request(list(letter), index, new) for index, (letter, new) in enumerate([(b"A", 6), (b"a", 2), (b"J", 9)])
    ]
    pieces = list(run(prompts, sessions, batch_size=2, stop="O"))
    assert len(sessions) == 1 and sessions[0].passes == 6 + 2 + 5
    # The longest begin first; the last one follows the one that its stop text ended.
    assert [piece.sample for piece in pieces] == [2, 0] * 5 + [0, 1, 1]


def test_finished_samples_are_there_before_the_others():
    prompts = [Request(list(b"A"), 0, 5), Request(list(b"a"), 1, 2)]
    order = [index for index, _ in text_generation.finished(run(prompts), 2)]
    assert order == [1, 0]


@pytest.mark.parametrize("length", [1, 3])
def test_pieces_follow_each_token(length):
    pieces = list(run(requests("A"), max_new_tokens=length, stop="CX"))
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert [piece.text for piece in pieces] == (["B"] if length == 1 else ["B", "", "CD"])
    assert [piece.finish_reason for piece in pieces] == [None] * (length - 1) + ["length"]
