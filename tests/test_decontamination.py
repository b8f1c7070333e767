"""Evaluation items in training documents: planted ones are found, clean documents stay, and the report says which."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.items import Item, read_items
from cola_megatron.evaluation.prompts import Question
from cola_megatron.evaluation.tasks import TASKS
from data_prep.clean.hashes import SubstringHashes
from data_prep.clean.settings import DecontaminationSettings
from data_prep.decontaminate import ContaminationIndex, wordings
from tests.real_documents import real_documents
from tests.test_evaluation_scoring import PUBLISHED, published

LONG = Question(
    "A painter who has lost her ladder wants to reach the ceiling of a very high room in an old castle. "
    "What should she borrow from the gardener?",
    "the ladder he uses for the apple trees",
    ("a watering can", "the ladder he uses for the apple trees", "his hat"),
)
# Ten words, and fifteen with the answer.
SHORT = Question("Why did the gardener lend his ladder to her yesterday?", "because she asked him kindly", ("a", "b"))
# Six words, with the answer nine.
TINY = Question("What does the gardener grow there?", "mostly old apples", ("a", "mostly old apples"))
# Never long enough.
TOO_SHORT = Question("Who painted it?", "She did")
# A question that is asked again and again.
COMMON = "Which of the following statements about the subject is correct?"
COMMONS = [
    Question(COMMON, answer, (answer, "none of these sentences is true at all"))
    for answer in ("every bridge needs a river below it", "some rivers have no bridge anywhere")
]
QUESTIONS = [LONG, SHORT, TINY, TOO_SHORT, *COMMONS]
DOCUMENT = "It was a long day in the village, and {} Then the rain began to fall on the roofs of the barns again."


def write_task(folder: Path, task: str, questions: list[Question]) -> None:
    """Items as they are sent, demonstrations included."""
    rows = [
        {
            "id": number,
            "prompt": TASKS[task].template.render(question),
            "ground_truth": question.answer,
            "choices": list(question.options) or None,
        }
        for number, question in enumerate(questions)
    ]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def index(tmp_path: Path) -> ContaminationIndex:
    write_task(tmp_path, "mmlu", QUESTIONS)
    return ContaminationIndex.build(DecontaminationSettings(folder=tmp_path, tasks=["mmlu"]))


def found(index: ContaminationIndex, text: str) -> list[Any]:
    return [item for _, item in index.hits(DOCUMENT.format(text))]


def test_a_planted_question_is_found(index):
    assert index.hits(DOCUMENT.format(LONG.text)) == [("mmlu", 0)]
    assert found(index, LONG.text.upper().replace(" ", " -- ")) == [0]
    assert found(index, SHORT.text) == [1]
    assert found(index, f"{TINY.text} {TINY.answer}") == [2]
    assert found(index, f"{TINY.text}\n(A) a\n(B) mostly old apples") == [2]
    assert found(index, f"{LONG.text} {SHORT.text}") == [0, 1]


def test_thirteen_words_are_enough_and_twelve_are_not(index):
    words = LONG.text.split()
    for start in range(len(words) - 12):
        assert found(index, " ".join(words[start : start + 13])) == [0]
    assert found(index, " ".join(words[:12])) == []
    # A short item counts only as a whole.
    assert found(index, " ".join(SHORT.text.split()[:9])) == []
    assert found(index, TINY.text) == []
    assert found(index, f"{TOO_SHORT.text} {TOO_SHORT.answer}") == []


def test_a_common_question_tells_no_item_apart(index):
    assert found(index, COMMON) == []
    assert found(index, f"{COMMON} {COMMONS[1].answer}") == [5]


def test_demonstrations_and_words_of_the_template_are_no_contamination(index):
    template = TASKS["mmlu"].template
    for shot in template.demonstrations:
        assert found(index, template.render(shot).replace(shot.text, "")) == []
    assert found(index, template.render(Question("", "", ()))) == []


def test_wordings_of_every_template():
    for task in TASKS.values():
        item = Item(0, task.template.render(LONG), (LONG.answer,), LONG.options)
        question, answered, *others = wordings(item, task)
        assert question == LONG.text
        assert answered == f"{LONG.text} {LONG.answer}"
        assert [text.startswith(LONG.text) and "(C) his hat" in text for text in others] == [True]


def test_a_passage_is_searched_by_itself():
    passage = "The castle above the village was built by a duke who never lived in it, as people still tell."
    item = Item(0, TASKS["squad"].template.render(Question(f"{passage}\nQuestion: {TINY.text}", "a duke")), ("a duke",))
    assert wordings(item, TASKS["squad"]) == [TINY.text, f"{TINY.text} a duke", passage]


def test_prompts_in_another_form_are_searched_whole():
    item = Item(0, "An own prompt without any template", ("right",))
    assert wordings(item, TASKS["mmlu"]) == [item.prompt, f"{item.prompt} right"]


def test_the_report_has_what_it_needs(index):
    assert index.items == {"mmlu": 6}
    assert index.searched == {"mmlu": 5}
    shared = index.shared_words(DOCUMENT.format(f"{SHORT.text} {LONG.text}"))
    assert shared == {
        ("mmlu", 0): "a painter who has lost her ladder wants to reach the ceiling of",
        ("mmlu", 1): "why did the gardener lend his ladder to her yesterday",
    }


def test_an_index_comes_back_from_its_files(index, tmp_path):
    (tmp_path / "index").mkdir()
    index.save(tmp_path / "index")
    loaded = ContaminationIndex.load(tmp_path / "index")
    for text in (LONG.text, SHORT.text, "nothing", ""):
        assert loaded.shared_words(text) == index.shared_words(text)
    assert (loaded.items, loaded.searched) == (index.items, index.searched)


def test_ngrams_of_another_length(tmp_path):
    write_task(tmp_path, "lambada", [LONG])
    settings = DecontaminationSettings(folder=tmp_path, tasks=["lambada"], ngram=5, shortest=5)
    index = ContaminationIndex.build(settings)
    assert index.hits("wants to reach the ceiling") == [("lambada", 0)]
    assert index.hits("wants to reach the roof") == []
    with pytest.raises(ValueError, match="shortest=8: must be at most ngram=5"):
        DecontaminationSettings(folder=tmp_path, ngram=5)
    with pytest.raises(ValueError, match="task 'boolq' is unknown; the tasks are lambada"):
        DecontaminationSettings(folder=tmp_path, tasks=["boolq"])


def test_missing_sets_are_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"holds no data for squad.*cola downloads nothing"):
        ContaminationIndex.build(DecontaminationSettings(folder=tmp_path, tasks=["squad"]))


@pytest.mark.parametrize(
    "text", ["", "a", "!?", "x" * 10**6, "word " * 200_000, "😀 " * 99, "\0", "_", "ǅ İ ﬁ " * 99, "\ud800"]
)
def test_unusual_documents_have_no_hits(index, text):
    assert index.hits(text) == []


def planted(item: Item, task: str, chooser: random.Random) -> str:
    """A real document with an item in its middle: as a page would quote it, with other marks and cases."""
    texts = wordings(item, TASKS[task])
    text = chooser.choice([texts[1], texts[1].upper(), texts[1].replace(" ", "  "), "\n".join(texts[1].split(". "))])
    before, after = chooser.sample(real_documents(1000), 2)
    return f"{before}\n\n{text}\n\n{after}"


def test_planted_questions_of_all_eight_tasks_are_found_and_real_documents_stay():
    for task in TASKS:
        published(task)
    index = ContaminationIndex.build(DecontaminationSettings(folder=PUBLISHED))
    chooser = random.Random(0)
    for task in TASKS.values():
        items = read_items(PUBLISHED, task)
        assert index.searched[task.name] >= 0.95 * index.items[task.name] > 0
        missed = [
            item.id for item in items if (task.name, item.id) not in index.hits(planted(item, task.name, chooser))
        ]
        # With the answer these have fewer than eight words; only their printed options are searched.
        short = [item.id for item in items if len(wordings(item, task)[1].replace("-", " ").split()) < 8]
        assert set(missed) <= set(short), task.name
        assert len(short) < 0.2 * len(items), task.name
    assert [text for text in real_documents(2000) if index.hits(text)] == []
    # The demonstrations are the same in all prompts: they are no item.
    for task in TASKS.values():
        shots = "\n\n".join(f"{shot.text} {shot.answer}" for shot in task.template.demonstrations)
        assert index.hits(shots) == []


def test_equal_substrings_and_no_others_have_equal_hashes():
    chooser = random.Random(0)
    text = "".join(chooser.choices("ab", k=120)) + string.ascii_letters + "é😀" + "".join(chooser.choices("ab", k=60))
    starts, ends = np.triu_indices(len(text) + 1, k=1)
    hashes = SubstringHashes(text).between(starts, ends).tolist()
    substrings = [text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert len(set(zip(substrings, hashes, strict=True))) == len(set(substrings)) == len(set(hashes))
    # Elsewhere in another text too: what is stored today is found tomorrow.
    assert SubstringHashes("xyz" + text).between(starts + 3, ends + 3).tolist() == hashes
    assert SubstringHashes("cola").between(np.array([0]), np.array([4])).tolist() == [15009292111332563194]
