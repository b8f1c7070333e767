"""Readers of raw corpora: what they find, what they read, and what they say about bad data."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.documents import BadDocument, Document, Part
from data_prep.errors import DataPrepError
from data_prep.readers import find_parts, json_lines, read_part
from data_prep.recipe import SourceSettings

WHOLE = 2**40
TEXTS = [f"Page {number}: été 😀\r\n" + "grey water broke over iron " * (number % 7) for number in range(40)]


def source(*inputs: Path | str, **settings: object) -> SourceSettings:
    return SourceSettings(name="web", inputs=[str(text) for text in inputs], **settings)


def read(*inputs: Path | str, task_bytes: int = WHOLE, **settings: object) -> list[Document | BadDocument]:
    """Everything in the inputs; checks that the bytes of each part are shared out over its documents."""
    chosen = source(*inputs, **settings)
    found = []
    for part in find_parts(chosen, task_bytes):
        documents = list(read_part(part, chosen))
        if documents:
            assert sum(document.bytes_read for document in documents) == part.bytes
            assert all(document.bytes_read >= 0 for document in documents)
        found += documents
    return found


def texts(*inputs: Path | str, task_bytes: int = WHOLE, **settings: object) -> list[str]:
    return [document.text for document in read(*inputs, task_bytes=task_bytes, **settings)]


def jsonl(values: list[str], **fields: object) -> bytes:
    return b"".join(json.dumps({"text": value} | fields).encode() + b"\n" for value in values)


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True, write_content_size=False).compress(data)


def write_parquet(path: Path, columns: dict[str, object], rows_per_group: int = 1000) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.table(columns), path, row_group_size=rows_per_group)
    return path


def write_arrow(path: Path, columns: dict[str, object], rows_per_batch: int = 1000) -> Path:
    """What `datasets.save_to_disk` writes."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


