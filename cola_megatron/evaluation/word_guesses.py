"""What a last word is worth without a model: guesses by counting, for a score to be held against."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cola_megatron.evaluation.passages import Passage, PassageRule, Piece, pairs, words_of
from cola_megatron.evaluation.scoring import normalize


@dataclass(frozen=True)
class Counts:
    """Counts over training text of the words that could be a target."""

    words: Counter[str]
    after: dict[str, Counter[str]]
    """By the word before, for those words that stand before a target."""

    @property
    def most_frequent(self) -> str:
        """Of all words; empty: there is none."""
        return _most_frequent(self.words)

    def most_frequent_after(self, context: str) -> str:
        """After the last word of a context; where it was never seen, of all words."""
        return _most_frequent(self.after.get(_last_word(context), Counter())) or self.most_frequent


def count(training: Iterable[Piece], items: Sequence[Passage], rule: PassageRule) -> Counts:
    """Counts words of the training text, and pairs of words that the items ask about."""
    asked = {_last_word(passage.context) for passage in items}
    words: Counter[str] = Counter()
    after: dict[str, Counter[str]] = defaultdict(Counter)
    for piece in training:
        for before, word in pairs(words_of(piece, rule.letters)):
            words[word] += 1
            if before in asked:
                after[before][word] += 1
    return Counts(words, dict(after))


def guesses(passage: Passage, rule: PassageRule, counts: Counts | None) -> dict[str, str]:
    """What each of the guessers says, normalised, by their names; without counts those that need none."""
    found = {"most_frequent_of_context": _most_frequent_of_context(passage, rule)}
    if counts is not None:
        found["most_frequent_word"] = counts.most_frequent
        found["bigram"] = counts.most_frequent_after(passage.context)
    return found


def _most_frequent_of_context(passage: Passage, rule: PassageRule) -> str:
    """The latest of those that are as frequent."""
    words = words_of(Piece(passage.context, True, True), rule.letters)
    found = [normalize(word.letters) for word in reversed(words) if word.letters is not None]
    return _most_frequent(Counter(found))


def _last_word(context: str) -> str:
    return normalize(context.split()[-1])


def _most_frequent(words: Counter[str]) -> str:
    return max(words, key=words.__getitem__, default="")
