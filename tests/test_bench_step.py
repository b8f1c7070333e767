"""The bench of a step: that every operation goes to its part, and that the floors are those of the model."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from cola_megatron.config import load_config
from cola_megatron.families.cola.parts import chain_parts
from cola_megatron.models.steps import Step
from cola_megatron.parallel import initialize_parallel
from cola_megatron.training.build_model import initialize_run
from cola_megatron.training.engine import Engine
from tests.ranks import run_ranks
from tools import bench_step, step_floors, step_profile
from tools.gpu_setting import random_model
from tools.step_floors import Floor, Rates
from tools.step_profile import PREFIX, PartTime, busy_seconds, labels_of, time_by_part

TINY = ("stage=2", "training.micro_batch_size=2", "training.global_batch_size=4", "data.sequence_length=32")
RATES = Rates(product=1e9, copy=1e9, link=None)


def events_of(work) -> list:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    return list(profiler.events())


def parts_of(events: list, operation: str) -> list[str]:
    """The part of each such operation, in order."""
    find = step_profile._part_finder(events)
    return [find(event) for event in events if event.name == operation]


def test_glue_belongs_to_the_part_whose_output_it_reads_last():
    steps = [
        Step("tokens -> masked", lambda x: x),
        Step("masked -> hidden", lambda x: x, part="embed"),
        Step("hidden -> hidden", lambda x: x, part="block"),
        Step("masked, hidden -> loss_a", lambda x, y: x),
        Step("time -> table", lambda x: x, part="time"),
        Step("hidden, table -> loss_b", lambda x, y: x),
        Step("tokens -> hidden", lambda x: x),
        Step("hidden -> loss_c", lambda x: x),
    ]
    assert labels_of(steps) == ["batch", "embed", "block", "block", "time", "time", "batch", "batch"]


def test_backward_operations_go_to_the_part_of_their_forward_ones():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)

    def work() -> None:
        with record_function(f"{PREFIX}first"):
            hidden = first(x)
        with record_function(f"{PREFIX}second"):
            with torch.no_grad():
                hidden.sum()  # has the number of the node that comes next
            loss = second(hidden).square().sum()
        with record_function(f"{PREFIX}optimizer.gradients"):
            loss.backward()

    events = events_of(work)
    # Two products each, of the input's gradient and of the weight's; the later part comes first.
    assert parts_of(events, "aten::mm") == ["second"] * 2 + ["first"] * 2
    assert parts_of(events, "aten::addmm") == ["first", "second"]
    assert set(parts_of(events, "torch::autograd::AccumulateGrad")) == {"optimizer.gradients"}


def test_an_operation_without_a_gradient_does_not_take_the_node_of_the_next_part():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)

    def work() -> None:
        with record_function(f"{PREFIX}before"):
            x.cos()
        with record_function(f"{PREFIX}after"):
            loss = (x @ weight).sum()
        loss.backward()

    assert parts_of(events_of(work), "aten::mm") == ["after"] * 2


def event(name: str, parent=None, kernels=(), **fields) -> SimpleNamespace:
    """As the profiler gives it; times in microseconds."""
    start, end = fields.pop("time", (0, 1))
    defaults = {
        "device_type": DeviceType.CPU,
        "is_async": False,
        "sequence_nr": -1,
        "scope": 0,
        "thread": 1,
        "fwd_thread": 0,
        "self_cpu_time_total": 1.0,
        "is_user_annotation": False,
        "time_range": SimpleNamespace(start=start, end=end),
    }
    made = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=made, **(defaults | fields))


def test_kernels_go_to_the_part_that_launched_them_from_whichever_thread():
    block = event(f"{PREFIX}block", kernels=[(f"{PREFIX}block", 900.0)])  # the device's side of the range
    product = event("aten::mm", block, [("gemm", 30.0)], sequence_nr=5)
    evaluate = event("autograd::engine::evaluate_function: MmBackward0", thread=2, fwd_thread=1, sequence_nr=5)
    gradient = event("aten::mm", evaluate, [("gemm", 60.0)], thread=2)
    accumulate = event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", thread=2)
    add = event("aten::add_", accumulate, [("add", 7.0)], thread=2)
    reduce = event("c10d::allreduce_", event("a"), [("ncclDevKernel_AllReduce", 11.0)])
    hidden = event("aten::copy_", block, [("ncclDevKernel_Generic", 2.0)])
    times = time_by_part([block, product, evaluate, gradient, accumulate, add, reduce, hidden])
    found = {label: round(each.device * 1e6, 6) for label, each in times.items()}
    assert found == {"block": 90.0, "optimizer.gradients": 7.0, "communication": 13.0}
    assert times["block"].host == pytest.approx(5e-6)


def test_the_device_is_busy_while_any_kernel_runs():
    def kernel(start: float, end: float, **fields) -> SimpleNamespace:
        return event("kernel", time=(start, end), device_type=DeviceType.CUDA, **fields)

    annotation = kernel(0, 100, is_user_annotation=True)
    kernels = [kernel(0, 10), kernel(5, 20), kernel(6, 7), kernel(30, 40), annotation, event("host", time=(0, 99))]
    assert busy_seconds(kernels) == pytest.approx(30e-6)


def test_a_block_and_the_optimiser_have_a_row_of_their_sum():
    times = {
        "data": PartTime(1.0, 0.0),
        "dit.block.rest": PartTime(1.0, 2.0),
        "dit.block.attention": PartTime(3.0, 4.0),
        "optimizer.update": PartTime(5.0, 6.0),
    }
    rows = bench_step.rows_of(times, {"dit.block": Floor(1.0, 2.0)}, on_gpu=True)
    assert [(row.part, row.seconds, row.host) for row in rows] == [
        ("data", 0.0, 1.0),
        ("dit.block", 6.0, 4.0),
        ("dit.block.rest", 2.0, 1.0),
        ("dit.block.attention", 4.0, 3.0),
        ("optimizer", 6.0, 5.0),
        ("optimizer.update", 6.0, 5.0),
    ]
    assert rows[1].times_floor == 2.0 and rows[0].times_floor is None
    assert bench_step.rows_of(times, {}, on_gpu=False)[1].seconds == 4.0


def test_a_trained_step_is_told_apart_into_the_parts_of_the_model(tmp_path, capsys):
    trace = tmp_path / "trace.json.gz"
    bench_step.main(["tiny", *TINY, "--steps", "1", "--json", "--trace", str(trace)])
    answer = json.loads(capsys.readouterr().out)
    rows = {row["part"]: row for row in answer["rows"]}
    config = load_config("tiny", list(TINY))
    expected = {part.label for part in chain_parts(config)}
    branches = {f"dit.block.{name}" for name in ("attention", "feed_forward", "rest")}
    assert expected | branches | {"data", "batch", "optimizer"} <= rows.keys()
    assert all(rows[label]["times_floor"] > 0 for label in expected)
    whole = sum(row["seconds"] for row in answer["rows"] if bench_step.group_of(row["part"]) == row["part"])
    assert 0.5 * answer["profiled"] < whole < 1.2 * answer["profiled"]
    # What no part of the model caused is little: so the backward pass has found its parts.
    assert rows["other"]["seconds"] < 0.1 * whole
    assert rows["dit.block"]["seconds"] > 3 * rows["reference"]["seconds"]
    with gzip.open(trace) as file:
        names = {each.get("name") for each in json.load(file)["traceEvents"]}
    assert f"{PREFIX}dit.block.attention" in names


@pytest.fixture
def engine():
    groups = initialize_parallel()
    config = load_config("tiny", [*TINY, "training.activation_checkpointing=true"])
    return Engine(random_model(config, groups), config, groups)


def test_recomputed_blocks_stay_their_parts_and_nothing_is_left_of_the_marks(engine):
    before = {name: dict(vars(module)) for name, module in engine.model.named_modules()}
    runs = [step.run for step in engine.model.stage(train_vae=True).steps]
    batches = bench_step.random_batches(engine.config, engine.groups)
    with step_profile.marked(engine, train_vae=True):
        events = events_of(lambda: engine.step(step_profile.marked_batches(batches), 0))
    times = time_by_part(events)
    assert times["dit.block.attention"].host > 0 and "dit.block" not in times
    products = parts_of(events, "aten::mm") + parts_of(events, "aten::addmm")
    assert not [part for part in products if part in ("other", "batch") or part.startswith("optimizer")]
    assert runs == [step.run for step in engine.model.stage(train_vae=True).steps]
    after = {name: vars(module) for name, module in engine.model.named_modules()}
    assert all(after[name].keys() == attributes.keys() for name, attributes in before.items())
    assert {"backward", "step"}.isdisjoint(vars(engine.deepspeed))


def test_the_branches_of_a_block_add_up_to_it():
    groups = initialize_parallel()
    for overrides in ((), ("training.activation_checkpointing=true",)):
        config = load_config("tiny", [*TINY, *overrides])
        floors = step_floors.floors(config, groups, RATES)
        for block in ("vae.encoder.block", "dit.block"):
            branches = [floors[f"{block}.{name}"].products for name in ("attention", "feed_forward", "rest")]
            assert sum(branches) == pytest.approx(floors[block].products)
            assert floors[block].bytes > 0


def test_floors_are_the_model_flops_and_what_the_frozen_reference_does_forward():
    groups = initialize_parallel()
    config = load_config("tiny", list(TINY))
    floors = step_floors.floors(config, groups, RATES)
    parts = {part.label: part for part in chain_parts(config)}
    samples = config.training.global_batch_size
    head = parts["vae.decoder.head"]
    assert floors["vae.decoder.head"].products == pytest.approx(samples * head.flops / RATES.product)
    reference = parts["reference"]
    assert floors["reference"].products == pytest.approx(samples * 2 * reference.macs / RATES.product)
    assert "communication" not in floors and floors["optimizer"].bytes > 0


def measured_stage() -> tuple[set[str], bench_step.Answer]:
    config = load_config("tiny", [*TINY, "parallel.pipeline_parallel_size=2"])
    groups = initialize_run(config)
    answer = bench_step.measure(config, groups, steps=1, trace=None)
    return {row.part for row in answer.rows if row.times_floor}, bench_step.busiest(groups, answer)


def test_each_rank_of_a_pipeline_has_the_parts_of_its_stage_and_the_busiest_speaks():
    (first, one), (second, other) = run_ranks(measured_stage, 2)
    assert "vae.encoder.embed" in first - second and "vae.decoder.head" in second - first
    assert "communication" in first & second and one == other
