"""What a model made of passages whose last word was to be predicted: records, shares and their table."""

from dataclasses import dataclass
from typing import Any

from cola_megatron.evaluation.results import percentages
from cola_megatron.evaluation.statistics import Figure, clustered_interval, clustered_standard_error

GUESSERS = {
    "most_frequent_word": "the most frequent word of the training text",
    "most_frequent_of_context": "the most frequent word of the passage",
    "bigram": "the most frequent word after the one before",
}
"""In words, for tables."""


@dataclass(frozen=True)
class LastWords:
    """What a model made of the passages, and what guesses by counting would have made of them."""

    model: str
    data: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """By item: `id`, `sequence`, `context`, `target`, `prompt_tokens` (of the context, where the model counts them),
    `generation`, `answer`, `correct`, and `guesses` by their names: the `answer` of each and whether it is `correct`.
    """

    @property
    def accuracy(self) -> Figure:
        """Share of the items that the model got right, 0 .. 1; error and interval are over sequences."""
        return self._share([record["correct"] for record in self.records])

    @property
    def baselines(self) -> dict[str, Figure]:
        """The same of every guesser, by its name."""
        names = [name for name in GUESSERS if name in self.records[0]["guesses"]]
        return {name: self._share([each["guesses"][name]["correct"] for each in self.records]) for name in names}

    @property
    def sequences(self) -> int:
        """How many held-out sequences the items come from."""
        return len({record["sequence"] for record in self.records})

    def as_json(self) -> dict[str, Any]:
        """The figures, without the items."""
        return {
            "task": "last_word",
            "model": self.model,
            "data": self.data,
            "settings": self.settings,
            "n": len(self.records),
            "correct": sum(record["correct"] for record in self.records),
            "sequences": self.sequences,
            "accuracy": self.accuracy.as_json(),
            "baselines": {name: figure.as_json() for name, figure in self.baselines.items()},
        }

    def rows(self) -> list[list[str]]:
        """A table in percent, headings first."""
        figures = {"the model": self.accuracy} | {GUESSERS[name]: each for name, each in self.baselines.items()}
        return [
            ["last word", "accuracy", "95% interval"],
            *([words, *percentages(figure.interval)] for words, figure in figures.items()),
        ]

    def _share(self, correct: list[bool]) -> Figure:
        by_sequence: dict[int, list[bool]] = {}
        for record, right in zip(self.records, correct, strict=True):
            by_sequence.setdefault(record["sequence"], []).append(right)
        right_ones, sizes = [sum(each) for each in by_sequence.values()], [len(each) for each in by_sequence.values()]
        return Figure(clustered_interval(right_ones, sizes), clustered_standard_error(right_ones, sizes))
