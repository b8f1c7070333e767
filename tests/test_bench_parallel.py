"""The benchmark of layouts counts every byte, prints what it found, and the picture of a pipeline is current."""

import itertools
import json

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.families import family_of
from cola_megatron.parallel import initialize_parallel
from cola_megatron.planning.communication import context_traffic
from tests.ranks import run_ranks
from tests.support import TINY
from tests.test_layouts import BF16_LAYOUTS, LAYOUTS
from tools import bench_context, bench_layouts, bench_parallel, parallelism_figure, pipeline_facts
from tools.bench_layouts import Layout
from tools.bench_ranks import RankResult, measure
from tools.communication_counter import CommunicationCounter

PAGE = parallelism_figure.PICTURE.with_suffix(".md").read_text(encoding="utf-8")
FLOAT32 = 4
MICRO_BATCH, MICRO_BATCHES = 2, 4


def tiny_config(*overrides: str) -> RunConfig:
    common = [*TINY, "training.precision=fp32", f"training.micro_batch_size={MICRO_BATCH}"]
    return load_config("tiny", [*common, "parallel.reduce_bucket_size=20000", *overrides])


def counted(result: RankResult, kind: str, operation: str, dtype: str = "float32") -> tuple[float, float]:
    """Payload and bytes on the wire of one step."""
    found = [each for each in result.sent if (each.kind, each.operation, each.dtype) == (kind, operation, dtype)]
    assert len(found) == 1, result.sent
    return found[0].payload, found[0].wire


def test_cost_against_length_is_a_table_beside_one_rank_and_a_picture(tmp_path):
    points = [
        bench_context.Point(length, ranks, length / 500, length / 512 / ranks, 2**20 * length / ranks, 2**20, 1e6, 1e9)
        for length in (512, 1024)
        for ranks in (1, 2)
    ]
    assert list(bench_context.rows(points))[3] == "| 512 | 2 | 0.50 | 0.50 | 0.25 | 0.50 | 1.0 |"
    bench_context.draw(points).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ---- the counter ----------------------------------------------------------------------------------------------------


def every_collective() -> dict[tuple[str, str], tuple[float, float]]:
    """One of each over three ranks, with 6 float32 in the whole tensor."""
    groups = initialize_parallel(pipeline_parallel_size=3)
    whole, part, parts = torch.ones(6), torch.ones(2), list(torch.ones(6).chunk(3))
    group, ranks = groups.pipeline_group, groups.world_size
    with CommunicationCounter(groups) as counter:
        dist.all_reduce(whole, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.all_gather(parts, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, whole, (groups.rank + 1) % ranks, group),
                dist.P2POp(dist.irecv, torch.empty(6), (groups.rank - 1) % ranks, group),
            ]
        )
        for work in works:
            work.wait()
        dist.all_reduce(whole, group=groups.tensor_group)  # of one rank: nothing travels
        dist.barrier()
        dist.all_reduce(whole)
        dist.all_to_all_single(whole, whole.clone(), group=group)
        with pytest.raises(NotImplementedError, match="scatter_"):
            dist.scatter(part, parts if groups.rank == 0 else None)
    return {transfer[:2]: (amount.payload, amount.wire) for transfer, amount in counter.sent.items()}


def test_each_collective_is_counted_by_what_is_handed_over_and_by_what_a_ring_sends():
    for found in run_ranks(every_collective, 3):
        assert found == {
            ("pipeline", "all-reduce"): (24, 2 * 2 / 3 * 24),
            ("pipeline", "all-gather"): (8 + 8, 16 + 16),
            ("pipeline", "reduce-scatter"): (24, 2 / 3 * 24),
            ("pipeline", "all-to-all"): (24, 2 / 3 * 24),
            ("pipeline", "send"): (24, 24),
            ("other", "all-reduce"): (24, 2 * 2 / 3 * 24),
        }


