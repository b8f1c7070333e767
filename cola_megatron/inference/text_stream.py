"""Token ids to text as they come: characters that span tokens, stop texts, end-of-text tokens."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most four bytes, so an unfinished one shows as at most three replacement characters.
UNFINISHED = 3
CONTEXT = 8
"""Tokens that are decoded before a text that follows others: what a decoder makes of the first one goes no further."""


def following(decode: Decode, before: Sequence[int]) -> Decode:
    """Decodes ids that follow others: some tokenizers drop the space of the first token of all (Llama's do).

    A character that begins in `before` and ends in the ids belongs to the ids.
    """
    context = list(before)[-CONTEXT:]
    if not context:
        return decode
    known = decode(context).rstrip(REPLACEMENT)
    return lambda token_ids: decode([*context, *token_ids])[len(known) :] if token_ids else ""


class TextStream:
    """One sample's text.

    `add` answers with text that later tokens can no longer change: the replacement characters at the very end may be
    the beginning of a character, and the end of the text may be the beginning of a stop text.

    Args:
        decode: ids -> text. More ids may change the end of the text only where it is an unfinished character.
        stop: texts that end the sample.
        end_of_text: token ids that end the sample.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), end_of_text: Sequence[int] = ()):
        self.decode, self.stop, self.end_of_text = decode, tuple(stop), frozenset(end_of_text)
        self.token_ids: list[int] = []
        self.text = ""
        """What has been handed out."""
        self.finish_reason: str | None = None

    def add(self, token_ids: Sequence[int]) -> str:
        """Takes the next ids and answers with the newly settled text; `finish_reason` says whether the sample ended."""
        self._require_unfinished()
        kept = list(token_ids)
        ended = next((place for place, token in enumerate(kept) if token in self.end_of_text), None)
        if ended is not None:
            kept = kept[:ended]
        self.token_ids += kept
        text = self.decode(self.token_ids)
        stopped = min((place for place in map(text.find, self.stop) if place >= 0), default=None)
        if stopped is not None:
            return self._finish(text[:stopped], "stop")
        if ended is not None:
            return self._finish(text, "end_of_text")
        return self._hand_out(text[: self._settled(text)])

    def end(self) -> str:
        """No more ids come: the rest of the text."""
        self._require_unfinished()
        return self._finish(self.decode(self.token_ids), "length")

    def preview(self, token_ids: Sequence[int]) -> str:
        """What would follow the text handed out so far, if these ids came next."""
        return self.decode([*self.token_ids, *token_ids])[len(self.text) :]

    def _settled(self, text: str) -> int:
        settled = len(text)
        while settled and len(text) - settled < UNFINISHED and text[settled - 1] == REPLACEMENT:
            settled -= 1
        for stop in self.stop:
            for length in range(min(len(stop) - 1, settled), 0, -1):
                if text.endswith(stop[:length], 0, settled):
                    settled -= length
                    break
        return settled

    def _hand_out(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _finish(self, text: str, reason: str) -> str:
        self.finish_reason = reason
        return self._hand_out(text)

    def _require_unfinished(self) -> None:
        if self.finish_reason is not None:
            raise ValueError(f"this text has ended ({self.finish_reason})")
