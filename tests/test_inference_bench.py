"""The benchmark of generation: the plain loop and the engine agree, and the figures are there."""

import json
import math
import shlex

import torch

from tools import bench_inference

TINY = shlex.split("--layers 2 --width 64 --vocab-size 100 --prompt-tokens 32 --new-tokens 32 --steps 3 --repeats 1")


def run(capsys, *options: str) -> dict:
    assert bench_inference.main([*TINY, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_both_forms_give_the_same_tokens_and_every_figure_is_there(capsys, monkeypatch):
    monkeypatch.setattr(bench_inference, "sweep", lambda options: [bench_inference.Case(2, 3, 32, 32)])
    monkeypatch.setattr(bench_inference.Bench, "slots", lambda self: [])
    found = run(capsys, "--batch", "1", "3")
    assert [(ratio["case"]["batch"], ratio["same_tokens"]) for ratio in found["ratios"]] == [(1, True), (3, True)]
    assert all(ratio["largest_difference"] < 1e-4 for ratio in found["ratios"])
    (latency,) = found["latencies"]
    for name in ("tokens_per_second", "block", "prior", "decoder", "prompts"):
        assert math.isfinite(latency[name]) and latency[name] > 0
    assert latency["prior"] + latency["decoder"] <= latency["block"]


def test_places_that_are_given_on_take_fewer_passes_for_the_same_tokens(capsys):
    short = ("--block-size", "4", "--new-tokens", "8", "--prompt-tokens", "8")
    found = run(capsys, "--only", "slots", "--batch", "3", "--cpu-time", *short)
    assert [each["family"] for each in found["slots"]] == ["cola", "autoregressive"]
    for each in found["slots"]:
        assert each["same_tokens"] and each["passes"] < each["passes_of_batches"]
        assert each["work"]["places"] == 3 and each["seconds"] > 0


def test_a_disagreement_is_a_failure(capsys, monkeypatch):
    plain = bench_inference.Bench.plain
    monkeypatch.setattr(
        bench_inference.Bench, "plain", lambda self, case: (torch.zeros(1, 32, dtype=torch.long), plain(self, case)[1])
    )
    assert bench_inference.main([*TINY, "--only", "ratio", "--batch", "1"]) == 1
    assert "False" in capsys.readouterr().out


def test_the_sweep_varies_one_thing_at_a_time():
    cases = list(bench_inference.sweep(bench_inference.parse([])))
    middle = bench_inference.Case(1, 16, 64, 64)
    assert {case.batch for case in cases} == {1, 8, 32} and {case.steps for case in cases} == {4, 8, 16, 32}
    assert {case.prompt_tokens for case in cases} == {64, 256, 1024}
    for case in cases:
        assert sum(getattr(case, name) != getattr(middle, name) for name in ("batch", "steps", "prompt_tokens")) <= 1