def test_tensor_parallel_bytes_of_a_stage_1_step():
    config = tiny_config("stage=1", "parallel.tensor_parallel_size=2")
    vae = config.model.vae
    views = 2 * MICRO_BATCH  # the text and its masked view
    latents = FLOAT32 * config.latent_length * views * vae.hidden_size
    tokens = latents * vae.patch_size
    per_latent, per_token = latents // vae.hidden_size, tokens // vae.hidden_size
    # Two branches, each summed forward and its input's gradient summed backward; the norms of queries and keys sum two
    # statistics each, in both directions.
    block = 4 * latents + 8 * per_latent
    encoder = tokens + tokens + vae.encoder_layers * block + 2 * vae.latent_dim * per_latent
    decoder = vae.latent_dim * per_latent + vae.decoder_layers * block + latents + tokens
    cross_entropy = 3 * per_token
    gathered = (latents + latents + latents + tokens) / 2  # convolution, head's gradient, decoder's input, unpatching
    for result in run_ranks(measure, 2, config, 0, 1):
        expected = MICRO_BATCHES * (encoder + decoder + cross_entropy)
        assert counted(result, "tensor", "all-reduce") == (expected, expected)
        assert counted(result, "tensor", "all-gather") == (MICRO_BATCHES * gathered, MICRO_BATCHES * gathered)
        assert {each.kind for each in result.sent} == {"tensor", "other"}


def test_pipeline_bytes_are_the_hidden_states_and_their_gradients():
    config = tiny_config("stage=1", "parallel.pipeline_parallel_size=2", "parallel.pipeline_split=[2,4]")
    hidden = FLOAT32 * config.latent_length * 2 * MICRO_BATCH * config.model.vae.hidden_size
    for result in run_ranks(measure, 2, config, 0, 1):  # forward from the first stage, gradients from the second
        assert counted(result, "pipeline", "send") == (MICRO_BATCHES * hidden, MICRO_BATCHES * hidden)


@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_context_parallel_bytes_are_queries_keys_values_and_outputs(recomputed):
    config = tiny_config("parallel.context_parallel_size=2", f"training.activation_checkpointing={recomputed}")
    parts = family_of(config).parts(config)
    expected = 2 * MICRO_BATCHES * sum(context_traffic(config, part).bytes for part in parts)
    for result in run_ranks(measure, 2, config, 0, 1):
        assert counted(result, "context", "all-to-all") == (expected, expected / 2)
        assert {each.kind for each in result.sent} == {"context", "data", "other"}


