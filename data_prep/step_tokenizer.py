"""Step `tokenizer`: the given tokenizer.json, or one trained on the cleaned train documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from cola_megatron.data.manifest import TOKENIZER_NAME
from data_prep.kept_documents import kept_documents
from data_prep.losses import losses_of, refuse_losses, refuse_missing_urls
from data_prep.pack import TRAIN, split_of
from data_prep.plan import Plan
from data_prep.tiktoken_backend import (
    BYTE_PAIRS_NAME,
    LONGEST_TEXT,
    Differs,
    TiktokenBackend,
    byte_pairs_of,
    proof_of,
    telling_texts,
)
from data_prep.tokenizer import DocumentTokenizer, train_tokenizer
from data_prep.work import WorkFolder

__all__ = ["place_tokenizer"]

# Bytes of sources from where on a proof, which takes some eight seconds, is won back.
WORTH_A_PROOF = 2**26
COMPARED_PARTS = 32
COMPARED_CHARACTERS = 2**21


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
    backend = _backend(plan, work, tokenizer, folder)
    return {"vocab_size": tokenizer.vocab_size, "trained": settings.path is None, "backend": backend}


def _backend(plan: Plan, work: WorkFolder, tokenizer: DocumentTokenizer, folder: Path) -> dict[str, Any]:
    """What will encode: `name`, and the proof that it gives the same ids, or the reason why it does not.

    Leaves the byte pairs of the tokenizer where it is tiktoken.
    """
    asked = plan.recipe.tokenizer.backend
    if asked == "tokenizers" or (asked == "auto" and sum(each.bytes for each in plan.inputs) < WORTH_A_PROOF):
        return {"name": "tokenizers", "reason": "asked for" if asked == "tokenizers" else "little text"}
    if find_spec("tiktoken") is None:
        return {"name": "tokenizers", "reason": "tiktoken is not installed: make setup EXTRAS=prep"}
    special = [token["content"] for token in tokenizer.content.get("added_tokens", [])]
    try:
        pairs = byte_pairs_of(tokenizer.content)
        texts = chain(telling_texts(special), _first_documents(plan, work))
        proof = proof_of(TiktokenBackend(pairs), tokenizer.ids_of_the_library, texts)
    except Differs as difference:
        return {"name": "tokenizers", "reason": str(difference)}
    pairs.save(folder / BYTE_PAIRS_NAME)
    return {"name": "tiktoken", "proof": proof}


def _first_documents(plan: Plan, work: WorkFolder) -> Iterator[str]:
    """The first documents of some parts, evenly spread, cut to what tiktoken would take."""
    for task in range(0, len(plan.inputs), -(-len(plan.inputs) // COMPARED_PARTS)):
        left = COMPARED_CHARACTERS // min(len(plan.inputs), COMPARED_PARTS)
        for document in kept_documents(plan, work, task):
            if left <= 0:
                break
            text = document.text[: min(left, LONGEST_TEXT)]
            left -= len(text)
            yield text


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
