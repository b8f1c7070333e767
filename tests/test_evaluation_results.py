"""Confidence intervals, tables, and results that are read back."""

import json

import pytest
import torch

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.results import TaskResult, comparison, format_table
from cola_megatron.evaluation.statistics import Interval, mean_interval, wilson_interval
from tests.test_cli import cola


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # 81 of 263 is Wilson's interval in Newcombe (1998), table I; the ends are z^2 / (n + z^2).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_s_interval(correct, n, low, high):
    interval = wilson_interval(correct, n)
    assert interval.value == correct / n
    assert (interval.low, interval.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    with pytest.raises(ValueError, match="is no proportion"):
        wilson_interval(n + 1, n)


def test_the_interval_of_a_mean_covers():
    """Of 2,000 drawn sets of three tasks, the interval holds the true mean in about 95%."""
    generator = torch.Generator().manual_seed(0)
    rates, n = torch.tensor([0.1, 0.3, 0.5]), 150
    drawn = (torch.rand(2000, 3, n, generator=generator) < rates[:, None]).sum(-1)
    means = [mean_interval([wilson_interval(int(count), n) for count in counts]) for counts in drawn]
    covered = sum(mean.low <= rates.mean().item() <= mean.high for mean in means) / len(means)
    assert 0.935 < covered < 0.965
    single = wilson_interval(3, 20)
    assert mean_interval([single]) == Interval(single.value, pytest.approx(single.low), pytest.approx(single.high))


def result_of(task: str, right: int, n: int = 10) -> TaskResult:
    return TaskResult(task, "m", {}, [{"id": index, "correct": index < right} for index in range(n)])


def test_tables(tmp_path):
    first = {"race": result_of("race", 5), "siqa": result_of("siqa", 10)}
    rows = comparison({"accuracy": first})
    assert format_table(rows).splitlines() == [
        "task     accuracy     95% interval  items",
        "race        50.00   23.66 .. 76.34     10",
        "siqa       100.00  72.25 .. 100.00     10",
        "average     75.00   55.87 .. 88.17",
    ]
    second = {"race": result_of("race", 1)}
    both = comparison({"a": first, "b": second})
    assert both[0] == ["task", "a", "95% interval", "items", "b", "95% interval", "items"]
    assert both[2][4:] == ["", "", ""] and len(both) == 3  # one shared task has no average
    for name, results in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        for result in results.values():
            result.write(tmp_path / name)
    shown = cola("eval", "table", tmp_path / "a", tmp_path / "b" / "race.json")
    assert "10.00" in shown and "average" not in shown
    document = json.loads(cola("eval", "table", tmp_path / "a", "--json"))
    assert document["average"]["value"] == 75.0 and document["tasks"]["race"]["n"] == 10
    several = json.loads(cola("eval", "table", tmp_path / "a", tmp_path / "b", "--json"))
    assert list(several) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holds no results"):
        cola("eval", "table", tmp_path)
    for text in ("{", "[]", '{"task": "race", "model": "m", "settings": {}, "items": [{"correct": 1}]}'):
        (tmp_path / "race.json").write_text(text)
        with pytest.raises(EvaluationError, match=r"race.json: not a result"):
            cola("eval", "table", tmp_path)
