"""The rules of cleaning against datatrove's own: MB of text per CPU second, in alternating pairs, verdicts compared.

    python -m tools.bench_rules corpus.jsonl --megabytes 8 --pairs 2

datatrove's side is its filters as FineWeb's pipeline has them (ftfy, C4, Gopher's quality, Gopher's repetition) and its
MinHash signatures, with its own splitter of words, one document after the other without files; ours is what the step
`clean` does. A first share of the documents is not measured, so that no side loads anything; each pair has another.
"""

from __future__ import annotations

import argparse
import json
import operator
import time
from collections.abc import Callable
from pathlib import Path

import ftfy
from datatrove.data import Document as LibraryDocument
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.text import TextNormConfig

from data_prep.clean import Cleaner
from data_prep.clean.settings import CleaningSettings, DeduplicationSettings
from data_prep.deduplicate import Signatures
from data_prep.documents import Document

Side = Callable[[list[str]], list[str | None]]


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path, help="JSONL with a field `text`")
    parser.add_argument("--megabytes", type=float, default=8.0, help="from the documents evenly spread over the file")
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    texts = _sample(arguments.corpus, arguments.megabytes)
    first, *others = (texts[number :: arguments.pairs + 1] for number in range(arguments.pairs + 1))
    sides: dict[str, Side] = {"ours": _ours(), "datatrove": _datatrove()}
    kept: dict[str, list[str | None]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(first)
    for some in others:
        for name, side in sides.items():
            began = time.process_time()
            kept[name] += side(some)
            seconds[name].append(time.process_time() - began)
    megabytes = sum(len(text.encode()) for some in others for text in some) / 1e6
    pairs = list(zip(seconds["datatrove"], seconds["ours"], strict=True))
    answer = {
        "megabytes": round(megabytes, 2),
        "documents": len(kept["ours"]),
        "kept": sum(text is not None for text in kept["ours"]),
        "same_verdict_and_text": sum(map(operator.eq, kept["ours"], kept["datatrove"])),
        "megabytes_per_cpu_second": {name: round(megabytes / sum(spent), 2) for name, spent in seconds.items()},
        "ratio": round(sum(seconds["datatrove"]) / sum(seconds["ours"]), 2),
        "ratio_of_each_pair": [round(one / other, 2) for one, other in pairs],
    }
    print(json.dumps(answer, indent=1))


def _sample(path: Path, megabytes: float) -> list[str]:
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    stride = max(1, int(sum(map(len, texts)) / (megabytes * 1e6)))
    return [text for text in texts[::stride] if text.strip()]


def _ours() -> Side:
    clean = Cleaner(CleaningSettings.model_validate({name: {} for name in SECTIONS}))

    def side(texts: list[str]) -> list[str | None]:
        signatures = Signatures(DeduplicationSettings(exact=False, near={}))
        kept: list[str | None] = []
        for text in texts:
            document = clean(Document(text, "here"))
            kept.append(document.text if isinstance(document, Document) else None)
            if isinstance(document, Document):
                signatures.add(document.text)
        return kept

    return side


SECTIONS = ("unicode", "c4", "gopher_quality", "gopher_repetition")


def _datatrove() -> Side:
    filters = [C4QualityFilter(), GopherQualityFilter(), GopherRepetitionFilter()]
    minhash = MinhashDedupSignature(".", MinhashConfig(norm_config=TextNormConfig(norm_numbers=False)))
    config = ftfy.TextFixerConfig(
        fix_latin_ligatures=False, fix_character_width=False, uncurl_quotes=False, explain=False
    )

    def side(texts: list[str]) -> list[str | None]:
        kept: list[str | None] = []
        for text in texts:
            document = LibraryDocument(text=ftfy.fix_text(text, config), id="")
            stays = all(each.filter(document) is True for each in filters)
            kept.append(document.text if stays else None)
            if stays:
                minhash.get_signature(minhash.get_shingles(document.text))
        return kept

    return side


if __name__ == "__main__":
    main()
