"""The published post-processing and matching: one function per rule.

A generation is cut (`cut_generation`), its answer is read, and answer and truth are compared. Nothing is trimmed at an
end-of-text token and articles ("the") count, as in the published verdicts.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a rule read from a generation, and whether that is right."""

    answer: str
    """The normalised answer; an option's letter where an option was recognised."""
    correct: bool


Rule = Callable[[str, str, Sequence[str]], Verdict]
"""(cut generation, truth, options) -> verdict; options are empty where the task has none."""

# An option counts as meant when the answer resembles it at least this much (difflib's ratio).
SIMILAR_ENOUGH = 0.9
# Letters in brackets are only looked for in answers this short: longer ones may quote them.
SHORT_ANSWER = 40
LETTERS = 26

_IS = r"\s*(?:is|=|:|\uff1a)?\s*"  # the last is the full-width colon
_AFTER_ANSWER = re.compile(rf"\banswer\b{_IS}(.+)$", re.IGNORECASE)
_LONE_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\.?")
_ANNOUNCED_LETTER = re.compile(
    rf"\b(?:answer|option|choice)\b{_IS}[(\[]?\s*([A-Za-z])\s*[)\]]?(?=\s|$|[.,;:!?])", re.IGNORECASE
)
_BRACKETED_LETTER = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
_ANNOUNCEMENT = re.compile(rf"^(?:the\s+)?(?:correct\s+)?(?:final\s+)?(?:answer|option|choice)\b{_IS}", re.IGNORECASE)


def cut_generation(text: str) -> str:
    """Everything before the first newline that follows a word character."""
    word = re.search(r"\w", text)
    end = text.find("\n", word.end()) if word else -1
    return text if end < 0 else text[:end]


def normalize(text: str) -> str:
    """Lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def match_text(generation: str, truth: str, options: Sequence[str] = ()) -> Verdict:
    """The whole answer equals the truth, both normalised."""
    answer = normalize(generation)
    return Verdict(answer, answer == normalize(truth))


def match_first_word(generation: str, truth: str, options: Sequence[str] = ()) -> Verdict:
    """The first words agree, both normalised (LAMBADA asks for one word)."""
    answer = _first_word(generation)
    return Verdict(answer, answer == _first_word(truth))


def match_option(generation: str, truth: str, options: Sequence[str]) -> Verdict:
    """Answer and truth name the same option, by letter or by text; or they are the same text, normalised."""
    chosen = _answered_option(generation, options)
    wanted = _named_option(truth, options)
    by_text = match_text(generation, truth)
    if chosen is None:
        return by_text
    letter = chr(ord("A") + chosen) if chosen < LETTERS else str(chosen + 1)
    return Verdict(letter, chosen == wanted or by_text.correct)


def score(rule: Rule, generation: str, truths: Sequence[str], options: Sequence[str] = ()) -> Verdict:
    """The verdict on a raw generation; any of the truths will do."""
    cut = cut_generation(generation)
    verdicts = [rule(cut, truth, options) for truth in truths]
    return next((verdict for verdict in verdicts if verdict.correct), verdicts[0])


def _first_word(text: str) -> str:
    return next(iter(normalize(text).split()), "")


def _answered_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that an answer names: first in what follows the word "answer", then anywhere."""
    found = _named_option(_after_answer(text), options)
    return _named_option(text, options) if found is None else found


def _after_answer(text: str) -> str:
    """What follows "answer", "answer is" or "answer:" on the last line that has it; else the whole text."""
    text = text.strip()
    for line in reversed(text.splitlines()):
        announced = _AFTER_ANSWER.search(line.strip())
        if announced and announced[1].strip():
            return announced[1].strip()
    return text


def _named_option(text: str, options: Sequence[str]) -> int | None:
    found = _lettered_option(text, min(len(options), LETTERS))
    return _worded_option(text, options) if found is None else found


def _lettered_option(text: str, count: int) -> int | None:
    """Index of the letter that is the whole text, else was announced ("option B"), else stands in brackets.

    A letter beyond the `count` options is passed over.
    """
    text = text.strip()
    alone = _LONE_LETTER.fullmatch(text)
    bracketed = _BRACKETED_LETTER.findall(text) if len(text) <= SHORT_ANSWER else []
    for letters in ([alone[1]] if alone else [], _ANNOUNCED_LETTER.findall(text), bracketed):
        if letters:
            index = ord(letters[-1].upper()) - ord("A")
            if index < count:
                return index
    return None


def _worded_option(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that the text equals, else contains as the only one, else resembles most and enough."""
    plain = [normalize(option) for option in options]
    stated = normalize(_ANNOUNCEMENT.sub("", text))
    for wording in (normalize(text), stated):
        if not wording:
            return None
        if wording in plain:
            return plain.index(wording)
    contained = [index for index, option in enumerate(plain) if option and option in stated]
    if len(contained) == 1:
        return contained[0]
    # The order of the arguments matters: difflib's ratio is not symmetric.
    ratios = [difflib.SequenceMatcher(None, stated, option).ratio() for option in plain]
    best = max(range(len(ratios)), key=ratios.__getitem__, default=None)
    return best if best is not None and ratios[best] >= SIMILAR_ENOUGH else None
