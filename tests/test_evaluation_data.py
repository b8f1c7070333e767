"""Task data: prompts exactly as published, from every form in which the data may lie here."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.files import read_jsonl
from cola_megatron.evaluation.items import read_items
from cola_megatron.evaluation.prompts import Question, lettered
from cola_megatron.evaluation.tasks import TASKS
from tests.test_evaluation_scoring import published

Row = dict[str, Any]
SHOTS = dict.fromkeys(TASKS, 2) | {"lambada": 0, "race": 1, "squad": 1}


def asked_text(task: str, row: Row) -> str:
    """The question's own text, cut out of a published prompt."""
    template = TASKS[task].template
    if not template.lead:
        return row["prompt"]
    start = row["prompt"].rindex(template.lead) if task != "squad" else row["prompt"].rindex("\n\nContext: ") + 2
    text = row["prompt"][start + len(template.lead) :]
    tail = [template.options_heading] * bool(template.options_heading) + lettered(row.get("choices", []))
    ending = "".join(f"\n{line}" for line in [*tail, template.cue] if line)
    assert text.endswith(ending)
    return text.removesuffix(ending)


def original_row(task: str, row: Row) -> Row:
    """A published item under the column names of its dataset."""
    text, choices = asked_text(task, row), row.get("choices", [])
    right = choices.index(row["ground_truth"]) if choices else None
    if task == "lambada":
        return {"text": f"{text} {row['ground_truth']}"}
    if task == "mmlu":
        return {"question": text, "subject": "any", "choices": choices, "answer": right}
    if task == "obqa":
        labels = ["A", "B", "C", "D"]
        return {
            "question_stem": text,
            "choices": {"text": choices, "label": labels},
            "answerKey": labels[right],
        }
    if task == "hellaswag":
        return {"ctx": text, "ctx_a": "unused", "endings": choices, "label": str(right)}
    if task == "race":
        article, _, question = text.partition(" ")
        return {"article": article, "question": question, "options": choices, "answer": "ABCD"[right]}
    if task == "siqa":
        answers = dict(zip(("answerA", "answerB", "answerC"), choices, strict=True))
        return {"context": "left out", "question": text, **answers, "label": str(right + 1)}
    if task == "squad":
        context, _, question = text.rpartition("\nQuestion: ")
        answers = {"text": [row["ground_truth"], "another"], "answer_start": [0, 0]}
        return {"id": row["id"], "context": context, "question": question, "answers": answers}
    sentences = [*text.split(" ", 3), "", "", ""][:4]
    names = [f"input_sentence_{number}" for number in range(1, 5)]
    return dict(zip(names, sentences, strict=True)) | {
        "sentence_quiz1": choices[0],
        "sentence_quiz2": choices[1],
        "answer_right_ending": right + 1,
    }


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def siqa_row(label: int = 1) -> Row:
    answers = {"answerA": "leave", "answerB": "stay", "answerC": "sing"}
    return {"context": "Kai was tired.", "question": "What will Kai do?", **answers, "label": str(label)}


def test_the_number_of_shots():
    assert {name: task.template.shots for name, task in TASKS.items()} == SHOTS


@pytest.mark.parametrize("task", TASKS)
def test_the_template_renders_the_published_prompts(task):
    for _, row in read_jsonl(published(task)):
        question = Question(asked_text(task, row), row["ground_truth"], tuple(row.get("choices", [])))
        assert TASKS[task].template.render(question) == row["prompt"]


@pytest.mark.parametrize("task", TASKS)
def test_original_columns_give_the_published_prompts(task, tmp_path):
    rows = [row for _, row in read_jsonl(published(task))][:20]
    write_jsonl(tmp_path / task / f"{TASKS[task].dataset.split}.jsonl", [original_row(task, row) for row in rows])
    items = read_items(tmp_path, TASKS[task])
    for item, row in zip(items, rows, strict=True):
        assert item.prompt == row["prompt"]
        assert item.truths == (row["ground_truth"],)
        assert list(item.options) == row.get("choices", [])
    # The published ids are positions, but for SQuAD; the first published item is the dataset's first.
    assert items[0].id == rows[0]["id"]


