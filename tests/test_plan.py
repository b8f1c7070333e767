"""`cola plan`: the chain that it counts, its layouts, its table, its errors."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron.config import ConfigError, load_config
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.parts import chain_parts
from cola_megatron.layers.masks import two_copies_in_chunks, two_copy_mask
from cola_megatron.parallel import initialize_parallel
from cola_megatron.planning.compute import cost_of
from cola_megatron.planning.hardware import GIB, GPUS, Efficiency, efficiency_with
from cola_megatron.planning.plan import Cluster, PlanError, batch_limit, layouts_of, plan
from cola_megatron.planning.split import pipeline_split
from launchers.cli import app, main


def cola(*arguments: object) -> str:
    """Runs a command in this process and returns what it printed; its error is raised as itself."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


# ---- the chain of parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [[], ["stage=1"], ["training.vae_update.mode=frozen"], ["model.vae.post_norm=false"]]
)
def test_parts_are_the_steps_of_the_model(overrides):
    config = load_config("tiny", ["model.vae.encoder_layers=2", *overrides])
    model, parts = Cola(config, initialize_parallel()), chain_parts(config)
    steps = [step for step in model.steps() if step.modules]
    assert [part.label for part in parts] == [step.part for step in steps]
    for part, step in zip(parts, steps, strict=True):
        parameters = [parameter for module in step.modules for parameter in module.parameters()]
        assert part.parameters == sum(parameter.numel() for parameter in parameters), part.label
        whole = sum(parameter.numel() for parameter in parameters if not parameter.tensor_model_parallel)
        assert part.uncut == whole, part.label
        assert part.backward == all(parameter.requires_grad for parameter in parameters), part.label


def test_the_paper_s_sizes():
    parts = chain_parts(load_config("paper-2b"))
    assert sum(part.parameters for part in parts if part.label.startswith("vae")) == 501_871_574
    assert sum(part.parameters for part in parts if part.label.startswith("dit")) == 1_829_875_728


# ---- layouts --------------------------------------------------------------------------------------------------------


def cluster(gpus: int, gigabytes: float = 80, **options) -> Cluster:
    return Cluster(gpus, GPUS["h100"], gigabytes * GIB, **options)


def test_layouts_are_ranked_and_consistent():
    config = load_config("paper-2b")
    layouts, refused = plan(config, cluster(64))
    assert refused and len(layouts) > 10
    times = [layout.step_seconds for layout in layouts]
    assert times == pytest.approx(sorted(times), rel=0.01)
    for layout in layouts:
        parallel, training = layout.config.parallel, layout.config.training
        assert parallel.tensor_parallel_size * parallel.pipeline_parallel_size * layout.replicas == 64
        assert training.micro_batch_size * layout.micro_batches * layout.replicas == training.global_batch_size == 1_408
        assert layout.fits and 0 < layout.mfu < 0.6
        assert len(layout.memory) == len(layout.split) == parallel.pipeline_parallel_size
        assert sum(layout.split) == len(chain_parts(config))
        again = load_config("paper-2b", layout.overrides)
        assert again == layout.config.model_copy(update={"parallel": again.parallel})
        assert pipeline_split(again) == layout.split


def test_more_of_a_thing_costs_more():
    config = load_config("paper-2b")
    by_choice = {
        tuple(layout.overrides[:3] + layout.overrides[-4:]): layout for layout in layouts_of(config, cluster(8), set())
    }
    for choice, layout in by_choice.items():
        recomputed = by_choice.get((*choice[:-1], "training.activation_checkpointing=true"))
        if choice[-1].endswith("false") and recomputed is not None:
            assert recomputed.peak <= layout.peak and recomputed.step_seconds > layout.step_seconds


def test_keys_of_the_command_line_are_kept():
    config = load_config("base", ["parallel.tensor_parallel_size=2", "training.micro_batch_size=4"])
    layouts, _ = plan(config, cluster(8), ["parallel.tensor_parallel_size", "training.micro_batch_size"])
    assert {
        (layout.config.parallel.tensor_parallel_size, layout.config.training.micro_batch_size) for layout in layouts
    } == {(2, 4)}


def test_measured_utilisation_replaces_the_model_of_the_computation():
    config = load_config("paper-2b")
    slow, fast = (
        plan(config, cluster(8, efficiency=efficiency_with([f"mfu={mfu}"])))[0][0].step_seconds for mfu in (0.2, 0.4)
    )
    assert 1.7 < slow / fast < 2


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_table_and_details():
    printed = cola("plan", "paper-2b", "--gpus", 1024, "--top", 3, "--eflops", 2000)
    for word in (
        "model EFLOPs              2,000",
        "prior, both copies",
        "of stage 2 alone",
        "nominal EFLOPs",
        "GPU-hours",
        "overrides",
        "stage 0 holds",
        "slower ones",
    ):
        assert word in printed
    assert "Example" in cola("plan", "--help")


