"""The word splitter of all rules: datatrove's words, many times faster, as each chunk between spaces is split once.

Imports packages of the extra `prep`: to be imported after `require` has found them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from operator import itemgetter

from datatrove.utils.word_tokenizers import SpaCyTokenizer, WordTokenizer, load_word_tokenizer
from spacy.lang.lex_attrs import is_punct
from spacy.tokenizer import Tokenizer

from data_prep.errors import DataPrepError

__all__ = ["FewSentences", "RememberingTokenizer", "word_tokenizer"]

# Bounds the memory that a task spends on them to about 100 MB.
REMEMBERED_CHUNKS = 2**18
# spaCy's time grows faster than the length of a chunk: 18 s for 10,000 exclamation marks without a space. 1,000 is
# also the longest word that C4 lets pass.
LONGEST_CHUNK = 1000
BLOCK_OF_CHUNKS = 512

_CHUNKS = re.compile(rf"\S{{1,{LONGEST_CHUNK}}}|\s+")
# What a word means for the end of a sentence.
_OTHER, _PUNCTUATION, _TERMINATOR = range(3)


@cache
def word_tokenizer(language: str) -> WordTokenizer:
    """The splitter of a language; datatrove's filters take it as their `language`.

    Args:
        language: a code that datatrove knows, such as "en" or "deu".

    Raises:
        DataPrepError: datatrove has no splitter for it, or the splitter's package is missing.
    """
    try:
        splitter = load_word_tokenizer(language)
        plain = type(splitter) is SpaCyTokenizer and type(splitter.tokenizer.tokenizer) is Tokenizer
    except (ValueError, ImportError) as error:
        raise DataPrepError(f"word_language {language!r} cannot be split: {str(error).splitlines()[0]}") from error
    # Where a word may contain a space (Spanish "EE. UU."), chunks between spaces do not stand by themselves.
    if not plain or any(len(rule.split()) > 1 for rule in splitter.tokenizer.tokenizer.rules):
        return splitter
    return RememberingTokenizer(splitter.language, splitter.config)


class FewSentences(WordTokenizer):
    """Finds the first sentences of a document, for who only asks whether it has a few."""

    def __init__(self, words: WordTokenizer, most: int) -> None:
        super().__init__(words.language)
        self._words, self._most, self._left = words, most, most

    def restart(self) -> None:
        """A new document begins."""
        self._left = self._most

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The sentences of the next line of the document; none where enough were found before."""
        if self._left <= 0:
            return []
        words = self._words
        spans = (
            words.first_spans(text, self._left)
            if isinstance(words, RememberingTokenizer)
            else words.span_tokenize(text)
        )
        self._left -= len(spans)
        return spans

    def word_tokenize(self, text: str) -> list[str]:
        """As the splitter it asks."""
        return self._words.word_tokenize(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """As the splitter it asks."""
        return self._words.sent_tokenize(text)


class RememberingTokenizer(SpaCyTokenizer):
    """Splits like its parent, but asks spaCy once for each distinct chunk between spaces.

    Most chunks of a text have been seen before, and their words do not depend on their neighbours, with two
    exceptions: an emoticon beside brackets (":) )") may be split otherwise by the parent, and a chunk of more than
    `LONGEST_CHUNK` characters is cut before it is split here.
    """

    def __init__(self, language: str, config: dict | None = None) -> None:
        super().__init__(language, config)
        self._words: dict[str, list[str]] = {}
        self._kinds: dict[str, bytes] = {}
        self._terminators = self.tokenizer.get_pipe("sentencizer").punct_chars

    def word_tokenize(self, text: str) -> list[str]:
        """The words and punctuation marks of a text, without whitespace."""
        chunks = text.split()
        if len(text) > LONGEST_CHUNK and max(map(len, chunks), default=0) > LONGEST_CHUNK:
            chunks = [chunk for chunk in _CHUNKS.findall(text) if not chunk.isspace()]
        self._remember(chunks)
        words: list[str] = []
        for chunk in chunks:
            words += self._words[chunk]
        return words

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """First character and end of each sentence: one ends before the first word after a full stop or its like."""
        return self.first_spans(text, sys.maxsize)

    def first_spans(self, text: str, most: int) -> list[tuple[int, int]]:
        """As `span_tokenize`, the first sentences alone: of more than `most` the last one may be cut."""
        starts: list[int] = []
        ends: list[int] = []
        after_terminator = True
        position = end = 0
        for chunk in self._remembered_chunks(text):
            if len(starts) > most:
                break
            if chunk.isspace():
                # One space separates words; more whitespace than that is a word of its own to spaCy.
                skipped = int(position > 0 and chunk[0] == " ")
                words, kinds = ([chunk[skipped:]], b"\0") if len(chunk) > skipped else ([], b"")
                start = position + skipped
            else:
                words, kinds, start = self._words[chunk], self._kinds[chunk], position
            position += len(chunk)
            if not after_terminator and _TERMINATOR not in kinds:
                end = position if words else end
                continue
            for word, kind in zip(words, kinds, strict=True):
                if after_terminator and (kind == _OTHER or not starts):
                    ends += [end] if starts else []
                    starts.append(start)
                    after_terminator = False
                after_terminator |= kind == _TERMINATOR
                start += len(word)
                end = start
        return list(zip(starts, [*ends, end], strict=True)) if starts else []

    def _remembered_chunks(self, text: str) -> Iterator[str]:
        """Chunks between spaces, and the spaces; a block of them is looked up at a time."""
        chunks = map(itemgetter(0), _CHUNKS.finditer(text))
        while block := list(islice(chunks, BLOCK_OF_CHUNKS)):
            self._remember(chunk for chunk in block if not chunk.isspace())
            yield from block

    def _remember(self, chunks: Iterable[str]) -> None:
        if len(self._words) > REMEMBERED_CHUNKS:
            self._words.clear()
            self._kinds.clear()
        unknown = set(chunks).difference(self._words)
        if not unknown:
            return
        split = self.tokenizer.tokenizer
        # spaCy frees the strings of a zone at its end; it would otherwise keep every word it ever saw.
        with self.tokenizer.memory_zone():
            for chunk in unknown:
                words = [word.text for word in split(chunk)]
                self._words[chunk] = words
                self._kinds[chunk] = bytes(map(self._kind, words))

    def _kind(self, word: str) -> int:
        if word in self._terminators:
            return _TERMINATOR
        return _PUNCTUATION if is_punct(word) else _OTHER
