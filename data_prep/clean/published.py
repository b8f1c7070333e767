"""The published rule sets: Gopher's quality rules, C4 and FineWeb by datatrove, Gopher's repetition rules by ours.

Imports packages of the extra `prep`: to be imported after `require` has found them.
"""

from __future__ import annotations

from dataclasses import replace

from datatrove.data import Document as LibraryDocument
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import END_PUNCTUATION
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

from data_prep.clean.repetition import repetition_rule
from data_prep.clean.rules import Removed
from data_prep.clean.settings import C4Settings, FineWebSettings, GopherQualitySettings, GopherRepetitionSettings
from data_prep.clean.words import FewSentences
from data_prep.documents import Document

__all__ = ["C4Rule", "LibraryRule", "RepetitionRule", "fineweb_rule", "gopher_quality_rule"]

# datatrove's word for "off".
_OFF = -1


class LibraryRule:
    """A filter of datatrove, asked about one document at a time."""

    def __init__(self, section: str, library_filter: BaseFilter, names: dict[str, str]) -> None:
        """
        Args:
            section: what the names of the rules begin with.
            library_filter: the filter.
            names: the library's reasons and our names of these rules.
        """
        self._section = section
        self._filter = library_filter
        self._names = names

    def __call__(self, document: Document) -> Document | Removed:
        examined = LibraryDocument(text=self._examined(document.text), id=document.place)
        verdict = self._filter.filter(examined)
        if verdict is True:
            return document if examined.text == document.text else replace(document, text=examined.text)
        reason = verdict[1]
        return Removed(f"{self._section}/{self._names.get(reason, reason)}")

    def _examined(self, text: str) -> str:
        """What the filter has to see of a text."""
        return text


class C4Rule(LibraryRule):
    """C4: drops lines, and removes documents.

    Sentences are looked for until there are enough, and lines that end without a full stop are not shown to the filter.
    """

    def __init__(self, settings: C4Settings, words: WordTokenizer) -> None:
        self._sentences = FewSentences(words, settings.minimum_sentences or 0)
        self._ends = settings.terminal_punctuation
        super().__init__("c4", _c4_filter(settings, self._sentences), {"too_few_sentences": "few_sentences"})

    def __call__(self, document: Document) -> Document | Removed:
        self._sentences.restart()
        return super().__call__(document)

    def _examined(self, text: str) -> str:
        """Without lines that the filter drops whatever else they have: it asks the end before it removes a document."""
        if not self._ends:
            return text
        # Behind a citation, which the filter may take away, there may be a full stop.
        return "\n".join(
            line for line in text.splitlines() if (bare := line.rstrip()).endswith(END_PUNCTUATION) or bare[-1:] == "]"
        )


class _C4Filter(C4QualityFilter):
    """The filter without its counters of lines, which nobody reads here and which take a third of its time."""

    def stat_update(self, *labels: str, value: int = 1, unit: str | None = None) -> None:
        """Counts nothing."""


def _c4_filter(settings: C4Settings, words: WordTokenizer) -> C4QualityFilter:
    return _C4Filter(
        remove_citations=settings.citations,
        filter_no_terminal_punct=settings.terminal_punctuation,
        min_num_sentences=settings.minimum_sentences or _OFF,
        min_words_per_line=settings.minimum_words_per_line or _OFF,
        max_word_length=settings.longest_word or _OFF,
        filter_lorem_ipsum=settings.lorem_ipsum,
        filter_javascript=settings.javascript,
        filter_curly_bracket=settings.curly_bracket,
        filter_policy=settings.policy,
        language=words,
    )


def fineweb_rule(settings: FineWebSettings, words: WordTokenizer) -> LibraryRule:
    """FineWeb's own quality rules."""
    return LibraryRule(
        "fineweb",
        FineWebQualityFilter(
            line_punct_thr=settings.minimum_punctuated_lines,
            short_line_thr=settings.maximum_short_lines,
            short_line_length=settings.short_line,
            char_duplicates_ratio=settings.maximum_duplicate_line_characters,
            new_line_ratio=settings.maximum_line_breaks_per_word,
            language=words,
        ),
        {
            "line_punct_ratio": "punctuated_lines",
            "short_line_ratio": "short_lines",
            "char_dup_ratio": "duplicate_lines",
            "list_ratio": "line_breaks",
        },
    )


def gopher_quality_rule(settings: GopherQualitySettings, words: WordTokenizer) -> LibraryRule:
    """Gopher's quality rules."""
    return LibraryRule(
        "gopher_quality",
        GopherQualityFilter(
            # A document without a word has no mean length of words.
            min_doc_words=settings.minimum_words or 1,
            max_doc_words=settings.maximum_words,
            min_avg_word_length=settings.minimum_mean_word_length,
            max_avg_word_length=settings.maximum_mean_word_length,
            max_symbol_word_ratio=settings.maximum_symbol_word_ratio,
            max_bullet_lines_ratio=settings.maximum_bullet_lines,
            max_ellipsis_lines_ratio=settings.maximum_ellipsis_lines,
            max_non_alpha_words_ratio=settings.minimum_alphabetic_words,
            min_stop_words=settings.minimum_stop_words,
            stop_words=settings.stop_words,
            language=words,
        ),
        {
            "gopher_short_doc": "short_document",
            "gopher_long_doc": "long_document",
            "gopher_below_avg_threshold": "short_words",
            "gopher_above_avg_threshold": "long_words",
            "gopher_too_many_hashes": "hash_signs",
            "gopher_too_many_ellipsis": "ellipses",
            "gopher_too_many_bullets": "bullet_lines",
            "gopher_too_many_end_ellipsis": "ellipsis_lines",
            "gopher_below_alpha_threshold": "alphabetic_words",
            "gopher_enough_stop_words": "stop_words",
        },
    )


class RepetitionRule:
    """Gopher's repetition rules."""

    def __init__(self, settings: GopherRepetitionSettings, words: WordTokenizer) -> None:
        self._settings = settings
        self._words = words

    def __call__(self, document: Document) -> Document | Removed:
        # datatrove's function remembers the words of the last texts, which its filters have asked for before.
        broken = repetition_rule(document.text, split_into_words(document.text, self._words), self._settings)
        return document if broken is None else Removed(f"gopher_repetition/{broken[0]}", f"{broken[1]:.3f}")
