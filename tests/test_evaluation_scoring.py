"""The published post-processing and matching: every published verdict, and the rules one by one."""

import json
from pathlib import Path

import pytest

from cola_megatron.config import ConfigError
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.files import read_jsonl
from cola_megatron.evaluation.score_file import score_file
from cola_megatron.evaluation.scoring import (
    cut_generation,
    match_first_word,
    match_option,
    match_text,
    normalize,
    score,
)
from cola_megatron.evaluation.tasks import TASKS, task_named
from tests.test_cli import cola

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "benchmarks"
# Right answers among the first 150 published generations.
PUBLISHED_RIGHT = {
    "lambada": 71,
    "mmlu": 23,
    "obqa": 36,
    "hellaswag": 15,
    "race": 29,
    "siqa": 39,
    "squad": 55,
    "story_cloze": 47,
}
OPTIONS = ["make a new plan", "Go home and see Riley", "Find somewhere to go"]


def published(task: str) -> Path:
    """The published generations of a task; skips the test where they are not beside the repository."""
    path = PUBLISHED / f"{task}.jsonl"
    if not path.is_file():
        pytest.skip(f"the published generations are not here: {path}")
    return path


def write_lines(path: Path, *rows: object) -> Path:
    """One line per row: as it is, or as JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_there_are_verdicts_for_every_task():
    assert PUBLISHED_RIGHT.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_every_published_verdict(task):
    path = published(task)
    expected = {row["id"]: row["published_correct"] for _, row in read_jsonl(path)}
    found = {verdict["id"]: verdict["correct"] for verdict in score_file(TASKS[task], path)}
    assert len(found) == 150
    assert found == expected
    assert sum(found.values()) == PUBLISHED_RIGHT[task]


def test_the_command_answers_with_accuracy_and_verdicts(tmp_path):
    rows = list(read_jsonl(published("race")))
    stripped = [
        {"id": row["id"], "generation": row["published_generation"]}
        | {name: row[name] for name in ("ground_truth", "choices")}
        for _, row in rows
    ]
    file = write_lines(tmp_path / "race.jsonl", *stripped)
    answer = json.loads(cola("eval", "score", "--task", "race", file, "--json"))
    assert answer["accuracy"] == pytest.approx(100 * 29 / 150)
    assert answer["items"] == [{"id": row["id"], "correct": row["published_correct"]} for _, row in rows]
    assert "19.33" in cola("eval", "score", "--task", "race", file)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (" Paris\n\nQuestion: x", " Paris"),
        ("\n\n Paris\nRome", "\n\n Paris"),
        ("\n ... \n Paris", "\n ... \n Paris"),
        ("?!\n\n", "?!\n\n"),
        ("", ""),
        ("a\u2028b\rc\nd", "a\u2028b\rc"),
        ("_\nx", "_"),
    ],
)
def test_a_generation_ends_at_the_first_newline_after_a_word(text, cut):
    assert cut_generation(text) == cut


def test_normalised_text():
    assert normalize("  The “Denver-Broncos”,\u00a0 24\u201310! ") == "the denverbroncos 2410"
    assert normalize("Ünïcode_Ä 中文。") == "ünïcode_ä 中文"
    assert normalize("?!") == ""


def test_the_whole_text_must_match():
    assert match_text(" denver BRONCOS.", "Denver Broncos").correct
    assert not match_text(" The Denver Broncos", "Denver Broncos").correct
    assert not match_text("", "Denver Broncos").correct
    # Long texts of few different letters, which difflib's heuristics for popular elements call different.
    assert match_text("ab " * 100, "ab " * 100).correct
    assert match_text("Paris<|endoftext|>", "Paris").answer == "parisendoftext"


def test_the_first_word_must_match():
    assert match_first_word(" robot, since he has", "robot").correct
    assert match_first_word("\n\n“Robot”", "robot").correct
    assert match_first_word(" the robot", "robot") == match_first_word("the", "robot")
    assert not match_first_word("", "robot").correct


@pytest.mark.parametrize(
    ("generation", "letter"),
    [
        (" find somewhere to go", "C"),
        ("C", "C"),
        (" (c).", "C"),
        ("The answer is B", "B"),
        ("Option: (a)!", "A"),
        ("I choose answer B. No, answer C.", "C"),
        ("it must be [B]", "B"),
        ("the final answer is go home and see riley", "B"),
        ("They find somewhere to go, I think", "C"),
        ("find somwhere to go", "C"),
        ("answer\uff1aC", "C"),
    ],
)
def test_an_option_is_named_by_letter_or_by_text(generation, letter):
    verdict = match_option(generation, OPTIONS["ABC".index(letter)], OPTIONS)
    assert (verdict.answer, verdict.correct) == (letter, True)
    assert not match_option(generation, OPTIONS["BCA".index(letter)], OPTIONS).correct


def test_what_names_no_option_is_wrong():
    for generation in ("", "D", "go", "make a new plan or find somewhere to go", "x" * 41 + " (C)", "answer: "):
        assert not match_option(generation, OPTIONS[2], OPTIONS).correct, generation


def test_a_letter_beyond_the_options_is_read_as_text():
    assert match_option(" i", "i", ["1", "-1", "i", "-i"]).answer == "C"


def test_without_options_the_text_decides():
    assert match_option(" Robot!", "robot", []).correct
    assert not match_option("A", "robot", []).correct


def test_any_of_several_truths_will_do():
    truths = ["two", "2"]
    assert score(match_text, " 2\nContext:", truths).correct
    assert not score(match_text, " 3", truths).correct


# ---- files ----------------------------------------------------------------------------------------------------------


def correct(path: Path, task: str = "siqa") -> list[bool]:
    return [verdict["correct"] for verdict in score_file(TASKS[task], path)]


def test_what_a_file_may_hold(tmp_path):
    row = {"id": 1, "generation": " C", "ground_truth": OPTIONS[2]}
    file = write_lines(
        tmp_path / "generations.jsonl",
        b'\xef\xbb\xbf{"id": "first", "generation": "caf\\u00e9 ", "ground_truth": "Caf\xc3\xa9"}',
        b"",
        row | {"choices": OPTIONS},
        b"   \r",
        row | {"choices": {"B": OPTIONS[1], "A": OPTIONS[0], "C": OPTIONS[2]}},
        row | {"choices": {"text": OPTIONS, "label": ["A", "B", "C"]}},
        row | {"choices": None},
        row | {"ground_truth": ["elsewhere", "C"]},
        row | {"generation": None},
        {"id": 2, "generate": "4", "ground_truth": 4},
        '{"id": 3, "generation": "a b", "ground_truth": "a\u2028b"}'.encode(),
    )
    assert correct(file) == [True, True, True, True, False, True, False, True, True]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"id": 1, "ground_truth": "x"}, r"no field generation \(there are id, ground_truth\)"),
        ({"id": 1, "generation": "x"}, "no field ground_truth"),
        ({"generation": "x", "ground_truth": "x"}, "no field id"),
        ({"id": 1, "generation": 5, "ground_truth": "x"}, "generation must be a string, not int"),
        ({"id": 1, "generation": "x", "ground_truth": []}, "ground_truth is an empty list"),
        ({"id": 1, "generation": "x", "ground_truth": None}, "ground_truth must hold texts, not null"),
        ({"id": 1, "generation": "x", "ground_truth": {"a": 1}}, "ground_truth must hold texts, not an object"),
        ({"id": 1, "generation": "x", "ground_truth": "x", "choices": "A"}, "choices must be a list"),
        ({"id": 1, "generation": "x", "ground_truth": "x", "choices": {"A": "x", "C": "y"}}, "choices must hold texts"),
        ({"id": [1], "generation": "x", "ground_truth": "x"}, "id must be an integer or a string, not a list"),
        (b'{"id": 1', r"not JSON \(.* at column 9\)"),
        (b"[1]", "a JSON object was expected, not list"),
        (b'{"id": "\xff"}', r"not UTF-8 \(byte 9\)"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, complaint):
    right = {"id": 0, "generation": "x", "ground_truth": "x"}
    file = write_lines(tmp_path / "generations.jsonl", right, b"", line)
    with pytest.raises(EvaluationError, match=rf"generations.jsonl:3: {complaint}") as error:
        score_file(TASKS["siqa"], file)
    assert "\n" not in str(error.value)


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="holds no generations"):
        score_file(TASKS["race"], write_lines(tmp_path / "empty.jsonl", b""))
    with pytest.raises(ConfigError, match=r"task 'races' is unknown; the tasks are lambada, mmlu"):
        task_named("races")
    with pytest.raises(FileNotFoundError):
        cola("eval", "score", "--task", "race", tmp_path / "missing.jsonl")
