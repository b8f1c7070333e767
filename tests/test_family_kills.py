"""A run of any family that was killed goes on: bit for bit in its own layout, and to the same weights in another."""

import shutil
import signal

import pytest
import torch

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import RunConfig, dump_config, load_config
from cola_megatron.training.loop import train
from tests.commands import Command
from tests.ranks import run_ranks
from tests.test_autoregressive_training import SMALL
from tests.test_kills import assert_same_end, wait_for

LONG = ["training.steps=4000", "training.checkpoint.every=1"]


def go_on(config: RunConfig) -> int:
    return train(config, progress=False).step


@pytest.mark.parametrize(
    ("preset", "own", "layout"),
    [
        ("tiny-autoregressive", [], ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]),
        ("tiny-masked-diffusion", ["model.block_size=8"], ["parallel.pipeline_parallel_size=2"]),
        ("tiny-plaid", [], ["parallel.zero_stage=3", "training.micro_batch_size=2"]),
    ],
)
def test_a_killed_run_goes_on_alone_and_in_another_layout(corpus, tmp_path, preset, own, layout):
    """Killed as soon as its third checkpoint is there, whatever it does at that moment."""

    def config(name: str, *overrides: str) -> RunConfig:
        paths = [f"data.path={corpus}", f"runs_folder={tmp_path}", f"name={name}"]
        return load_config(preset, [*SMALL, *LONG, *own, *paths, *overrides])

    killed, file = config("killed"), tmp_path / "killed.yaml"
    file.write_text(dump_config(killed))
    process, third = Command(("train", file)), killed.run_folder / "checkpoints" / "step_00000003"
    wait_for(third.exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = int(newest_checkpoint(killed.run_folder).name.removeprefix("step_"))
    end = f"training.stop_after={step + 2}"
    moved = config("moved", end, *layout)
    shutil.copytree(killed.run_folder, moved.run_folder)
    for name in ("straight", "killed"):
        assert go_on(config(name, end)) == step + 2
    assert_same_end(config("straight"), killed)
    assert run_ranks(go_on, 2, moved) == [step + 2] * 2
    expected, found = (read_weights(newest_checkpoint(each.run_folder))[1] for each in (killed, moved))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