def tar_of(members: list[tuple[str, bytes]], **options: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message(function: Callable[[], object]) -> str:
    with pytest.raises(DataPrepError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def memory() -> str:
    """URL of an empty folder in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    files.makedirs("/crawl")
    return "memory:///crawl"


def put_url(url: str, content: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(content)
    return url


# ---- finding --------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_recursively_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.TXT", "a.md", "deep/c.txt", "deep/deeper/d.jsonl.gz", ".hidden/e.txt", "deep/.f.txt", "notes.csv"):
        put(tmp_path / name, gzip.compress(jsonl(["x"])) if name.endswith(".gz") else "x")
    parts = find_parts(source(tmp_path), WHOLE)
    assert [Path(part.location).relative_to(tmp_path).as_posix() for part in parts] == [
        "a.md",
        "b.TXT",
        "deep/c.txt",
        "deep/deeper/d.jsonl.gz",
    ]
    assert [part.format for part in parts] == ["text", "text", "text", "jsonl"]
    assert {part.source for part in parts} == {"web"}
    assert [part.bytes for part in parts[:3]] == [1, 1, 1]


def test_globs_stand_for_files_and_for_what_is_below_folders(tmp_path: Path) -> None:
    for name in ("2023/a.txt", "2024/a.txt", "2024/deep/b.txt", "2024/c.csv", "c.jsonl"):
        put(tmp_path / name, jsonl(["x"]))

    def found(*patterns: str) -> list[str]:
        parts = find_parts(source(*(f"{tmp_path}/{pattern}" for pattern in patterns)), WHOLE)
        return [part.location.removeprefix(f"{tmp_path}/") for part in parts]

    assert found("*/a.txt") == ["2023/a.txt", "2024/a.txt"]
    assert found("2024*") == ["2024/a.txt", "2024/deep/b.txt"]
    assert found("**/*.txt") == ["2023/a.txt", "2024/a.txt", "2024/deep/b.txt"]
    assert found("**") == ["2023/a.txt", "2024/a.txt", "2024/deep/b.txt", "c.jsonl"]
    assert found("c.json?", "2023") == ["c.jsonl", "2023/a.txt"], "inputs keep their order"


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    put(tmp_path / "a[1].txt", "one")
    put(tmp_path / "a1.txt", "other")
    assert texts(tmp_path / "a[1].txt") == ["one"]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.txt", "one")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "back").symlink_to(folder)
    assert texts(folder) == ["one"]
    (folder / "again.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert texts(folder) == ["one"]
    said = message(lambda: read(folder, tmp_path / "elsewhere"))
    assert "elsewhere/a.txt: named twice by the inputs (the same file as " in said
    (folder / "again.txt").unlink()
    (folder / "lost.txt").symlink_to(tmp_path / "nowhere.txt")
    assert "lost.txt: cannot be read (No such file or directory); check" in message(lambda: read(folder))


def test_a_forced_format_is_believed(tmp_path: Path) -> None:
    put(tmp_path / "part-0000", jsonl(TEXTS))
    put(tmp_path / "_SUCCESS", "")
    assert texts(tmp_path / "part-0000", format="jsonl") == TEXTS
    assert texts(tmp_path / "part-*", format="jsonl") == TEXTS
    put(tmp_path / "folder" / "a.jsonl", jsonl(TEXTS))
    put(tmp_path / "folder" / "README.md", "# About")
    assert texts(tmp_path / "folder", format="jsonl") == TEXTS
    assert texts(tmp_path / "folder" / "a.jsonl", format="text") == [jsonl(TEXTS).decode()]


def test_urls(memory: str, tmp_path: Path) -> None:
    put_url(f"{memory}/b.jsonl", jsonl(TEXTS[:20]))
    put_url(f"{memory}/deep/a.jsonl.gz", gzip.compress(jsonl(TEXTS[20:])))
    put_url(f"{memory}/.hidden/a.jsonl", jsonl(["no"]))
    put_url(f"{memory}/about.csv", b"no")
    for inputs in ([memory], ["memory://crawl/"], [f"{memory}/**/*.jsonl*"], [f"{memory}/b.jsonl", f"{memory}/deep"]):
        assert texts(*inputs) == TEXTS
        assert texts(*inputs, task_bytes=100) == TEXTS
    assert [part.location for part in find_parts(source("memory://crawl"), WHOLE)] == [
        "memory:///crawl/b.jsonl",
        "memory:///crawl/deep/a.jsonl.gz",
    ]
    path = put(tmp_path / "a.txt", "one")
    assert texts(f"file://{path}") == ["one"]
    assert find_parts(source(f"file://{path}"), WHOLE) == find_parts(source(path), WHOLE)


def test_every_format_is_read_from_urls(memory: str, tmp_path: Path) -> None:
    put_url(f"{memory}/a.parquet", write_parquet(tmp_path / "a.parquet", {"text": TEXTS}, 10).read_bytes())
    put_url(f"{memory}/b.arrow", write_arrow(tmp_path / "b.arrow", {"text": TEXTS}, 10).read_bytes())
    put_url(f"{memory}/c.tar", tar_of([(f"{k}.text", text.encode()) for k, text in enumerate(TEXTS)]))
    put_url(f"{memory}/d.jsonl.zst", zstd(jsonl(TEXTS)))
    put_url(f"{memory}/e.txt", b"last")
    assert texts(memory, task_bytes=1000) == [*TEXTS * 4, "last"]


def test_the_embedded_corpus_is_one_part() -> None:
    (part,) = find_parts(source("embedded"), WHOLE)
    assert (part.location, part.format, part.bytes) == ("embedded", "embedded", 0)
    document = next(read_part(part, source("embedded")))
    assert isinstance(document, Document)
    assert document.place == "embedded:1"
    assert len(document.text) > 100


def test_parts_are_the_same_every_time_and_follow_changes(tmp_path: Path, memory: str) -> None:
    local = put(tmp_path / "a.jsonl", jsonl(TEXTS))
    url = put_url(f"{memory}/a.jsonl", jsonl(TEXTS))
    for location in (str(local), url):
        first = find_parts(source(location), 500)
        assert len(first) > 3
        assert first == find_parts(source(location), 500)
        assert [Part.model_validate_json(part.model_dump_json()) for part in first] == first
    os.utime(local, ns=(1, 1))
    put_url(url, jsonl(TEXTS))
    for location in (str(local), url):
        said = message(lambda at=location: list(read_part(first[0], source(at))))
        assert "a.jsonl: changed since it was found" in said
        assert find_parts(source(location), 500)[0].version != first[0].version


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", jsonl(TEXTS))
    (part,) = find_parts(source(path), WHOLE)
    documents = read_part(part, source(path))
    next(documents)
    with path.open("ab") as file:
        file.write(jsonl(["late"]))
    assert "a.jsonl: changed since it was found" in message(lambda: list(documents))


@pytest.mark.parametrize(
    ("inputs", "settings", "expected"),
    [
        (["absent.txt"], {}, "absent.txt: does not exist; give a file, a folder, a glob, a URL or `embedded`"),
        (["*.nothing"], {}, "*.nothing: matches no .txt, .md, .text, .jsonl"),
        (["a.pdf"], {}, "a.pdf: unknown kind of file; set format, or rename or convert it to one of .txt, .md"),
        (["a.pdf"], {"format": "huggingface"}, "a.pdf: unknown kind of file; set format"),
        (["empty"], {}, "empty: holds no .txt, .md"),
        (["empty"], {"format": "parquet"}, "empty: holds no .parquet file; give a folder with data"),
        (["a.txt", "."], {}, "a.txt: named twice by the inputs; leave one out"),
        (["void.jsonl"], {}, "void.jsonl: is empty; remove it"),
        (["pipe.jsonl"], {}, "pipe.jsonl: is not a regular file"),
    ],
)
def test_bad_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], settings: dict[str, str], expected: str
) -> None:
    put(tmp_path / "a.txt", "one")
    put(tmp_path / "a.pdf", "one")
    (tmp_path / "empty").mkdir()
    if inputs == ["void.jsonl"]:
        put(tmp_path / "void.jsonl", "")
    if inputs == ["pipe.jsonl"]:
        os.mkfifo(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)
    assert expected in message(lambda: find_parts(source(*inputs, **settings), WHOLE))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://crawl/absent.txt", "memory:///crawl/absent.txt: does not exist"),
        ("memory://crawl/*.txt", "memory:///crawl/*.txt: matches no .txt"),
        ("nosuch://x/a.txt", "nosuch://x/a.txt: cannot be opened (Protocol not known: nosuch); check the URL"),
        ("gzip::https://x.org/a.txt", "a.txt: chained URLs are not read"),
    ],
)
def test_bad_urls(memory: str, url: str, expected: str) -> None:
    assert expected in message(lambda: find_parts(source(url), WHOLE))


def test_a_protocol_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    expected = "s3://bucket/a.txt: s3:// needs a package that is not installed: pip install s3fs"
    assert message(lambda: find_parts(source("s3://bucket/a.txt"), WHOLE)) == expected


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_format_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    path = put(tmp_path / name, "x")
    monkeypatch.setitem(sys.modules, package, None)
    said = message(lambda: find_parts(source(path), WHOLE))
    assert f"{package} is not installed, and {path} needs it: make setup EXTRAS=prep" in said


class FailingFileSystem(MemoryFileSystem):
    """A store that breaks off."""

    protocol = "failing"

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.RawIOBase:
        class Broken(io.BytesIO):
            def readinto(self, buffer: object) -> int:
                raise ConnectionError("the line is down")

        return Broken(b"something") if mode == "rb" else super()._open(path, mode, **options)


@pytest.mark.parametrize("bad_documents", ["error", "skip"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.tar", "a.parquet", "a.arrow"])
def test_a_failing_store_always_ends_the_run(name: str, bad_documents: str) -> None:
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    if name.endswith("zst"):
        pytest.importorskip("zstandard")
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    put_url(f"failing://crawl/{name}", b"something")
    chosen = source(f"failing://crawl/{name}", bad_documents=bad_documents)
    (part,) = find_parts(chosen, WHOLE)
    expected = f"{part.location}: cannot be read (the line is down); check the file and its rights"
    assert message(lambda: list(read_part(part, chosen))) == expected


# ---- text and JSONL -------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", TEXTS[3])
    assert read(path) == [Document(TEXTS[3], str(path), None, len(TEXTS[3].encode()))]
    put(path, b"\xef\xbb\xbfmarked")
    assert texts(path) == ["marked"]


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, ".zstd": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = put(tmp_path / f"a.jsonl{suffix}", compress(jsonl(TEXTS)))
    assert texts(path, task_bytes=50) == TEXTS, "one part, however small the tasks"
    put(path, compress(jsonl(TEXTS[:9])) + compress(b"") + compress(jsonl(TEXTS[9:])))
    assert texts(path) == TEXTS, "streams one after the other"
    if suffix in (".gz", ".xz"):
        put(path, compress(jsonl(TEXTS)) + bytes(1024))
        assert texts(path) == TEXTS, "padded"
    tar = tar_of([("a.text", b"one")])
    assert texts(put(tmp_path / f"b.tar{suffix}", compress(tar))) == ["one"]
    assert texts(put(tmp_path / f"c.md{suffix}", compress(b"two"))) == ["two"]


def test_zstd_files_with_skippable_frames_and_long_windows(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"pzst"
    path = put(tmp_path / "a.jsonl.zst", skippable + zstd(jsonl(TEXTS[:9])) + skippable + zstd(jsonl(TEXTS[9:])))
    assert texts(path) == TEXTS
    long = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=long).compressobj()
    put(path, compressor.compress(jsonl(TEXTS)) + compressor.flush())
    assert texts(path) == TEXTS


def test_bytes_read_follow_a_compressed_file(tmp_path: Path) -> None:
    draw = random.Random(0)
    pages = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=2000)) for _ in range(2000)]
    documents = read(put(tmp_path / "a.jsonl.gz", gzip.compress(jsonl(pages), 1)))
    total = sum(document.bytes_read for document in documents)
    half = sum(document.bytes_read for document in documents[:1000])
    assert 0.2 < half / total < 0.8


def test_places_urls_and_bytes_of_jsonl(tmp_path: Path) -> None:
    lines = [b'{"body": "one", "from": "https://a.org"}\n', b" \r\n", b'{"body": "two", "from": null}']
    path = put(tmp_path / "a.jsonl", b"".join(lines))
    assert read(path, text_field="body", url_field="from") == [
        Document("one", f"{path}:1", "https://a.org", len(lines[0])),
        Document("two", f"{path}:3", None, len(lines[1] + lines[2])),
    ]
    assert [document.url for document in read(path, text_field="body")] == [None, None]


AWKWARD = {
    "plain": jsonl(TEXTS),
    "CRLF": jsonl(TEXTS).replace(b"\n", b"\r\n"),
    "no newline at the end": jsonl(TEXTS).rstrip(),
    "blank lines": b"\n\n" + jsonl(TEXTS).replace(b"}\n", b"}\n \n\n") + b"\n" * 30,
    "long lines": jsonl([text * 40 if number % 5 == 0 else text for number, text in enumerate(TEXTS)]),
    "line separators in strings": jsonl(["a\u2028b\u0085c"] * 9).decode("unicode_escape").encode(),
    "byte order mark": b"\xef\xbb\xbf" + jsonl(TEXTS),
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_ranges_hold_every_document_once_in_order(tmp_path: Path, kind: str) -> None:
    data = AWKWARD[kind]
    path = put(tmp_path / "a.jsonl", data)
    whole = texts(path)
    assert whole == [json.loads(line)["text"] for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    draws = random.Random(1).sample(range(50, 999), 5)
    for task_bytes in [64, 100, 1000, len(data) // 2, len(data) - 1, len(data), *draws]:
        parts = find_parts(source(path), task_bytes)
        assert max(part.bytes for part in parts) <= task_bytes
        assert sum(part.bytes for part in parts) == len(data)
        assert texts(path, task_bytes=task_bytes) == whole


def test_a_range_may_begin_at_every_byte(tmp_path: Path) -> None:
    data = b'\n{"text": "a"}\r\n\n{"text": "b"}\n{"text": "c"}'
    path = put(tmp_path / "a.jsonl", data)
    for task_bytes in range(1, len(data) + 1):
        assert texts(path, task_bytes=task_bytes) == ["a", "b", "c"]


def test_a_document_of_a_range_is_named_by_its_byte_and_a_bad_one_by_its_line(tmp_path: Path) -> None:
    good, bad = b'{"text": "fine"}\n', b'{"text": 3}\n'
    path = put(tmp_path / "a.jsonl", good * 9 + bad + good)
    places = [document.place for document in read(path, task_bytes=100, bad_documents="skip")]
    assert places[:2] == [f"{path}:1", f"{path}:2"]
    assert places[6] == f"{path}:byte {6 * len(good)}"
    assert message(lambda: read(path, task_bytes=100)).startswith(f"{path}:10: field 'text' is a int, not a string")


def test_a_file_without_line_feeds_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE_BYTES", 1000)
    path = put(tmp_path / "a.jsonl", jsonl(["one", "long" * 500, "two"]))
    assert "a.jsonl:2: a line of over 1000 bytes; is the file JSONL?" in message(lambda: read(path))
    one, bad, two = read(path, bad_documents="skip")
    assert (one.text, bad.rule, two.text) == ("one", "bad_json", "two")


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_bytes", [1, 700, 2000, WHOLE])
def test_parquet_files_are_read_by_row_groups(tmp_path: Path, task_bytes: int) -> None:
    urls = [f"https://a.org/{number}" if number % 2 else None for number in range(40)]
    path = write_parquet(tmp_path / "a.parquet", {"id": range(40), "body": TEXTS, "from": urls}, rows_per_group=7)
    documents = read(path, task_bytes=task_bytes, text_field="body", url_field="from")
    assert [(document.text, document.url) for document in documents] == list(zip(TEXTS, urls, strict=True))
    assert [document.place for document in documents] == [f"{path}:row {number}" for number in range(1, 41)]
    parts = find_parts(source(path), task_bytes)
    assert sum(part.bytes for part in parts) == path.stat().st_size
    assert len(parts) == {1: 6, WHOLE: 1}.get(task_bytes, len(parts))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


def test_string_columns_of_every_kind(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    plain = arrow.array(TEXTS)
    for kind in (plain, plain.cast("large_string"), plain.cast("string_view"), plain.dictionary_encode()):
        assert texts(write_arrow(tmp_path / "a.arrow", {"text": kind}, 7)) == TEXTS
        assert texts(write_parquet(tmp_path / "a.parquet", {"text": kind})) == TEXTS


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_bad_columns(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", {"id": [1], "body": ["one"]})
    for skipping in ("error", "skip"):
        said = message(lambda mode=skipping: read(path, bad_documents=mode))
        assert said == f"{path}: no column 'text' (columns: id, body); set text_field"
    said = message(lambda: read(path, text_field="id"))
    assert said == f"{path}: column 'id' is of type int64, not string; set text_field"
    said = message(lambda: read(path, text_field="body", url_field="url"))
    assert said.endswith("no column 'url' (columns: id, body); set url_field")


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_bad_rows(tmp_path: Path, write: Callable[..., Path]) -> None:
    arrow = pytest.importorskip("pyarrow")
    broken = arrow.Array.from_buffers(
        arrow.string(), 3, arrow.array([b"one", b"t\xffo", b"three"], arrow.binary()).buffers()
    )
    column = arrow.concat_arrays([broken, arrow.array(["four", None])])
    path = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", {"text": column})
    assert message(lambda: read(path)).startswith(f"{path}:row 2: not valid UTF-8 (byte 0xff)")
    documents = read(path, bad_documents="skip")
    assert [getattr(document, "text", "bad") for document in documents] == ["one", "bad", "three", "four", "bad"]
    assert [document.rule for document in documents if isinstance(document, BadDocument)] == ["bad_utf8", "bad_field"]


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def test_consecutive_members_with_one_key_are_a_sample(tmp_path: Path) -> None:
    record = json.dumps({"caption": "été", "page": {"a": 1}, "url": "https://a.org"}).encode()
    long = "f" * 120 + "/" + "é" * 80
    members = [
        ("a/0.jpg", b"\xff" * 3000),
        ("a/0.txt", b"one"),
        ("a/0.meta.json", record),
        ("README", b"about"),
        ("a/1.txt", b"two"),
        ("a/1.meta.json", b'{"url": null}'),
        (f"{long}.meta.json", record),
        (f"{long}.txt", b"three"),
    ]
    for options in ({"format": tarfile.PAX_FORMAT}, {"format": tarfile.GNU_FORMAT}):
        path = put(tmp_path / "a.tar", tar_of(members, **options))
        documents = read(path, text_field="txt", url_field="meta.json.url")
        assert [(document.text, document.url) for document in documents] == [
            ("one", "https://a.org"),
            ("two", None),
            ("three", "https://a.org"),
        ]
        assert [document.place for document in documents] == [f"{path}/{name}.txt" for name in ("a/0", "a/1", long)]
    path = put(tmp_path / "b.tar", tar_of(members[:3]))
    assert texts(path, text_field="meta.json.caption") == ["été"]
    assert texts(path, text_field="meta.json") == [record.decode()]
    for field, expected in {
        "text": "b.tar/a/0: no field 'text' (fields: jpg, txt, meta.json); set text_field",
        "meta.json.body": "b.tar/a/0.meta.json: no field 'meta.json.body' (fields: jpg, txt, meta.json, meta.json.capt",
        "meta.json.page": "b.tar/a/0.meta.json: field 'meta.json.page' is a dict, not a string",
        "jpg": "b.tar/a/0.jpg: not valid UTF-8 (byte 0xff)",
    }.items():
        assert expected in message(lambda field=field: read(path, text_field=field))


def test_a_sample_with_a_member_twice_is_bad(tmp_path: Path) -> None:
    members = [("0.txt", b"one"), ("0.txt", b"other"), ("1.txt", b"two")]
    path = put(tmp_path / "a.tar", tar_of(members))
    assert "a.tar/0.txt: the sample has two members '0.txt'" in message(lambda: read(path, text_field="txt"))
    bad, good = read(path, text_field="txt", bad_documents="skip")
    assert (bad.rule, good.text) == ("bad_archive", "two")


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    write_arrow(folder / "data-00000-of-00002.arrow", {"text": TEXTS[:25]}, rows_per_batch=10)
    write_arrow(folder / "data-00001-of-00002.arrow", {"text": TEXTS[25:]}, rows_per_batch=10)
    write_arrow(folder / "cache-0123abcd.arrow", {"text": ["result of a map"]})
    put(folder / "state.json", "{}")
    put(folder / "dataset_info.json", "{}")
    put(folder / "README.md", "# Card")
    assert texts(folder) == texts(folder, format="huggingface") == TEXTS


def test_what_the_datasets_library_writes_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(40))})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(tmp_path / "one") == TEXTS
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    said = message(lambda: read(tmp_path / "two"))
    assert said == f"{tmp_path}/two: holds several splits (test, train); give one, e.g. {tmp_path}/two/train*"
    assert texts(tmp_path / "two" / "train*") == texts(tmp_path / "two" / "train") == TEXTS


def test_a_clone_of_a_hub_repository(tmp_path: Path, memory: str) -> None:
    folder = tmp_path / "hub"
    put(folder / "README.md", "---\nlicense: odc-by\n---\n")
    put(folder / "sample" / "10" / "a.jsonl", jsonl(["of the sample"]))
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", {"text": TEXTS[:20]})
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", {"text": TEXTS[20:]})
    assert texts(folder, format="huggingface") == TEXTS
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", {"text": ["of the test"]})
    said = message(lambda: read(folder, format="huggingface"))
    assert said.endswith(f"hub: holds several splits (test, train); give one, e.g. {folder}/data/train*")
    assert texts(folder / "data" / "train*", format="huggingface") == TEXTS
    for file in folder.rglob("*.parquet"):
        put_url(f"{memory}/{file.relative_to(folder)}", file.read_bytes())
    said = message(lambda: read(memory, format="huggingface"))
    assert said.endswith(f"e.g. {memory}/data/train*")
    assert texts(f"{memory}/data/train*", format="huggingface") == TEXTS


# ---- bad data -------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'
MANY = jsonl([random.Random(number).randbytes(300).hex() for number in range(2000)])
TWO_SAMPLES = tar_of([("0.text", b"fine"), ("1.text", b"x" * 600)])
BAD_FILES = [
    pytest.param("a.txt", b"one\ntwo \xff\n", "bad_utf8", ":2: not valid UTF-8 (byte 0xff); convert", id="text"),
    pytest.param("a.txt", b" \n", "empty_file", ": holds no document; remove it", id="blank text"),
    pytest.param("a.jsonl", b"\n\n", "empty_file", ": holds no document; remove it", id="blank JSONL"),
    pytest.param("a.jsonl.gz", gzip.compress(b""), "empty_file", ": holds no document", id="empty gzip"),
    pytest.param("a.jsonl", GOOD + b'{"text": "\xe9"}', "bad_utf8", ":2: not valid UTF-8 (byte 0xe9)", id="JSONL"),
    pytest.param("a.jsonl", GOOD + b'{"text": "cut', "bad_json", ":2: not valid JSON (Unterminated", id="broken line"),
    pytest.param("a.jsonl", GOOD + b"[1]\n", "bad_json", ":2: a JSON list, not an object", id="not an object"),
    pytest.param("a.json", b"[\n" + GOOD + b"]", "bad_json", ":1: not valid JSON (", id="an array of objects"),
    pytest.param("a.jsonl", GOOD + b'{"body": ""}', "bad_field", ":2: no field 'text' (fields: body); set", id="field"),
    pytest.param("a.jsonl", GOOD + b'{"text": null}', "bad_field", ":2: field 'text' is a NoneType, not a", id="null"),
    pytest.param("a.jsonl", b'{"text": "\\ud800"}', "bad_utf8", ":1: an unpaired surrogate at ch", id="surrogate"),
    pytest.param("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "bad_json", ":1: JSON that cannot be", id="digits"),
    pytest.param("a.jsonl", b'{"text":' + b"[" * 10**5, "bad_json", ":1: JSON that cannot be", id="nesting"),
    pytest.param("a.jsonl.gz", b"plain", "bad_archive", ": not a whole gzip file (", id="not gzip"),
    pytest.param("a.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "bad_archive", "gzip file (it ends too early)", id="gzip"),
    pytest.param("a.jsonl.bz2", bz2.compress(GOOD)[:-9], "bad_archive", "bzip2 file (it ends too early)", id="bzip2"),
    pytest.param("a.jsonl.xz", lzma.compress(GOOD)[:-9], "bad_archive", "xz file (it ends too early)", id="xz"),
    pytest.param("a.tar", TWO_SAMPLES[:1024], "bad_archive", "archive (it ends too early)", id="tar, between members"),
    pytest.param("a.tar", TWO_SAMPLES[:1300], "bad_archive", "archive (it ends too early)", id="tar, in a header"),
    pytest.param("a.tar", TWO_SAMPLES[:1700], "bad_archive", "archive (it ends too early)", id="tar, in a member"),
    pytest.param("a.tar", TWO_SAMPLES + TWO_SAMPLES, "bad_archive", "(another one follows it; tars ", id="two tars"),
    pytest.param("a.tar", b"x" * 2000, "bad_archive", ": not a whole tar archive (", id="not a tar"),
    pytest.param("a.tar.gz", gzip.compress(TWO_SAMPLES)[:-9], "bad_archive", "whole gzip file (", id="cut tar.gz"),
]


@pytest.mark.parametrize(("name", "content", "rule", "expected"), BAD_FILES)
def test_bad_data_ends_the_run_or_is_counted(
    tmp_path: Path, name: str, content: bytes, rule: str, expected: str
) -> None:
    path = put(tmp_path / name, content)
    good = put(tmp_path / "z.jsonl", GOOD)
    said = message(lambda: read(path, good))
    assert said.startswith(str(path))
    assert expected in said
    *documents, last = read(path, good, bad_documents="skip")
    assert isinstance(last, Document)
    bad = next(document for document in documents if isinstance(document, BadDocument))
    assert (bad.rule, f"{bad.place}: {bad.message}") == (rule, said)


def test_nothing_of_a_damaged_file_is_read(tmp_path: Path) -> None:
    for name, compress in {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}.items():
        data = compress(MANY)
        put(tmp_path / name, data[: len(data) // 2])
        (bad,) = read(tmp_path / name, bad_documents="skip")
        assert (bad.rule, bad.place) == ("bad_archive", str(tmp_path / name))
        assert "it ends too early" in bad.message
        data = data[: len(data) // 2] + bytes(100) + data[len(data) // 2 + 100 :]
        put(tmp_path / name, data)
        (bad,) = read(tmp_path / name, bad_documents="skip")
        assert bad.rule == "bad_archive"


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_damaged_tables(tmp_path: Path, write: Callable[..., Path]) -> None:
    name = write.__name__.removeprefix("write_")
    path = write(tmp_path / f"a.{name}", {"text": [line.decode() for line in MANY.splitlines()]}, 100)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 3, len(whole) - 8, 3):
        put(path, whole[:cut])
        for task_bytes in (1000, WHOLE):
            said = message(lambda size=task_bytes: read(path, task_bytes=size))
            assert said.startswith(f"{path}: not a whole {name.title()} ")
            *documents, bad = read(path, task_bytes=task_bytes, bad_documents="skip")
            assert bad.rule == "bad_archive"
            assert all(isinstance(document, Document) for document in documents)
    put(path, whole[: len(whole) // 2] + b"x" * 3000 + whole[len(whole) // 2 + 3000 :])
    if name == "parquet":
        assert read(path, bad_documents="skip")[-1].rule == "bad_archive"


def test_an_empty_file_is_counted_where_bad_documents_are_skipped(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz"):
        (bad,) = read(put(tmp_path / name, b""), bad_documents="skip")
        assert (bad.rule, bad.place) == ("empty_file", str(tmp_path / name))
    (bad,) = read(put(tmp_path / "a.tar", b""), bad_documents="skip")
    assert bad.rule == "bad_archive"
    no_rows = pytest.importorskip("pyarrow").array([], "string")
    (bad,) = read(write_parquet(tmp_path / "b.parquet", {"text": no_rows}), bad_documents="skip")
    assert bad.rule == "empty_file"


# ---- tables as they are ---------------------------------------------------------------------------------------------


def write_feather(path: Path, columns: dict[str, object], rows_per_batch: int = 1000) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.feather

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.feather.write_feather(arrow.table(columns), str(path), chunksize=rows_per_batch)
    return path


WRITERS = pytest.mark.parametrize(
    ("name", "write"), [("a.parquet", write_parquet), ("a.arrow", write_arrow), ("a.feather", write_feather)]
)


@WRITERS
def test_columns_of_bytes_are_text(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [*(text.encode() for text in TEXTS[:5]), None, b"caf\xe9"]
    for kind in ("binary", "large_binary"):
        path = write(tmp_path / name, {"text": arrow.array(rows, kind), "id": list(range(7))})
        *documents, null, wrong = read(path, bad_documents="skip")
        assert [document.text for document in documents] == TEXTS[:5]
        assert (null.rule, wrong.rule, wrong.place) == ("bad_field", "bad_utf8", f"{path}:row 7")


@WRITERS
def test_fields_inside_of_others_are_read_by_their_path(tmp_path: Path, name: str, write: Callable[..., Path]) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [{"text": text, "from": {"url": f"http://{number}"}} for number, text in enumerate(TEXTS)]
    path = write(tmp_path / name, {"data": arrow.array([*rows, None]), "a.b": [*TEXTS, "last"]}, 7)
    *documents, null = read(path, text_field="data.text", url_field="data.from.url", bad_documents="skip")
    assert [(each.text, each.url) for each in documents] == [
        (text, f"http://{number}") for number, text in enumerate(TEXTS)
    ]
    assert null.rule == "bad_field" and sum(each.bytes_read for each in [*documents, null]) == path.stat().st_size
    assert texts(path, text_field="a.b") == [*TEXTS, "last"]
    assert "no column 'data.body' (columns: data, a.b)" in message(lambda: read(path, text_field="data.body"))
    assert "column 'data.from' is of type struct<" in message(lambda: read(path, text_field="data.from"))
    lines = "".join(json.dumps({"data": row, "a.b": row["text"]}) + "\n" for row in rows)
    for field in ("data.text", "a.b"):
        found = read(put(tmp_path / "a.jsonl", lines), text_field=field, url_field="data.from.url")
        assert [(each.text, each.url) for each in found] == [(each.text, each.url) for each in documents]
    assert "no field 'data.body'" in message(lambda: read(tmp_path / "a.jsonl", text_field="data.body"))


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_of_two_columns_of_one_name_none_is_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(arrow, "table", lambda columns: columns)
    name = f"a.{write.__name__.removeprefix('write_')}"
    path = write(tmp_path / name, arrow.Table.from_arrays([arrow.array(TEXTS)] * 3, names=["text", "text", "id"]))
    assert f"{path}: two columns 'text'; rename one, or set text_field" in message(lambda: read(path))
    path = write(tmp_path / name, arrow.Table.from_arrays([arrow.array(TEXTS)] * 3, names=["id", "text", "id"]))
    assert texts(path) == TEXTS


def test_feather_is_known_by_name_and_content_and_refused_where_it_is_old_or_cut(tmp_path: Path) -> None:
    path = write_feather(tmp_path / "a.feather", {"text": TEXTS, "id": list(range(len(TEXTS)))}, 7)
    documents = read(path)
    assert [document.text for document in documents] == TEXTS
    assert sum(document.bytes_read for document in documents) == path.stat().st_size
    whole = path.read_bytes()
    assert texts(put(tmp_path / "part-00000", whole)) == TEXTS
    assert texts(put(tmp_path / "b.arrow", whole)) == TEXTS
    assert "a.feather: not a whole Arrow file (" in message(lambda: read(put(path, whole[:-20])))
    assert "Feather of version 1 is not read" in message(lambda: read(put(path, b"FEA1" + bytes(100))))