def test_the_command_s_json_is_the_same_plan():
    tree = json.loads(cola("plan", "base", "--gpus", 8, "--gpu", "a100", "--tokens", 1e10, "--json"))
    assert tree["run"]["tokens"] == pytest.approx(1e10, rel=0.01) and tree["cluster"]["gpu"]["name"] == "a100"
    first = tree["layouts"][0]
    assert first["peak_bytes"] == max(stage["peak"] for stage in first["stages"])
    assert first["days"] == pytest.approx(tree["run"]["steps"] * first["step_seconds"] / 86_400)
    assert sum(part["parameters"] for part in tree["parts"]) == tree["parameters"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpus", "1", "--gpu-memory", "4"], 1, "none of"),
        (["--gpus", "7", "parallel.tensor_parallel_size=2"], 2, "keeps parallel.tensor_parallel_size"),
        (["--gpus", "1", "--gpu", "tpu"], 2, "a100, h100, h100-pcie, h100-nvl, h200, h200-nvl, b200"),
        (["--gpus", "1", "--tokens", "1e9", "--eflops", "1"], 2, "give one of them"),
        (["--gpus", "1", "--mfu", "2"], 2, "mfu=2.0"),
        (["--gpus", "1", "--assume", "speed=2"], 2, "no such assumption"),
        (["--gpus", "3", "parallel.pipeline_parallel_size=1"], 2, "global_batch_size="),
    ],
)
def test_wrong_use_is_one_line(monkeypatch, capsys, arguments, code, words):
    monkeypatch.setattr(sys, "argv", ["cola", "plan", "paper-2b", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    message = capsys.readouterr().err
    assert end.value.code == code and words in message and message.count("\n") == 1, message


def test_nothing_fits_names_what_is_least():
    with pytest.raises(PlanError, match=r"the least needs [\d.]+ GiB \(parallel.tensor_parallel_size="):
        plan(load_config("paper-2b"), cluster(1, gigabytes=4))
    with pytest.raises(ConfigError, match="no such assumption"):
        efficiency_with(["light=1"])


def test_the_parts_of_the_model_flops_add_up_to_them_in_every_mode():
    for overrides in ([], ["training.vae_update.mode=interval"], ["training.vae_update.mode=frozen"], ["stage=1"]):
        run = cost_of(load_config("paper-2b", overrides), 1_387)
        assert sum(run.parts.values()) == pytest.approx(run.compute["model"], rel=1e-12), overrides
    assert set(run.parts) == {"VAE on the text", "VAE on the masked view"}


def test_the_batch_is_named_where_it_is_the_limit():
    config = load_config("paper-2b")
    assert batch_limit(config, cluster(128)) is None
    assert "at most 128 replicas on 512 GPUs; training.global_batch_size=1536 would" in batch_limit(
        config, cluster(512)
    )


def test_a_number_of_gpus_that_fits_no_batch_is_refused_for_the_batch():
    with pytest.raises(ConfigError, match=r"global_batch_size=1408 cannot be cut over 3000 replicas"):
        plan(load_config("paper-2b"), cluster(3000))


def test_the_page_has_the_tables_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    rows = {name: rest for name, *rest in cells}
    for gpu in GPUS.values():
        rates = (gpu.bf16_flops / 1e12, gpu.memory_bytes / GIB, gpu.memory_bandwidth / 1e12, gpu.node_bandwidth / 1e9)
        rates += (gpu.host_bandwidth / 1e9, gpu.network_bandwidth / 1e9)
        assert [float(cell.replace(",", "")) for cell in rows[gpu.name][:6]] == pytest.approx(rates), gpu.name
    for field in fields(Efficiency):
        assert rows[field.name][0] == "" if field.default is None else float(rows[field.name][0]) == field.default


def test_the_pairs_of_attention_in_chunks_are_those_of_its_products():
    whole = load_config("paper-2b")
    chunked = load_config("paper-2b", ["training.attention_chunk=100"])  # rounded up to 112, seven blocks
    mask = two_copy_mask(512, 16, 496)
    products = two_copies_in_chunks(mask, 512, 496, 16, 100).chunks
    pairs = [
        next(part.computed_pairs for part in chain_parts(config) if part.label == "dit.block")
        for config in (chunked, whole)
    ]
    assert pairs[0] / pairs[1] == pytest.approx(sum(chunk.visible.numel() for chunk in products) / 1008**2)


def test_planning_needs_no_torch():
    """`cola plan` answers at once: costs are counted from the config, and no network is built."""
    code = "import sys; import cola_megatron.planning.plan, launchers.plan_table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
