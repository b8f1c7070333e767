"""From what a caller of `generate` gives to settings and requests; refuses in one line what is out of range."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from cola_megatron.inference.protocol import Request
from cola_megatron.inference.settings import MAX_SAMPLE_ID, CommonSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def read_settings(family: type[Settings], options: dict[str, Any], purpose: str = "generation") -> Settings:
    """Settings of this kind; raises ValueError for a name that it does not have, or a value out of range."""
    known = [field.name for field in fields(family)]
    for name in options:
        if name not in known:
            raise ValueError(f"{name} is no setting of {purpose}; there are {', '.join(known) or 'none'}")
    return family(**options)


def read_requests(
    family: type[CommonSettings],
    prompts: Sequence[str | Sequence[int]],
    ids: Sequence[int] | None,
    max_new_tokens: int | Sequence[int],
    encode: Callable[[str], list[int]],
    vocab_size: int,
) -> list[Request]:
    """One request per prompt.

    Args:
        ids: sample ids; None: 0, 1, ...
        max_new_tokens: one number for all, or one per prompt.
        encode: text -> token ids.

    Raises:
        ValueError: numbers that do not match the prompts, ids or token ids out of range.
    """
    require_several("prompts", prompts)
    sample_ids = read_sample_ids("prompts", len(prompts), ids)
    lengths = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
    if len(lengths) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(lengths)} numbers in max_new_tokens")
    for length in lengths:
        read_settings(family, {"max_new_tokens": length})
    token_ids = [
        read_token_ids(f"prompts[{index}]", prompt, encode, vocab_size) for index, prompt in enumerate(prompts)
    ]
    return [Request(*parts) for parts in zip(token_ids, sample_ids, lengths, strict=True)]


def require_several(name: str, given: object) -> None:
    """Refuses one text where a list of them belongs, of which each character would be one; raises ValueError."""
    if isinstance(given, str):
        raise ValueError(f"{name} must be a list: give [{given[:20]!r}{', ...' if len(given) > 20 else ''}]")


def read_sample_ids(name: str, count: int, ids: Sequence[int] | None) -> list[int]:
    """One id for each of `count` things called `name`, by default 0, 1, ...; raises ValueError as `read_requests`."""
    sample_ids = list(range(count)) if ids is None else integers("ids", ids)
    if len(sample_ids) != count:
        raise ValueError(f"{count} {name} but {len(sample_ids)} ids")
    for sample in sample_ids:
        if abs(sample) > MAX_SAMPLE_ID:
            raise ValueError(f"ids: {sample} must lie in -{MAX_SAMPLE_ID} .. {MAX_SAMPLE_ID}")
    return sample_ids


def integers(name: str, values: Iterable[int]) -> list[int]:
    """A list of integers of any kind; raises ValueError for anything else."""
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(f"{name} must be integers: {error}") from None


def read_token_ids(
    name: str, prompt: str | Sequence[int], encode: Callable[[str], list[int]], vocab_size: int
) -> list[int]:
    """The ids of a text or of ids in any form of integers; raises ValueError where one is out of range."""
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is not text: its character {error.start} is no UTF-8, or half of a surrogate pair"
            ) from None
    token_ids = encode(prompt) if isinstance(prompt, str) else integers(name, prompt)
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token id {token} must lie in 0 .. {vocab_size - 1}")
    return token_ids
