"""Text from sessions of token ids: written once for all families of models."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cola_megatron.inference.protocol import Generation, Piece, Preview, Request, Session, TokenPreview
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.inference.text_stream import Decode, TextStream, following


def stream(
    start: Callable[[Sequence[Request]], Session],
    requests: Sequence[Request],
    decode: Decode,
    settings: CommonSettings,
    batch_size: int | None = None,
    preview_steps: Sequence[int] = (),
) -> Iterator[Piece | Preview]:
    """Pieces of all samples as they settle, and previews at some of the solver's steps.

    A request takes the place of a sample that has ended, between two blocks of the others.

    Args:
        start: begins a session.
        decode: token ids -> text. A continuation is what the prompt's tokens and its own have beyond the prompt's.
        batch_size: samples under way at once; None: all. With fewer than all, the longest begin first: what does not
            fit in memory shows at once, and few are left to run alone at the end.
    """
    if not requests:
        return
    order = list(range(len(requests)))
    if batch_size is not None and batch_size < len(requests):
        order.sort(key=lambda index: -_longest(requests[index], settings))
    slots = len(order) if batch_size is None else batch_size
    session, begun = start([requests[index] for index in order[:slots]]), min(slots, len(order))
    texts: dict[int, TextStream] = {}  # of the samples under way: a session counts its samples as `order` does
    while session.running:
        for event in session.advance(preview_steps):
            index = order[event.sample]
            if event.sample not in texts:
                own = following(decode, requests[index].token_ids)
                texts[event.sample] = TextStream(own, settings.stop, settings.end_of_text)
            text = texts[event.sample]
            if isinstance(event, TokenPreview):
                yield Preview(index, event.step, event.time, text.preview(event.token_ids[event.repeated :]))
                continue
            piece = text.add(event.token_ids[event.repeated :])
            if event.last and text.finish_reason is None:
                piece += text.end()
            yield Piece(index, piece, event.token_ids, event.latents, event.repeated, text.finish_reason)
        texts = {sample: text for sample, text in texts.items() if text.finish_reason is None}
        session.drop([sample for sample in session.running if sample not in texts])
        next_ones = order[begun : begun + slots - len(session.running)]
        begun += len(next_ones)
        if next_ones:
            session.admit([requests[index] for index in next_ones])


def _longest(request: Request, settings: CommonSettings) -> int:
    new = settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    return len(request.token_ids) + new


def finished(pieces: Iterable[Piece | Preview], count: int) -> Iterator[tuple[int, Generation]]:
    """Whole continuations from a stream, with the index of their prompt, each as soon as it is complete."""
    parts = [_Parts() for _ in range(count)]
    for piece in pieces:
        if isinstance(piece, Piece):
            parts[piece.sample].take(piece)
            if piece.finish_reason is not None:
                yield piece.sample, parts[piece.sample].joined()


def collect(pieces: Iterable[Piece | Preview], count: int) -> list[Generation]:
    """Whole continuations from a stream, in the order of the prompts."""
    found = dict(finished(pieces, count))
    return [found[index] for index in range(count)]


@dataclass
class _Parts:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    repeated: int = 0
    finish_reason: str | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.repeated += piece.repeated
        self.finish_reason = piece.finish_reason
        if piece.latents is not None:
            self.latents.append(piece.latents)

    def joined(self) -> Generation:
        assert self.finish_reason is not None, "the last piece has one"
        latents = torch.stack(self.latents) if self.latents else None
        return Generation(self.text, torch.tensor(self.token_ids), latents, self.repeated, self.finish_reason)
