"""Memory that encoding one long document takes, at once and in pieces.

python -m tools.long_document 5 20
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from data_prep.recipe import TokenizerSettings
from data_prep.tokenizer import DocumentTokenizer, train_tokenizer


def main() -> None:
    """Prints a line per size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("megabytes", nargs="+", type=float)
    chooser = random.Random(0)
    words = " ".join(chooser.choices([f"word{number}" for number in range(5000)], k=100_000))
    settings = TokenizerSettings()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        train_tokenizer([words], 1000, settings.end_of_text, settings.padding).save(str(path))
        tokenizer = DocumentTokenizer(path, settings)
        for megabytes in parser.parse_args().megabytes:
            text = (words * (int(megabytes) + 2))[: int(megabytes * 1e6)]
            at_once = _megabytes_of(partial(tokenizer._ids, [text]))
            in_pieces = _megabytes_of(partial(tokenizer.encode, [text]))
            print(f"{megabytes:g} MB: {at_once:,} MB at once, {in_pieces:,} MB in pieces")


def _megabytes_of(encode: Callable[[], object]) -> int:
    """What a forked process needs beside what this one has."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(encode, sender))
    process.start()
    megabytes = receiver.recv()
    process.join()
    return megabytes


def _measure(encode: Callable[[], object], sender: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encode()
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


if __name__ == "__main__":
    main()
