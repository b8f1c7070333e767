"""Step `tokenizer`: the given tokenizer.json, or one trained on the cleaned train documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cola_megatron.data.manifest import TOKENIZER_NAME
from data_prep.kept_documents import kept_documents
from data_prep.losses import losses_of, refuse_losses, refuse_missing_urls
from data_prep.pack import TRAIN, split_of
from data_prep.plan import Plan
from data_prep.tokenizer import DocumentTokenizer, train_tokenizer
from data_prep.work import WorkFolder

__all__ = ["place_tokenizer"]


def place_tokenizer(
    plan: Plan, work: WorkFolder, task: int, folder: Path, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Leaves `tokenizer.json`, checked for the tokens that packing needs.

    Raises:
        DataPrepError: a source lost more to one rule than the recipe allows: said before the long step that comes now.
    """
    for source in plan.recipe.sources:
        read, removed = losses_of(plan, work, source.name)
        refuse_missing_urls(plan, source.name, read)
        refuse_losses(plan, work, source.name, read["documents"], removed)
    settings, path = plan.recipe.tokenizer, folder / TOKENIZER_NAME
    pads = plan.recipe.packing.method == "best_fit"
    if settings.path is not None:
        given = settings.path.expanduser()
        DocumentTokenizer(given, settings, pads)
        path.write_bytes(given.read_bytes())
    else:
        trained = train_tokenizer(_sample(plan, work), settings.vocab_size, settings.end_of_text, settings.padding)
        path.write_text(trained.to_str(pretty=True), encoding="utf-8")
    tokenizer = DocumentTokenizer(path, settings, pads)
    return {"vocab_size": tokenizer.vocab_size, "trained": settings.path is None}


def _sample(plan: Plan, work: WorkFolder) -> Iterator[str]:
    """Train documents from the beginning of every part, as much of each as its share of all bytes."""
    total = sum(part.bytes for part in plan.inputs)
    for task, part in enumerate(plan.inputs):
        share = part.bytes / total if total else 1.0
        left = plan.recipe.tokenizer.training_bytes * share
        for document in kept_documents(plan, work, task):
            if left <= 0:
                break
            if split_of(document.text, plan.recipe) == TRAIN:
                left -= len(document.text.encode())
                yield document.text
