"""From a row of an original dataset, under its original column names, to a question in the published form.

A wrong row raises KeyError (a column is missing), or ValueError or TypeError (a value is out of place).
"""

from collections.abc import Callable, Sequence
from typing import Any

from cola_megatron.evaluation.prompts import Question

Row = dict[str, Any]
Reader = Callable[[Row], Question]


def lambada(row: Row) -> Question:
    """`text`: its last word is the answer."""
    words = row["text"].rsplit(maxsplit=1)
    if len(words) < 2:
        raise ValueError("text has fewer than two words")
    return Question(*words)


def mmlu(row: Row) -> Question:
    """`question`, `choices`, `answer` (position from 0)."""
    return _choice(row["question"], row["choices"], int(row["answer"]))


def obqa(row: Row) -> Question:
    """`question_stem`, `choices` (`text`, `label`), `answerKey`; also the nested form of the original files."""
    if "question_stem" in row:
        stem, choices = row["question_stem"], row["choices"]
        texts, labels = choices["text"], choices["label"]
    else:
        stem, choices = row["question"]["stem"], row["question"]["choices"]
        texts, labels = [choice["text"] for choice in choices], [choice["label"] for choice in choices]
    return _choice(stem, texts, list(labels).index(row["answerKey"]))


def hellaswag(row: Row) -> Question:
    """`ctx`, `endings`, `label` (position from 0)."""
    return _choice(row["ctx"], row["endings"], int(row["label"]))


def race(row: Row) -> Question:
    """`article`, `question`, `options`, `answer` (letter)."""
    return _choice(f"{row['article']} {row['question']}", row["options"], "ABCD".index(row["answer"]))


def siqa(row: Row) -> Question:
    """`question`, `answerA` to `answerC`, `label` (1 to 3). The published prompts leave out `context`."""
    return _choice(row["question"], [row["answerA"], row["answerB"], row["answerC"]], int(row["label"]) - 1)


def squad(row: Row) -> Question:
    """`context`, `question`, `answers` (`text`: the first counts, as published)."""
    return Question(f"{row['context']}\nQuestion: {row['question']}", row["answers"]["text"][0])


def story_cloze(row: Row) -> Question:
    """The four sentences, two endings and the right one (1 or 2), under the names of the hub or of the original CSV."""
    if "input_sentence_1" in row:
        sentences = [row[f"input_sentence_{number}"] for number in range(1, 5)]
        endings = [row["sentence_quiz1"], row["sentence_quiz2"]]
        right = row["answer_right_ending"]
    else:
        sentences = [row[f"InputSentence{number}"] for number in range(1, 5)]
        endings = [row["RandomFifthSentenceQuiz1"], row["RandomFifthSentenceQuiz2"]]
        right = row["AnswerRightEnding"]
    return _choice(" ".join(sentences), endings, int(right) - 1)


def _choice(text: str, options: Sequence[str], right: int) -> Question:
    if not 0 <= right < len(options):
        raise ValueError(f"the right answer is number {right + 1} of {len(options)}")
    return Question(text, options[right], tuple(options))
