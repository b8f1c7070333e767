"""Checking a prepared folder, byte by byte and token by token."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cola_megatron.data.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    ShardError,
    file_problems,
    read_manifest,
)
from cola_megatron.data.shards import TokenShards

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    folder: Path
    files: int
    """Files compared with the manifest."""
    bytes: int
    """Bytes the manifest says they have."""
    sequences: int
    """Sequences read and decoded."""
    problems: tuple[str, ...]
    """One line each, with the path of the file; empty if the folder is whole."""

    @property
    def ok(self) -> bool:
        """Whether the folder is what its manifest says."""
        return not self.problems


def verify(folder: Path, progress: bool = True) -> VerifyReport:
    """Hash every file of a prepared folder and decode every sequence, and list all that differs from the manifest.

    Args:
        folder: a prepared folder.
        progress: show progress bars on stderr.

    Raises:
        ShardError: there is no readable manifest to compare with.
    """
    folder = folder.expanduser().absolute()
    manifest = read_manifest(folder)
    total = sum(record.bytes for record in manifest.files.values())
    problems: list[str] = []
    with tqdm(total=total, desc="hashing", unit="B", unit_scale=True, disable=not progress, file=sys.stderr) as bar:
        for name, record in manifest.files.items():
            problems += file_problems(folder, {name: record}, "hash")
            bar.update(record.bytes)
    problems += _unknown_files(folder, manifest.files)
    sequences = 0
    # Decoding a damaged file would only repeat what hashing has found.
    if not problems:
        sequences, problems = _decode(folder, manifest, progress)
    return VerifyReport(folder, len(manifest.files), total, sequences, tuple(problems))


def _unknown_files(folder: Path, files: dict[str, FileRecord]) -> list[str]:
    known = {folder / name for name in files} | {folder / MANIFEST_NAME}
    return [
        f"{path} is not in the manifest" for path in sorted(folder.rglob("*")) if path.is_file() and path not in known
    ]


def _decode(folder: Path, manifest: Manifest, progress: bool) -> tuple[int, list[str]]:
    """Number of sequences read from all splits, and the problems met."""
    sequences = 0
    problems = []
    for name, streams in manifest.splits.items():
        if not streams:
            continue
        try:
            shards = TokenShards(folder, name, verify="none")
        except ShardError as error:
            problems.append(str(error))
            continue
        for index in tqdm(range(len(shards)), desc=f"reading {name}", disable=not progress, file=sys.stderr):
            try:
                shards[index]
                sequences += 1
            except ShardError as error:
                problems.append(str(error))
    return sequences, problems
