"""Likelihoods and reconstruction curves of many texts: whose texts, over all processes, and the figures over them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from cola_megatron.checkpoint.errors import CheckpointError
from cola_megatron.checkpoint.find import require_checkpoint
from cola_megatron.checkpoint.state_file import read_config
from cola_megatron.config import ConfigError
from cola_megatron.conversion.open_model import open_model
from cola_megatron.data import TokenShards, held_out_samples, require_same_tokenizer
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.files import read_rows
from cola_megatron.evaluation.statistics import Figure, Interval, ratio_interval, ratio_standard_error
from cola_megatron.evaluation.token_counts import count_tokens
from cola_megatron.inference.likelihood_terms import Kind, Progress, TextLikelihood
from cola_megatron.inference.robustness import RobustnessCurve
from cola_megatron.parallel import ProcessGroups

Result = TypeVar("Result")


_KINDS: tuple[Kind, ...] = ("exact", "bound", "estimate")
"""From the strongest."""
_HEADLINES = {"exact": "-log p, exact", "bound": "-log p, upper bound", "estimate": "-log p, estimate"}


class Texts(NamedTuple):
    """Texts, or token ids, and what goes before each of them."""

    texts: Sequence[str | Sequence[int]]
    contexts: Sequence[str] | None
    training: TokenShards | None = None
    """What counts may be taken of, where the texts are the held-out ones of a prepared folder."""


def held_out_texts(source: Path, data: Path | None, limit: int | None) -> Texts:
    """Held-out sequences of a prepared folder, by default that of the run: those that training measures on, and more.

    Raises:
        ConfigError: `source` has no checkpoint that can be read, or names no data. ShardError: the data cannot be read.
    """
    shards = held_out_shards(source, data, "--data FOLDER or --file FILE")
    count = len(shards) if limit is None else min(limit, len(shards))
    tokens = [sample.tokens.tolist() for sample in held_out_samples(shards).read(0, count)]
    training = TokenShards(shards.folder.place, "train", "size") if "train" in shards.manifest.splits else None
    return Texts(tokens, None, training)


def baselines(texts: Texts, vocab_size: int) -> dict[str, float]:
    """Nats per token of counting, by name; nothing where there is no training split."""
    if texts.training is None:
        return {}
    token_ids = [text for text in texts.texts if not isinstance(text, str)]
    return count_tokens(texts.training, vocab_size).nats_per_token(token_ids)


def held_out_shards(source: Path, data: Path | None, cure: str = "--data FOLDER") -> TokenShards:
    """The held-out split of a prepared folder, by default of the data that a run was trained on.

    Args:
        cure: what to give where `source` names no data.

    Raises:
        ConfigError: `source` has no checkpoint that can be read, or names no data. UserError: the data have another
            tokenizer. ShardError: they cannot be read.
    """
    folder: str | Path | None = data
    if folder is None:
        try:
            folder = read_config(require_checkpoint(source)).data.path
        except CheckpointError:
            raise ConfigError(f"{source} is no run with data of its own: give {cure}") from None
    if folder is None:
        raise ConfigError(f"{source} names no data: give {cure}")
    require_same_tokenizer(open_model(source).tokenizer, folder)
    return TokenShards(folder, "held_out")


def texts_of_file(file: Path, field: str, context_field: str | None, limit: int | None) -> Texts:
    """A text per line of a `.txt` file, or per row of JSONL, JSON, CSV, parquet or Arrow; empty lines do not count.

    Args:
        field, context_field: of a row; the context may be empty.

    Raises:
        EvaluationError: the file cannot be read, a row lacks a field, or there is no text. ConfigError: `context_field`
            of a `.txt` file.
    """
    if file.suffix == ".txt":
        if context_field is not None:
            raise ConfigError(f"{file}: a line of text has no field {context_field}")
        try:
            lines = [line.removesuffix("\r") for line in file.read_bytes().decode("utf-8-sig").split("\n")]
        except UnicodeDecodeError:
            raise EvaluationError(f"{file}: not UTF-8") from None
        texts, contexts = list(islice((line for line in lines if line.strip()), limit)), None
    else:
        rows = list(islice(read_rows(file), limit))
        texts = [_text_under(field, place, row) for place, row in rows]
        contexts = None
        if context_field is not None:
            contexts = [_text_under(context_field, place, row) for place, row in rows]
    if not texts:
        raise EvaluationError(f"{file}: holds no text")
    return Texts(texts, contexts)


def own_part(items: Sequence[Result], groups: ProcessGroups) -> Sequence[Result]:
    """Every n-th item: those of this replica of the model."""
    return items[groups.data_parallel_rank :: groups.data_parallel_size]


def from_all_replicas(own: list[Result], groups: ProcessGroups) -> list[Result]:
    """What all replicas found of their parts, in the order of the whole, on each of them."""
    replicas = groups.data_parallel_size
    if replicas == 1:
        return own
    parts: list[Any] = [None] * replicas
    dist.all_gather_object(parts, own, group=groups.data_group)
    whole: list[Any] = [None] * sum(map(len, parts))
    for replica, part in enumerate(parts):
        whole[replica::replicas] = part
    return whole


@contextmanager
def progress_bar(description: str, shown: bool) -> Iterator[Progress]:
    """A bar that is told how many are done, and how many there are."""
    with tqdm(desc=description, unit="text", disable=not shown) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@dataclass(frozen=True)
class LikelihoodSummary:
    """Figures over texts, with 95% intervals over the draw of texts (`ratio_interval`)."""

    texts: int
    tokens: int
    nats_per_token: Figure
    """-ELBO per token: one figure that every family has."""
    draw_error: float
    """The part of its standard error that other draws for the same texts would move; NaN where each has one draw."""
    kind: Kind
    """What it is: -log p itself, an upper bound of it, or an estimate; of several texts the weakest."""
    figures: dict[str, Interval]
    """Nats per token: `elbo`, and what else the family knows."""
    words: Mapping[str, str]
    """What each of them is."""
    perplexity: Interval
    """exp(-ELBO) per token."""
    bits_per_byte: Interval | None
    """-ELBO; None where the bytes of a text are not known."""

    def as_json(self) -> dict[str, Any]:
        """Every figure; limits that are not known, and figures too large, are null."""
        found: dict[str, Any] = {"texts": self.texts, "tokens": self.tokens}
        draw_error = self.draw_error if math.isfinite(self.draw_error) else None
        found["nats_per_token"] = {**self.nats_per_token.as_json(), "draw_error": draw_error, "kind": self.kind}
        for name, figure in {
            **self.figures,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }.items():
            if figure is not None:
                limits = {end: getattr(figure, end) for end in ("value", "low", "high")}
                found[name] = {end: limit if math.isfinite(limit) else None for end, limit in limits.items()}
            else:
                found[name] = None
        return found

    def rows(self) -> list[list[str]]:
        """A table, headings first."""
        rows = [
            ["nats per token", "", "95% interval"],
            [_HEADLINES[self.kind], *_cells(self.nats_per_token.interval)],
            *([words, *_cells(self.figures[name])] for name, words in self.words.items()),
            ["perplexity per token", *_cells(self.perplexity, ".4g")],
        ]
        if self.bits_per_byte is not None:
            rows.append(["bits per byte", *_cells(self.bits_per_byte)])
        return rows


def summarize(results: Sequence[TextLikelihood]) -> LikelihoodSummary:
    """Figures over texts, each counting by its tokens (by its bytes for bits per byte)."""
    tokens, words = [result.tokens for result in results], results[0].figures
    figures = {name: ratio_interval([getattr(result, name) for result in results], tokens) for name in words}
    elbo, bits_per_byte = figures["elbo"], None
    text_bytes = [result.text_bytes for result in results if result.text_bytes]
    if len(text_bytes) == len(results):
        bits = [-result.elbo / math.log(2) for result in results]
        bits_per_byte = ratio_interval(bits, text_bytes)
    perplexity = Interval(*(_exponential(-nats) for nats in (elbo.value, elbo.high, elbo.low)))
    losses = [-result.elbo for result in results]
    headline = Figure(ratio_interval(losses, tokens), ratio_standard_error(losses, tokens))
    kind = max((result.kind for result in results), key=_KINDS.index)
    drawn = math.sqrt(sum(result.elbo_error**2 for result in results)) / sum(tokens)
    return LikelihoodSummary(
        len(results), sum(tokens), headline, drawn, kind, figures, words, perplexity, bits_per_byte
    )


def curve_rows(curve: RobustnessCurve) -> list[list[str]]:
    """A table of a curve, headings first; accuracies with 95% intervals over the draw of texts."""
    rows = [["t", "accuracy", "95% interval", "nats per token"]]
    tokens = curve.tokens_M.tolist()
    for column, (time, nats) in enumerate(zip(curve.times, curve.cross_entropy, strict=True)):
        share = ratio_interval(curve.correct_MT[:, column].tolist(), tokens)
        percent = Interval(100 * share.value, 100 * max(0.0, share.low), 100 * min(1.0, share.high))
        rows.append([f"{time:.2f}", *_cells(percent, ".2f"), f"{nats:.4f}"])
    return rows


def joined(curves: Sequence[RobustnessCurve]) -> RobustnessCurve:
    """The curve over the texts of several."""
    parts = ([getattr(curve, name) for curve in curves] for name in ("tokens_M", "correct_MT", "nll_MT"))
    return RobustnessCurve(curves[0].times, *(torch.cat(part) for part in parts))


def _text_under(field: str, place: str, row: dict[str, Any]) -> str:
    if not isinstance(row.get(field), str):
        raise EvaluationError(f"{place}: no text under {field!r}; there are {', '.join(row)}")
    return row[field]


def _cells(figure: Interval, form: str = ".4f") -> list[str]:
    known = math.isfinite(figure.low) and math.isfinite(figure.high)
    limits = f"{format(figure.low, form)} .. {format(figure.high, form)}" if known else ""
    return [format(figure.value, form), limits]


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < math.log(torch.finfo(torch.float64).max) else math.inf