@pytest.mark.parametrize("task", TASKS)
def test_the_published_files_are_read_as_they_are(task, tmp_path):
    path = published(task)
    (tmp_path / path.name).write_bytes(path.read_bytes())
    items = read_items(tmp_path, TASKS[task], limit=3)
    rows = [row for _, row in read_jsonl(path)][:3]
    assert [(item.id, item.prompt, item.truths) for item in items] == [
        (row["id"], row["prompt"], (row["ground_truth"],)) for row in rows
    ]


# ---- forms of files -------------------------------------------------------------------------------------------------


def write_csv(folder: Path) -> None:
    sentences = {f"InputSentence{number}": f"Sentence {number}, of four." for number in range(1, 5)}
    endings = {"RandomFifthSentenceQuiz1": "Wrong.", "RandomFifthSentenceQuiz2": "Right.", "AnswerRightEnding": 2}
    with (folder / "cloze_test_test__spring2016.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["InputStoryid", *sentences, *endings])
        writer.writeheader()
        writer.writerow({"InputStoryid": "x", **sentences, **endings})


def write_squad_json(folder: Path) -> None:
    question = {"id": "q1", "question": "Who?", "answers": [{"text": "Kai", "answer_start": 0}]}
    document = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "Kai.", "qas": [question]}]}]}
    (folder / "dev-v1.1.json").write_text(json.dumps(document))


def write_nested_obqa(folder: Path) -> None:
    choices = [{"text": text, "label": label} for text, label in zip(("up", "down", "in", "out"), "ABCD", strict=True)]
    row = {"id": "8-1", "question": {"stem": "Which way?", "choices": choices}, "answerKey": "B"}
    write_jsonl(folder / "Main" / "test.jsonl", [row])


def write_list(folder: Path) -> None:
    (folder / "val.json").write_text(json.dumps([siqa_row(2)]))


@pytest.mark.parametrize(
    ("task", "write", "asked", "truth"),
    [
        ("story_cloze", write_csv, "Sentence 3, of four. Sentence 4, of four.\n(A) Wrong.\n(B) Right.\nEnd:", "Right."),
        ("squad", write_squad_json, "\n\nContext: Kai.\nQuestion: Who?\nAnswer:", "Kai"),
        ("obqa", write_nested_obqa, "Question: Which way?\n(A) up\n(B) down\n(C) in\n(D) out\nAnswer:", "down"),
        ("siqa", write_list, "What will Kai do?\n(A) leave\n(B) stay\n(C) sing\nAnswer:", "stay"),
    ],
)
def test_the_originals_own_files(tmp_path: Path, task: str, write: Callable[[Path], None], asked: str, truth: str):
    (tmp_path / task).mkdir()
    write(tmp_path / task)
    (item,) = read_items(tmp_path, TASKS[task])
    assert item.prompt.endswith(asked)
    assert item.truths == (truth,)


