"""The average of the weights (`training.ema_decay`): what it is in every layout and over a resume; its use."""

import json
import logging
import shutil
from collections.abc import Iterator

import pytest
import torch

from cola_megatron import load_model
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.pieces import trained_pieces
from cola_megatron.checkpoint.reshard import reshard
from cola_megatron.config import RunConfig, load_config
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.open_model import open_model
from cola_megatron.errors import UserError
from cola_megatron.families import family_of
from cola_megatron.parallel import initialize_parameters
from cola_megatron.parallel.weight_average import WeightAverage
from cola_megatron.planning.memory import model_states
from cola_megatron.training.build_model import build_model, initialize_run
from cola_megatron.training.engine import Engine
from cola_megatron.training.loop import train
from tests.commands import cola
from tests.ranks import run_ranks
from tests.support import TINY, make_text, prepared, random_batch
from tests.test_checkpoint_layouts import assert_same_tensors, tensors
from tests.test_layouts import LAYOUTS, tiny_config, whole_loss

STEPS, DECAY = 4, 0.3  # the bound of the first updates, 2/11, 3/12, is below it for two of them
FLOAT32 = 1e-6  # of the largest weight: four sums of two products in float32, 6e-8 each


def plain_average(weights: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """Of the weights at the start and after each update."""
    average = {name: value.double() for name, value in weights[0].items()}
    for update, after in enumerate(weights[1:], 1):
        kept = min(decay, (1 + update) / (10 + update))
        average = {name: kept * value + (1 - kept) * after[name].double() for name, value in average.items()}
    return average


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= FLOAT32 * value.abs().max(), name


def test_it_is_the_plain_average_and_follows_from_its_beginning():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=generator), torch.randn(7, generator=generator)]
    average, seen = WeightAverage(weights, 0.9), [dict(enumerate(each.clone() for each in weights))]
    for _ in range(100):
        for each in weights:
            each.add_(torch.randn(each.shape, generator=generator))
        average.update()
        seen.append(dict(enumerate(each.clone() for each in weights)))
    assert_close({index: average.of(each) for index, each in enumerate(weights)}, plain_average(seen, 0.9))
    average.begin()
    assert average.updates == 0 and torch.equal(average.of(weights[1]), weights[1])


def pieces_over_training(config: RunConfig) -> list[list]:
    """This rank's pieces of weights and averages at the start and after every step."""
    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    engine, seen = Engine(model, config, groups), []

    def micro_batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
        size, replicas = config.training.micro_batch_size, groups.data_parallel_size
        for index in range(engine.accumulation):
            start = (step * engine.accumulation + index) * size * replicas + groups.data_parallel_rank * size
            yield random_batch(config, range(start, start + size), step)

    for step in range(STEPS + 1):
        if step:
            engine.step(micro_batches(step - 1), step - 1)
        kept = [piece for piece in trained_pieces(engine, step) if piece.name.startswith(("weights/", "ema/"))]
        seen.append([piece._replace(values=piece.values.clone().numpy()) for piece in kept])
    return seen


def whole_over_training(config: RunConfig, ranks: int) -> list[dict[str, torch.Tensor]]:
    answers, whole = run_ranks(pieces_over_training, ranks, config), []
    for step in range(STEPS + 1):
        whole.append({})
        for piece in (piece for answer in answers for piece in answer[step]):
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.values.shape, strict=True))
            whole[-1].setdefault(piece.name, torch.full(piece.whole, torch.nan))[box] = torch.from_numpy(piece.values)
    return whole


EVERY_DAY = ("TP 2 x DP 2, ZeRO 1",)


