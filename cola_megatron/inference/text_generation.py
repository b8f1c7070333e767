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

    Args:
        start: begins a batch.
        decode: token ids -> text. A continuation is what the prompt's tokens and its own have beyond the prompt's.
        batch_size: samples under way at once; None: all. With fewer than all, prompts of like length go together.
    """
    order = list(range(len(requests)))
    if batch_size is not None and batch_size < len(requests):
        order.sort(key=lambda index: len(requests[index].token_ids))
    for first in range(0, len(order), batch_size or max(1, len(order))):
        members = order[first : first + batch_size] if batch_size else order
        yield from _stream_batch(
            start([requests[index] for index in members]),
            members,
            [following(decode, requests[index].token_ids) for index in members],
            settings,
            preview_steps,
        )


def _stream_batch(
    session: Session,
    members: list[int],
    decodes: Sequence[Decode],
    settings: CommonSettings,
    preview_steps: Sequence[int],
) -> Iterator[Piece | Preview]:
    texts = [TextStream(decode, settings.stop, settings.end_of_text) for decode in decodes]
    while session.running:
        for event in session.advance(preview_steps):
            text, index = texts[event.sample], members[event.sample]
            if isinstance(event, TokenPreview):
                yield Preview(index, event.step, event.time, text.preview(event.token_ids[event.repeated :]))
                continue
            piece = text.add(event.token_ids[event.repeated :])
            if event.last and text.finish_reason is None:
                piece += text.end()
            yield Piece(index, piece, event.token_ids, event.latents, event.repeated, text.finish_reason)
        session.drop([sample for sample in session.running if texts[sample].finish_reason is not None])


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