@pytest.mark.parametrize(("zero_stage", "reductions"), [(0, 1), (2, MICRO_BATCHES // 2)])
def test_data_parallel_bytes_are_those_of_the_gradients(zero_stage, reductions):
    config = tiny_config(f"parallel.zero_stage={zero_stage}")
    parameters = sum(part.parameters for part in family_of(config).parts(config))
    for result in run_ranks(measure, 2, config, 0, 1):
        payload, wire = counted(result, "data", "all-reduce")
        small = payload - reductions * FLOAT32 * parameters
        assert 0 <= small <= 16 and wire == payload  # beside the gradients their norm, and whether it is finite
        if zero_stage:
            assert counted(result, "data", "all-gather") == (FLOAT32 * parameters / 2, FLOAT32 * parameters / 2)


# ---- the tool -------------------------------------------------------------------------------------------------------


def test_the_tool_prints_one_document_with_every_rank(capsys):
    size = [*TINY, "training.precision=fp32", "training.micro_batch_size=2"]
    layouts = ["--layouts", "one", "dp2-zero0", "pp2-zero2"]
    options = ["--preset", "tiny", "--steps", "1", "--warm-up", "0", "--json"]
    assert bench_parallel.main([*options, *size, *layouts]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["layouts"]["one"], found["layouts"]["dp2-zero0"]
    assert found["command"].startswith("python -m tools.bench_parallel") and found["versions"]["torch"]
    assert one["ratio"] == 1 and len(one["steps"]) == 1 and two["seconds"] > 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for rank in two["ranks"]:
        assert rank["wire"]["data"] == pytest.approx(rank["predicted_wire"]["data"], rel=0.01)
    assert "zero_stage=2" in found["layouts"]["pp2-zero2"]["left_out"]


def test_a_layout_that_fails_is_named(capsys, monkeypatch):
    def failing(*arguments: object) -> list[RankResult]:
        raise ProcessRaisedException("Traceback ...\nValueError: out of luck", 0, 1)

    monkeypatch.setattr(bench_layouts, "run_ranks", failing)
    assert bench_parallel.main(["--preset", "tiny", "--json", "--layouts", "one"]) == 1
    assert json.loads(capsys.readouterr().out)["layouts"]["one"] == {"failed": "ValueError: out of luck"}


def test_idle_shares_are_printed_beside_both_predictions(capsys, monkeypatch):
    monkeypatch.setattr(bench_layouts, "BUBBLE_MICRO_BATCHES", (2,))
    size = [*TINY, "training.precision=fp32"]
    assert bench_parallel.main(["--bubble", "--preset", "tiny", "--steps", "1", "--warm-up", "0", *size]) == 0
    cells = capsys.readouterr().out.strip().splitlines()[-1].strip("| ").split(" | ")
    assert cells[0] == "2" and cells[4] == "33%"
    assert float(cells[5].rstrip("%")) >= 33


@pytest.mark.parametrize("name", ["tp", "tp2xdp2", "two", "tp2-", ""])
def test_a_layout_that_is_none_is_refused(name, capsys):
    with pytest.raises(ConfigError, match="no part of a layout"):
        Layout.parse(name)
    assert bench_parallel.main(["--layouts", name]) == 2
    assert "tpN" in capsys.readouterr().err


def test_a_layout_is_read_from_its_name():
    layout = Layout.parse("tp2-sp-pp4-dp3-zero1")
    assert (layout.ranks, layout.replicas) == (24, 3)
    assert "parallel.sequence_parallel=true" in layout.overrides and "parallel.zero_stage=1" in layout.overrides
    assert Layout.parse("one").ranks == 1


# ---- the page -------------------------------------------------------------------------------------------------------


def place() -> tuple[int, int, int]:
    groups = initialize_parallel(tensor_parallel_size=2, pipeline_parallel_size=2)
    groups.barrier()  # a rank that ends early would leave others alone in the building of their groups
    return groups.pipeline_parallel_rank, groups.data_parallel_rank, groups.tensor_parallel_rank


def test_ranks_are_laid_out_as_the_page_says():
    places = run_ranks(place, 8)
    assert all((stage * 2 + replica) * 2 + tensor == rank for rank, (stage, replica, tensor) in enumerate(places))
    for title, row in zip(("stage", "replica", "tensor-parallel rank"), zip(*places, strict=True), strict=True):
        assert f"| {title} | {' | '.join(map(str, row))} |" in PAGE


def test_the_page_names_the_layouts_that_are_tested():
    for layout in LAYOUTS:
        assert f"| {layout} | x | {'x' if layout in BF16_LAYOUTS else '-'} |" in PAGE


def test_the_page_says_what_crosses():
    assert parallelism_figure.table() in PAGE


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_is_current():
    assert parallelism_figure.main(["--check"]) == 0


def test_a_picture_that_is_not_current_is_noticed(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "parallelism.svg"
    monkeypatch.setattr(parallelism_figure, "PICTURE", picture)
    assert parallelism_figure.main(["--check"]) == 1
    assert parallelism_figure.main([]) == 0
    assert parallelism_figure.main(["--check"]) == 0
    picture.write_text(picture.read_text().replace("stage 3", "stage 4"))
    assert parallelism_figure.main(["--check"]) == 1
    assert "run `python -m tools.parallelism_figure`" in capsys.readouterr().err


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 8), (4, 2)])
def test_the_timetable_is_as_long_as_the_formula_says(stages, micro_batches):
    table = pipeline_facts.timetable(stages, micro_batches)
    length = (micro_batches + stages - 1) * (1 + pipeline_facts.BACKWARD_LENGTH)
    assert max(passes[-1].end for passes in table) == length
    for stage, passes in enumerate(table):
        assert pipeline_facts.most_in_flight(passes) == min(stages - stage, micro_batches)
        for before, after in itertools.pairwise(passes):
            assert before.end <= after.start
