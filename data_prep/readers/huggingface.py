"""Folders of Hugging Face datasets: what `datasets.save_to_disk` writes, and clones of the hub's repositories."""

from __future__ import annotations

import re

from data_prep.errors import DataPrepError
from data_prep.readers.formats import format_of

__all__ = ["ROW_FORMATS", "data_files", "is_dataset"]

ROW_FORMATS = ("parquet", "arrow", "jsonl", "csv", "webdataset")
_SPLIT = re.compile(r"(?:^|[/_.-])(train|validation|valid|val|dev|test)(?=[/_.-])")
_DESCRIPTION = re.compile(r"(state|dataset_(dict|infos?))\.json")


def is_dataset(folder: str, files: list[str]) -> bool:
    """Whether a folder says by itself that it is a dataset.

    Args:
        folder: path or URL.
        files: all files below it.
    """
    return folder.startswith("hf://") or any(_DESCRIPTION.fullmatch(_inside(folder, file)) for file in files)


def data_files(folder: str, files: list[str]) -> list[str]:
    """The files that hold the rows of a dataset: those under data/ if there are any, else all that can hold rows.

    Raises:
        DataPrepError: they belong to several splits; training on all of them is hardly meant.
    """
    found = [file for file in files if format_of(file) in ROW_FORMATS]
    found = [file for file in found if _inside(folder, file).startswith("data/")] or found
    splits: dict[str, str] = {}
    for file in found:
        if match := _SPLIT.search(_inside(folder, file)):
            splits.setdefault(match[1], f"{folder.rstrip('/')}/{_inside(folder, file)[: match.end()]}*")
    if len(splits) > 1:
        example = splits.get("train", min(splits.values()))
        raise DataPrepError(f"{folder}: holds several splits ({', '.join(sorted(splits))}); give one, e.g. {example}")
    return found


def _inside(folder: str, file: str) -> str:
    return file[len(folder.rstrip("/")) + 1 :]