def write_arrow(path: Path, rows: list[Row]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_data_sets_saved_to_disk(tmp_path):
    folder = tmp_path / "all" / "siqa"
    write_arrow(folder / "train" / "data-00000-of-00001.arrow", [siqa_row(1)])
    for shard in range(2):
        write_arrow(folder / "validation" / f"data-0000{shard}-of-00002.arrow", [siqa_row(2 + shard)])
    write_arrow(folder / "validation" / "cache-0123.arrow", [siqa_row(1)])
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    items = read_items(tmp_path / "all", TASKS["siqa"])
    assert [(item.id, item.truths) for item in items] == [(0, ("stay",)), (1, ("sing",))]
    single = tmp_path / "one" / "siqa"
    write_arrow(single / "data-00000-of-00001.arrow", [siqa_row(1)])
    for state in ({}, {"_split": None}, {"_split": "validation"}):
        (single / "state.json").write_text(json.dumps(state))
        assert len(read_items(tmp_path / "one", TASKS["siqa"])) == 1
    (single / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    with pytest.raises(EvaluationError, match=r"data-00000-of-00001.arrow: not an Arrow stream"):
        read_items(tmp_path / "one", TASKS["siqa"])
    (single / "state.json").write_text('{"_split": "train"}')
    with pytest.raises(EvaluationError, match="names the split validation"):
        read_items(tmp_path / "one", TASKS["siqa"])


def test_parquet_files_of_the_hub(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(name: str, answer: int) -> None:
        (tmp_path / "mmlu" / name).mkdir(parents=True)
        row = {"question": "1 + 1?", "subject": name, "choices": ["1", "2", "3", "4"], "answer": answer}
        for split in ("test", "dev"):
            path = tmp_path / "mmlu" / name / f"{split}-00000-of-00001.parquet"
            parquet.write_table(pyarrow.Table.from_pylist([row]), path)

    write("anatomy", 0)
    write("virology", 1)
    assert [item.truths[0] for item in read_items(tmp_path, TASKS["mmlu"])] == ["1", "2"]
    write("all", 2)
    assert [item.truths[0] for item in read_items(tmp_path, TASKS["mmlu"])] == ["3"]
    (tmp_path / "mmlu" / "all" / "test-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(EvaluationError, match="not a parquet file"):
        read_items(tmp_path, TASKS["mmlu"])


# ---- wrong use ------------------------------------------------------------------------------------------------------


def test_missing_data_are_named_with_the_dataset(tmp_path):
    with pytest.raises(EvaluationError, match=r"no data for race: put race.jsonl.*ehovy/race \(all, split test\)"):
        read_items(tmp_path, TASKS["race"])
    write_jsonl(tmp_path / "siqa" / "train.jsonl", [siqa_row()])
    with pytest.raises(EvaluationError, match=r"none of its 1 data files names the split validation"):
        read_items(tmp_path, TASKS["siqa"])
    write_jsonl(tmp_path / "siqa" / "dev.jsonl", [siqa_row()])
    write_jsonl(tmp_path / "siqa" / "dev_hard.jsonl", [siqa_row()])
    with pytest.raises(EvaluationError, match=r"several files may be .*\(dev.jsonl, dev_hard.jsonl\)"):
        read_items(tmp_path, TASKS["siqa"])


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"question": "x"}], r"siqa.jsonl:1: no column answerA among question; is this allenai/social_i_qa"),
        ([siqa_row(), siqa_row(4)], r"siqa.jsonl:2: not a row of .*: the right answer is number 4 of 3"),
        ([siqa_row() | {"label": ""}], r"siqa.jsonl:1: not a row of"),
        ([{"prompt": "x", "ground_truth": "x"}], r"siqa.jsonl:1: no field id"),
        ([{"id": 1, "prompt": 5, "ground_truth": "x"}], r"siqa.jsonl:1: prompt must be a string"),
        ([{"id": 1, "prompt": "x", "ground_truth": "x"}] * 2, r"siqa.jsonl:2: id 1 was already at .*siqa.jsonl:1"),
        ([], r"siqa.jsonl: holds no items"),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, complaint):
    write_jsonl(tmp_path / "siqa.jsonl", rows)
    with pytest.raises(EvaluationError, match=complaint) as error:
        read_items(tmp_path, TASKS["siqa"])
    assert "\n" not in str(error.value)


def test_a_lambada_passage_needs_two_words(tmp_path):
    write_jsonl(tmp_path / "lambada.jsonl", [{"text": "alone"}])
    with pytest.raises(EvaluationError, match="fewer than two words"):
        read_items(tmp_path, TASKS["lambada"])
