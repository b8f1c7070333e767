"""Folders as they are: every file of them is read, or named with the reason why not."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from data_prep.documents import BadDocument, Part
from data_prep.errors import DataPrepError
from data_prep.plan import _grouped, make_plan
from data_prep.prepare import begin, prepare
from data_prep.readers import find_parts, read_part
from data_prep.recipe import SourceSettings
from launchers.cli import app
from tests.test_data_prep import document, run, settings_for
from tests.test_data_readers import jsonl, read, texts, zstd

TEXTS = [f"Page {number}, été\nand a second line" for number in range(30)]
PAGE = "<html><head><title>T</title></head><body><nav>Menu</nav><article><p>{}</p></article></body></html>"


def compressed(data: bytes, codec: str) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    sink = arrow.BufferOutputStream()
    with arrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def csv_of(rows: list[str], separator: str = ",") -> bytes:
    quoted = ['"' + row.replace('"', '""') + '"' for row in rows]
    return "".join(f"{number}{separator}{row}\r\n" for number, row in enumerate(quoted)).encode()


def warc(records: list[tuple[str, str, str]]) -> bytes:
    """Records of (kind, content type, content); each a gzip member of its own, as on the web."""
    pytest.importorskip("warcio")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    for number, (kind, content_type, content) in enumerate(records):
        headers = StatusAndHeaders("200 OK", [("Content-Type", content_type)], protocol="HTTP/1.0")
        record = writer.create_warc_record(
            f"http://example.org/{number}",
            kind,
            payload=io.BytesIO(content.encode()),
            http_headers=headers if kind == "response" else None,
            warc_content_type=content_type if kind == "conversion" else "application/http",
        )
        writer.write_record(record)
    return buffer.getvalue()


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.jsonl": jsonl(TEXTS[:3]),
        "b.jsonl.lz4": compressed(jsonl(TEXTS[3:6]), "lz4"),
        "c.jsonl.br": compressed(jsonl(TEXTS[6:9]), "brotli"),
        "d.csv": b"id,text\r\n" + csv_of(TEXTS[9:12]),
        "e.tsv.gz": gzip.compress(b"id\ttext\r\n" + csv_of(TEXTS[12:15], "\t")),
        "f.text": TEXTS[15].encode(),
        "g.warc.gz": warc([("conversion", "text/plain", text) for text in TEXTS[16:18]]),
        "part-00000": jsonl(TEXTS[18:20]),
        "part-00001": zstd(jsonl(TEXTS[20:22])),
        "part-00002.gz": gzip.compress(jsonl(TEXTS[22:24])),
        "README.md": b"---\nlicense: mit\n---\nA dataset.",
        "page.html": PAGE.format("x").encode(),
        "labels.csv": b"id,label\r\n1,good\r\n",
        "notes.docx": b"x",
        "Makefile": b"all:\n\ttrue\n",
        ".nfs000001": b"x",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    left: dict[str, str] = {}
    chosen = SourceSettings(name="web", inputs=[str(folder)])
    parts = find_parts(chosen, 2**30, lambda location, why: left.update({Path(location).name: why}))
    assert [each.text for part in parts for each in read_part(part, chosen)] == TEXTS[:24]
    assert left.keys() == {"README.md", "page.html", "labels.csv", "notes.docx", "Makefile", ".nfs000001"}
    assert "markup" in left["page.html"] and "content is no JSONL" in left["Makefile"]

    shown = CliRunner().invoke(app, ["prep", "run", str(folder), "--output", str(tmp_path / "out"), "--dry-run"])
    assert shown.output.count("leaves out") == 6 and "page.html (markup" in shown.output


def test_the_run_and_its_report_name_what_was_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl([document(seed) for seed in range(60)]))
    (folder / "page.html").write_text("<p>x</p>")
    options = [
        "--output",
        tmp_path / "out",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
        "--workers",
        "1",
        "--held-out-fraction",
        "0.2",
    ]
    done = CliRunner().invoke(app, ["prep", "run", str(folder), *map(str, options)])
    assert done.exit_code == 0 and f"source text: leaves out {folder}/page.html (markup" in done.output
    shown = CliRunner().invoke(app, ["prep", "stats", str(tmp_path / "out")])
    assert f"{folder}/page.html (markup" in shown.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["text"]
    assert [Path(each["location"]).name for each in report["left_out"]] == ["page.html"]


def test_a_readme_among_text_files_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("one")
    (tmp_path / "a.txt").write_text("two")
    assert texts(tmp_path) == ["one", "two"]


def test_a_folder_of_unknown_files_says_which(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>x</p>")
    with pytest.raises(DataPrepError, match=r"holds no .*; give a folder with data; .*page\.html is left out: markup"):
        texts(tmp_path)


def test_pages_in_a_warc_are_their_main_text(tmp_path: Path) -> None:
    pytest.importorskip("lxml_html_clean")
    paragraph = "The grey ship sailed slowly north while nobody on the iron deck spoke a single word. " * 4
    records = [
        ("response", "text/html; charset=utf-8", PAGE.format(paragraph)),
        ("response", "image/png", "x"),
        ("response", "text/plain", "plain"),
    ]
    path = tmp_path / "a.warc.gz"
    path.write_bytes(warc(records))
    page, image, plain = read(path)
    assert page.text == paragraph.strip() and page.url == "http://example.org/0"
    assert isinstance(image, BadDocument) and image.rule == "not_text" and plain.text == "plain"
    plain_warc = tmp_path / "b.warc"
    plain_warc.write_bytes(gzip.decompress(path.read_bytes())[:-12])
    with pytest.raises(DataPrepError, match=r"b\.warc: not a whole WARC file"):
        read(plain_warc)


@pytest.mark.parametrize("codec", ["lz4", "brotli"])
def test_cut_files_are_damaged(tmp_path: Path, codec: str) -> None:
    path = tmp_path / f"a.jsonl.{'br' if codec == 'brotli' else codec}"
    path.write_bytes(compressed(jsonl(TEXTS), codec)[:-5])
    with pytest.raises(DataPrepError, match=f"not a whole {codec} file"):
        read(path)


def test_rows_that_are_no_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\n1,one\n2\n3,\xff\n4,four\n")
    with pytest.raises(DataPrepError, match=r"a\.csv:3: 1 fields, the header has 2"):
        read(path)
    found = read(path, bad_documents="skip")
    assert [getattr(each, "rule", None) or each.text for each in found] == ["one", "bad_csv", "bad_utf8", "four"]
    with pytest.raises(DataPrepError, match=r"a\.csv: no column 'body' \(columns: id, text\); set text_field"):
        read(path, text_field="body")


def test_planning_takes_linear_time_in_small_files() -> None:
    parts = [
        Part(source="web", location=f"/{number}.txt", format="text", bytes=1, version="1") for number in range(60_000)
    ]
    began = time.monotonic()
    groups = list(_grouped(parts, 50_000))
    assert time.monotonic() - began < 20, "two minutes where every file adds up those before it"
    assert [len(group.parts) for group in groups] == [50_000, 10_000]


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("two")
    left: dict[str, str] = {}
    for inputs in ([str(tmp_path)], [f"{tmp_path}/*.txt"]):
        left.clear()
        found = find_parts(SourceSettings(name="web", inputs=inputs), 100, lambda place, why: left.update({place: why}))
        assert [Path(part.location).name for part in found] == ["a.txt"]
        assert left == {f"{tmp_path}/caf\\xe9.txt": "its name is not UTF-8; rename it, e.g. with convmv"}
    with pytest.raises(DataPrepError, match=r"caf\\xe9\.txt: its name is not UTF-8"):
        texts(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))


def test_members_whose_names_are_not_utf8_are_documents(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        member = tarfile.TarInfo("é.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    (found,) = read(tmp_path / "a.tar", text_field="txt")
    assert found.text == "one" and found.place.endswith("a.tar/\\xe9.txt")


def test_a_corrupt_file_gives_no_garbage_under_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl(TEXTS), compresslevel=0)  # stored: a flipped bit is seen by the checksum alone
    place = whole.index(b"Page 7,")
    path.write_bytes(whole[:place] + b"Pagf" + whole[place + 4 :])
    (bad,) = read(path, bad_documents="skip")
    assert isinstance(bad, BadDocument) and bad.rule == "bad_archive" and "data check" in bad.message
    for cut in (whole[:-9], gzip.compress(jsonl(TEXTS)) + whole[:-9]):
        path.write_bytes(cut)
        (bad,) = read(path, bad_documents="skip")
        assert bad.rule == "bad_archive" and "it ends too early" in bad.message


def left_out_of(*inputs: object) -> tuple[list[str], dict[str, str]]:
    """What is found, and what is left out by name, with the reason."""
    left: dict[str, str] = {}
    chosen = SourceSettings(name="web", inputs=list(map(str, inputs)))
    found = find_parts(chosen, 2**30, lambda place, why: left.update({Path(place).name: why}))
    return [each.text for part in found for each in read_part(part, chosen)], left


def test_a_link_beside_what_it_links_to_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "latest").symlink_to("2024")
    (tmp_path / "a_link.txt").symlink_to("b.txt")
    for inputs in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**", f"{tmp_path}/**/*.txt"):
        found, left = left_out_of(inputs)
        assert found == ["one", "two"], inputs
        assert left["a_link.txt"] == f"a link to {tmp_path}/b.txt, which is read once"
        assert "latest" in left or left["a.txt"].endswith("2024/a.txt, which is read once")


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    for name in ("in", "there"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / f"{name}.txt").write_text(name)
        for number in range(3):
            other = {"in": "there", "there": "in"}[name]
            (tmp_path / name / f"link_{number}").symlink_to(tmp_path / other)
            (tmp_path / name / f"deep_link_{number}").symlink_to(tmp_path / other / "deep")
            (tmp_path / name / "deep" / f"up_{number}").symlink_to(tmp_path)
    for inputs in (tmp_path / "in", f"{tmp_path}/in/**/*.txt", f"{tmp_path}/i*/**/*.txt"):
        found, left = left_out_of(inputs)
        assert sorted(found) == ["in", "there"], inputs
        assert left["up_0"] == "a link to a folder around it"
        assert "which is read by that name" in left["link_2"]


def test_a_pattern_of_any_depth_means_what_it_did(tmp_path: Path) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/z/d.txt", "x/.hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).stem)
    for pattern in ("**/*.txt", "x/**/*.txt", "**/y/*.txt", "**/y", "x/**", "*/y/**/*.txt", "**/[cd].txt", "**"):
        means = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        means = [file for each in means for file in ([each] if os.path.isfile(each) else Path(each).rglob("*.txt"))]
        wanted = {Path(each).stem for each in means} - {"e"}
        assert set(left_out_of(f"{tmp_path}/{pattern}")[0]) == wanted, pattern


@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_an_output_inside_of_the_input_is_no_input(tmp_path: Path, pattern: str) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(document(number))
    (tmp_path / "README.md").write_text(document(60))
    output = run(f"{tmp_path}{pattern}", tmp_path / "out")
    before = (output / "report.json").read_bytes()
    assert run(f"{tmp_path}{pattern}", tmp_path / "out") == output, "already prepared"
    plan = make_plan(settings_for(f"{tmp_path}{pattern}", output))
    assert len(plan.inputs[0].parts) == 61 and [each.why for each in plan.left_out["text"]] in (
        [],
        ["this preparation makes it"],
    )
    assert (output / "report.json").read_bytes() == before


def test_all_empty_files_are_named_in_one_message(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.txt"):
        (tmp_path / name).write_text("text" if name == "d.txt" else "")
    with pytest.raises(
        DataPrepError, match=r"^3 files are empty; remove them .*: /.*/a\.txt, .*/b\.jsonl, .*c\.jsonl\.gz$"
    ):
        texts(tmp_path)
    rules = [getattr(each, "rule", None) for each in read(tmp_path, bad_documents="skip")]
    assert rules == ["empty_file", "empty_file", "empty_file", None]


@pytest.mark.parametrize("indent", [1, 4])
@pytest.mark.parametrize("content", [[{"text": "one"}, {"text": "two"}], {"text": "one"}])
def test_json_over_several_lines_has_its_cure(tmp_path: Path, indent: int, content: object) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    with pytest.raises(DataPrepError, match=r"a\.json:1: .*over several lines; .* an array with jq -c '\.\[\]'"):
        texts(tmp_path)


def test_an_option_serves_every_cure_that_a_message_names(tmp_path: Path) -> None:
    (tmp_path / "part.x").write_bytes(b"{\n" + jsonl([document(seed) for seed in range(60)]))

    def run_with(*options: str) -> Result:
        where = [str(tmp_path / "part.x"), "--output", str(tmp_path / "out"), "--workers", "1"]
        fixed = ["--sequence-length", "32", "--vocab-size", "300", "--held-out-fraction", "0.2"]
        return CliRunner().invoke(app, ["prep", "run", *where, *fixed, *options])

    assert "set format" in str(run_with().exception)
    assert run_with("--format", "jsonl").exception is not None
    done = run_with("--format", "jsonl", "--bad-documents", "skip", "--padding", "<fill>")
    assert done.exit_code == 0 and "removed bad_json 1 (1.6%)" in done.output
    refused = run_with("--held-out-fraction", "0")
    assert "held_out_fraction=0: training measures on" in str(refused.exception)


def test_a_file_written_again_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([document(seed) for seed in range(60)]))
    output = run(path, tmp_path / "out")
    os.utime(path, (time.time() + 60, time.time() + 60))
    with pytest.raises(
        DataPrepError, match=r"a\.jsonl was written at 20.*; if its content is as before, the folder is"
    ):
        run(path, output)


def test_what_cannot_be_removed_is_out_of_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a file that another process holds stays behind as .nfs0001."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([document(seed) for seed in range(60)]))
    real = shutil.rmtree

    def remove(folder: Path, ignore_errors: bool = False) -> None:
        existed = Path(folder).exists()
        real(folder, ignore_errors=True)
        if not existed:
            return
        Path(folder).mkdir()
        (Path(folder) / ".nfs0001").write_text("held")
        if not ignore_errors:
            raise OSError("directory not empty")

    plan = make_plan(settings_for(path, tmp_path / "out"))
    work = begin(plan)
    assert work is not None
    work.run("clean", 0, lambda folder: {})
    monkeypatch.setattr(shutil, "rmtree", remove)
    work.forget("clean", 0)
    assert not work.is_finished("clean", 0)
    output = prepare(settings_for(path, tmp_path / "out", held_out_fraction=0.3), progress=False, force=True)
    assert not (tmp_path / "out.work").exists()
    assert prepare(settings_for(path, output), progress=False, force=True) == output


@pytest.mark.parametrize(
    ("variables", "exit_code", "said"),
    [
        ({"LC_ALL": "C"}, 0, "ü.docx (files named .docx"),
        ({"PYTHONIOENCODING": "ascii"}, 0, "\\xfc.docx (files named .docx"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 1, "read as ascii here; set PYTHONUTF8=1"),
    ],
)
def test_any_locale_prints_any_name(tmp_path: Path, variables: dict[str, str], exit_code: int, said: str) -> None:
    (tmp_path / "é.jsonl").write_bytes(jsonl(["one"]))
    (tmp_path / "ü.docx").write_text("x")
    command = [sys.executable, "-m", "launchers.cli", "prep", "run", str(tmp_path), "--output", "out", "--dry-run"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == exit_code and said in done.stdout + done.stderr
