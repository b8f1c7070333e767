"""Prepared folders whose every sequence says where it stands, written without the work of preparation."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import webdataset

from cola_megatron.data.manifest import FileRecord, Manifest, MixtureRecord, StreamRecord, sha256_of
from cola_megatron.data.shards import TOKENS_COLUMN, tokens_encoding
from cola_megatron.data.streaming_backend import MDSWriter, compress

LENGTH, VOCABULARY, END_OF_TEXT, PADDING = 32, 300, 0, 2
PER_SHARD = 10


def sequence(split: str, source: str, number: int) -> np.ndarray:
    """Tokens that no other sequence of a folder has."""
    seed = hashlib.sha256(f"{split} {source} {number}".encode()).digest()
    return np.random.default_rng(list(seed)).integers(3, VOCABULARY, LENGTH).astype(np.uint16)


def whole(split: str, sources: dict[str, int]) -> np.ndarray:
    """All sequences of a split, source after source: (N, LENGTH)."""
    return np.stack([sequence(split, source, number) for source, count in sources.items() for number in range(count)])


def write_folder(
    folder: Path,
    sources: dict[str, int],
    shard_format: str = "mds",
    compression: str | None = None,
    mixture: dict[str, MixtureRecord] | None = None,
    held_out: dict[str, int] | None = None,
    per_shard: int = PER_SHARD,
    tokenizer: Path | None = None,
    make: Callable[[str, str, int], np.ndarray] = sequence,
) -> Path:
    """A folder with so many sequences of each source, ten in a shard."""
    splits = {"train": sources, "held_out": held_out or dict.fromkeys(sources, 12)}
    for split, counts in splits.items():
        index = []
        for source, count in counts.items():
            part = folder / split / source / "00000"
            part.mkdir(parents=True)
            write = _write_mds if shard_format == "mds" else _write_tars
            rows = [make(split, source, number) for number in range(count)]
            index += write(part, f"{source}/00000/", rows, compression, per_shard)
        key = {"version": 2, "shards": index} if shard_format == "mds" else {"wids_version": 1, "shardlist": index}
        (folder / split / "index.json").write_text(json.dumps(key))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes() if tokenizer else b"{}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = Manifest(
        layout_version=2,
        shard_format=shard_format,
        compression=compression,
        sequence_length=LENGTH,
        token_dtype="uint16",
        vocab_size=VOCABULARY,
        end_of_text_id=END_OF_TEXT,
        padding_id=PADDING,
        mixture=mixture or dict.fromkeys(sources, MixtureRecord(epochs=1.0, weight=None)),
        splits={
            split: {
                source: StreamRecord(
                    documents=count,
                    characters=count,
                    sequences=count,
                    tokens=count * LENGTH,
                    padding_tokens=0,
                    dropped_tokens=0,
                )
                for source, count in counts.items()
            }
            for split, counts in splits.items()
        },
        fingerprint="",
        recipe={},
        versions={},
        files={
            path.relative_to(folder).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
            for path in files
        },
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def _write_mds(part: Path, prefix: str, rows: list[np.ndarray], compression: str | None, per_shard: int) -> list[dict]:
    columns = {TOKENS_COLUMN: tokens_encoding("uint16", LENGTH)}
    writer = MDSWriter(out=str(part), columns=columns, compression=compression, size_limit=None, max_workers=1)
    for start in range(0, len(rows), per_shard):
        for row in rows[start : start + per_shard]:
            writer.write({TOKENS_COLUMN: row})
        writer.flush_shard()
        writer._reset_cache()
    writer.executor.submit(int).result()  # its queue is empty then; the writer itself would look once a second
    writer.finish()
    path = part / "index.json"
    shards = json.loads(path.read_text())["shards"]
    path.unlink()
    for shard in shards:
        for data in filter(None, (shard["raw_data"], shard["zip_data"])):
            data["basename"] = prefix + data["basename"]
    return shards


def _write_tars(part: Path, prefix: str, rows: list[np.ndarray], compression: str | None, per_shard: int) -> list[dict]:
    shards = []
    for start in range(0, len(rows), per_shard):
        buffer, held = io.BytesIO(), rows[start : start + per_shard]
        with webdataset.TarWriter(buffer, mtime=0, user="", group="") as tar:
            for number, row in enumerate(held):
                tar.write({"__key__": f"{number:09d}", "npy": row})
        name, data = f"shard-{len(shards):06d}.tar", buffer.getvalue()
        if compression is not None:
            name, data = f"{name}.{compression}", compress(compression, data)
        (part / name).write_bytes(data)
        shards.append({"url": prefix + name, "nsamples": len(held)})
    return shards


def shard_files(folder: Path, split: str = "train") -> list[Path]:
    """The shards of a split."""
    return sorted(path for path in (folder / split).rglob("shard*"))


def read(shards: Iterable, count: int) -> np.ndarray:
    """The first sequences of anything that can be indexed."""
    return np.stack([shards[index] for index in range(count)])
