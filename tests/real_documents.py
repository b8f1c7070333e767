"""Real English text of every machine, in pieces of many lengths."""

import random
from functools import cache

from data_prep import embedded_corpus


@cache
def real_documents(count: int) -> list[str]:
    """So many different pieces of 200 to 2,000 characters from the documentation of Python, always the same ones."""
    chooser = random.Random(0)
    pieces: dict[str, None] = {}
    for text in embedded_corpus.collect():
        start = 0
        while len(text) - start >= 200:
            end = start + chooser.randrange(200, 2000)
            pieces[text[start:end]] = None
            start = end
        if len(pieces) >= count:
            return list(pieces)[:count]
    raise AssertionError(f"the documentation of Python gives only {len(pieces)} pieces")