@pytest.mark.parametrize(
    "layout", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_keeps_the_plain_average_of_its_weights(layout):
    ranks, overrides = LAYOUTS[layout]
    config = tiny_config([*whole_loss(2), f"training.ema_decay={DECAY}", *overrides])
    whole = whole_over_training(config, ranks)
    weights = [
        {name.removeprefix("weights/"): value for name, value in step.items() if name.startswith("weights/")}
        for step in whole
    ]
    averages = {name.removeprefix("ema/"): value for name, value in whole[-1].items() if name.startswith("ema/")}
    assert_close(averages, plain_average(weights, DECAY))
    assert any(not torch.equal(averages[name], value) for name, value in weights[-1].items())


def updates_seen(config: RunConfig) -> list[int]:
    """How many updates the average has seen after one that is refused, and after one that is not."""
    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    engine, batch = Engine(model, config, groups), random_batch(config, range(config.training.micro_batch_size))
    (flat, *_), found = engine.optimizer.flat_masters, []
    for accepts in (lambda metrics: False, lambda metrics: True):
        before = engine.ema.of(flat).clone()
        engine.step(iter([batch] * engine.accumulation), 0, accepts)
        found.append(engine.ema.updates)
        assert torch.equal(engine.ema.of(flat), before) == (engine.ema.updates == 0)
    return found


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_an_update_that_is_refused_does_not_count(zero_stage):
    config = tiny_config([*whole_loss(1), f"training.ema_decay={DECAY}", f"parallel.zero_stage={zero_stage}"])
    assert run_ranks(updates_seen, 1, config) == [[0, 1]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """`start(name, *overrides)`: a config of four steps of an autoregressive model on prepared text."""
    folder = tmp_path_factory.mktemp("average")
    make_text(folder / "text.jsonl", documents=60)
    shards = prepared(folder / "shards", [folder / "text.jsonl"], vocab_size=301)
    of_any_family = [each for each in TINY if not each.startswith(("model.vae", "model.dit", "training.vae_update"))]
    small = ["model.transformer.hidden_size=32", "model.transformer.ffn_hidden_size=48", "model.vocab_size=301"]
    common = [*of_any_family, *small, f"data.path={shards}", f"runs_folder={folder / 'runs'}", "training.steps=4"]
    return lambda name, *overrides: load_config("tiny-autoregressive", [*common, f"name={name}", *overrides])


def continued(start, name: str, saved: RunConfig, *overrides: str) -> RunConfig:
    config = start(name, *overrides)
    shutil.copytree(saved.run_folder, config.run_folder)
    return config


AVERAGED = f"training.ema_decay={DECAY}"


def test_resuming_is_bit_identical_and_an_average_begins_where_it_is_asked_for(start, caplog):
    straight, half = start("straight", AVERAGED), start("half", AVERAGED, "training.stop_after=2")
    train(straight, progress=False)
    train(half, progress=False)
    resumed = continued(start, "resumed", half, AVERAGED)
    train(resumed, progress=False)
    newest = newest_checkpoint(straight.run_folder)
    assert_same_tensors(newest, newest_checkpoint(resumed.run_folder))
    assert json.loads((newest / "state.json").read_text())["ema_updates"] == 4

    without = continued(start, "without", half)
    with caplog.at_level(logging.WARNING):
        train(without, progress=False)
    assert "the average of the weights in" in caplog.text and "is left out" in caplog.text
    plain = tensors(newest_checkpoint(without.run_folder))
    assert not [name for name in plain if name.startswith("ema/")]
    assert all(torch.equal(value, tensors(newest)[name]) for name, value in plain.items())  # it changes no weight

    plain_half = start("plain_half", "training.stop_after=2")
    train(plain_half, progress=False)
    caplog.clear()
    later = continued(start, "later", plain_half, AVERAGED)
    with caplog.at_level(logging.WARNING):
        train(later, progress=False)
    assert "the average of the weights begins at step 2" in caplog.text
    state = json.loads((newest_checkpoint(later.run_folder) / "state.json").read_text())
    assert state["ema_updates"] == 2
    assert newest is not None and any(
        not torch.equal(value, tensors(newest)[name])
        for name, value in tensors(newest_checkpoint(later.run_folder)).items()
        if name.startswith("ema/")
    )


def test_a_model_is_read_with_its_averages_exported_and_resharded(start, tmp_path, caplog):
    run = start("used", AVERAGED, "parallel.zero_stage=1")
    train(run, progress=False)
    stored = tensors(newest_checkpoint(run.run_folder))
    with caplog.at_level(logging.WARNING):
        averaged = load_model(run.run_folder, ema=True)
    assert "averages of the weights over 4 updates" in caplog.text
    plain, source = load_model(run.run_folder), open_model(run.run_folder, ema=True)
    name = "transformer.blocks.0.ffn.input.weight"
    assert torch.equal(source.read(name), stored[f"ema/{name}"])
    assert not torch.equal(stored[f"ema/{name}"], stored[f"weights/{name}"])
    assert not torch.equal(averaged.logits([5, 6, 7]), plain.logits([5, 6, 7]))
    export_checkpoint(run.run_folder, tmp_path / "export", progress=False, ema=True)
    torch.testing.assert_close(load_model(tmp_path / "export").logits([5, 6, 7]), averaged.logits([5, 6, 7]))
    moved = reshard(run.run_folder, tmp_path / "moved", ranks=3, progress=False)
    assert_same_tensors(newest_checkpoint(run.run_folder), moved)
    assert torch.equal(load_model(moved, ema=True).logits([5, 6, 7]), averaged.logits([5, 6, 7]))
    done = cola("generate", run.run_folder, "-p", "the", "--ema", "--max-new-tokens", "2")
    assert done.returncode == 0 and done.stdout.startswith("the")
    assert "averages of the weights over 4 updates" in done.stderr


def test_where_there_is_no_average_it_is_one_line(start, tmp_path):
    run = start("none")
    train(run, progress=False)
    with pytest.raises(UserError, match=r"has no averages of its weights: train with training\.ema_decay"):
        load_model(run.run_folder, ema=True)
    export_checkpoint(run.run_folder, tmp_path / "export", progress=False)
    with pytest.raises(UserError, match="is an export, which has one set of weights: leave out --ema"):
        load_model(tmp_path / "export", ema=True)
    done = cola("generate", run.run_folder, "-p", "the", "--ema")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_the_plan_counts_it(stage, precision):
    common = ["stage=1", f"parallel.zero_stage={stage}", f"training.precision={precision}"]
    plain, averaged = load_config("tiny", common), load_config("tiny", [*common, AVERAGED])
    parts = family_of(plain).parts(plain)
    added = model_states(averaged, parts, 2).optimizer - model_states(plain, parts, 2).optimizer
    assert added == 4 * sum(part.parameters for part in parts if part.backward) / (2 if stage else 1)
