"""All rules of a recipe, applied to one document after the other."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable

from data_prep.clean.limit import TooSlow, limited
from data_prep.clean.rules import LanguageRule, LengthRule, LineRule, Removed, Rule, UnicodeRule, URLRule
from data_prep.clean.settings import CleaningSettings
from data_prep.documents import Document
from data_prep.packages import require

__all__ = ["Cleaner"]

# Python's normalisation takes a time that is quadratic in such a run. Decorated letters have at most some dozens.
MOST_MARKS = 256
_MARKS = frozenset(filter(unicodedata.combining, map(chr, range(sys.maxunicode))))
_MANY_MARKS = re.compile(f"[{re.escape(''.join(sorted(_MARKS)))}]{{{MOST_MARKS + 1},}}")


class Cleaner:
    """Cleans documents, one at a time; the same document always has the same result.

    The order of the rules is fixed: the URL, which costs nothing; repair of characters; the language; rules that
    drop lines (own, then C4); then rules that judge what is left: its length, FineWeb, Gopher's quality, Gopher's
    repetition. So thresholds hold for the text that is kept. (FineWeb's own pipeline asks Gopher's rules before C4.)

    Can be pickled: the copy is built anew from the settings. Nothing is ever downloaded.
    """

    def __init__(self, settings: CleaningSettings) -> None:
        """
        Args:
            settings: the rules.

        Raises:
            DataPrepError: a package, the language model or a file of blocked domains is missing; says the cure.
        """
        self._settings = settings
        self._rules = _rules(settings)

    def __reduce__(self) -> tuple[type[Cleaner], tuple[CleaningSettings]]:
        return Cleaner, (self._settings,)

    def __call__(self, document: Document) -> Document | Removed:
        """The document as it is kept, or why it is not.

        One without a visible character is `empty`; one with many marks on one letter, which normalising would sort for
        minutes, has `combining_marks`; one that the rules take longer for than any sound one needs is `too_slow`.
        """
        try:
            with limited(len(document.text)):
                return self._cleaned(document)
        except TooSlow:
            self._rules = _rules_anew(self._settings)
            return Removed("too_slow", f"{len(document.text):,} characters")

    def _cleaned(self, document: Document) -> Document | Removed:
        if _is_empty(document.text):
            return Removed("empty")
        if _has_many_marks(document.text):
            return Removed("combining_marks")
        for name, rule in self._rules:
            result = rule(document)
            if isinstance(result, Removed):
                return result
            if result is not document and _is_empty(result.text):
                return Removed(f"{name}/empty")
            document = result
        return document


def _has_many_marks(text: str) -> bool:
    # A run that long has a mark at one of these places.
    return not _MARKS.isdisjoint(text[:: MOST_MARKS + 1]) and _MANY_MARKS.search(text) is not None


def _is_empty(text: str) -> bool:
    return not text or text.isspace()


def _rules(settings: CleaningSettings) -> list[tuple[str, Rule]]:
    """The rules that are on, with the names of their sections."""
    rules: list[tuple[str, Rule]] = []
    if settings.urls is not None:
        rules.append(("urls", URLRule(settings.urls)))
    if settings.unicode is not None:
        rules.append(("unicode", UnicodeRule(settings.unicode)))
    if settings.language is not None:
        rules.append(("language", LanguageRule(settings.language)))
    if settings.lines is not None:
        rules.append(("lines", LineRule(settings.lines)))
    published = _published_rules(settings)
    if "c4" in published:
        rules.append(("c4", published.pop("c4")))
    if settings.length is not None:
        rules.append(("length", LengthRule(settings.length)))
    return rules + list(published.items())


def _rules_anew(settings: CleaningSettings) -> list[tuple[str, Rule]]:
    """As `_rules`, with nothing of what was interrupted at any place, such as a splitter that remembers words."""
    words = sys.modules.get("data_prep.clean.words")  # imported where a rule needs it
    if words is not None:
        words.word_tokenizer.cache_clear()
    return _rules(settings)


def _published_rules(settings: CleaningSettings) -> dict[str, Rule]:
    sections = ("c4", "fineweb", "gopher_quality", "gopher_repetition")
    wanted = [section for section in sections if getattr(settings, section) is not None]
    if not wanted:
        return {}
    for package in ("spacy", "datatrove.pipeline.filters"):
        require(package, f"cleaning.{wanted[0]} works with it")
    from data_prep.clean.published import C4Rule, RepetitionRule, fineweb_rule, gopher_quality_rule
    from data_prep.clean.words import word_tokenizer

    words = word_tokenizer(settings.word_language)
    makers: tuple[Callable[..., Rule], ...] = (C4Rule, fineweb_rule, gopher_quality_rule, RepetitionRule)
    maker_of = dict(zip(sections, makers, strict=True))
    return {section: maker_of[section](getattr(settings, section), words) for section in wanted}
