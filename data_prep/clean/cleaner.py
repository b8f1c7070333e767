"""All rules of a recipe, applied to one document after the other."""

from __future__ import annotations

from collections.abc import Callable

from data_prep.clean.rules import LanguageRule, LengthRule, LineRule, Removed, Rule, UnicodeRule, URLRule
from data_prep.clean.settings import CleaningSettings
from data_prep.documents import Document
from data_prep.packages import require

__all__ = ["Cleaner"]


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
        """The document as it is kept, or why it is not. One without a visible character is `empty`."""
        if _is_empty(document.text):
            return Removed("empty")
        for name, rule in self._rules:
            result = rule(document)
            if isinstance(result, Removed):
                return result
            if result is not document and _is_empty(result.text):
                return Removed(f"{name}/empty")
            document = result
        return document


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


def _published_rules(settings: CleaningSettings) -> dict[str, Rule]:
    sections = ("c4", "fineweb", "gopher_quality", "gopher_repetition")
    wanted = [section for section in sections if getattr(settings, section) is not None]
    if not wanted:
        return {}
    for package in ("spacy", "datatrove.pipeline.filters"):
        require(package, f"cleaning.{wanted[0]} works with it")
    from data_prep.clean.published import RepetitionRule, c4_rule, fineweb_rule, gopher_quality_rule
    from data_prep.clean.words import word_tokenizer

    words = word_tokenizer(settings.word_language)
    makers: tuple[Callable[..., Rule], ...] = (c4_rule, fineweb_rule, gopher_quality_rule, RepetitionRule)
    maker_of = dict(zip(sections, makers, strict=True))
    return {section: maker_of[section](getattr(settings, section), words) for section in wanted}
