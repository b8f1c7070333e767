"""Recorded evaluations: a recorder for the CPU that traces operations stands in for CUDA graphs.

Like a graph, a trace repeats the operations that it saw on the tensors that it saw them on; whatever Python would have
done differently the next time is not in it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cola_megatron.inference import cached_attention, graphs
from cola_megatron.inference.generate import FlowGenerator
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.interface import ColaDLM

FOLDER = Path(__file__).parent / "data" / "reference_tiny"
LENGTHS = [0, 3, 8, 9, 16, 18]


class Tracer:
    """Counts its recordings and their replays."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        output = run().clone()  # the warm-up; it also allocates what is allocated once
        traced = make_fx(run)()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            output.copy_(traced())

        return replay, output


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return ColaDLM.from_published(FOLDER, device="cpu")


def tokens(generator: FlowGenerator, **options) -> dict[int, list[int]]:
    settings = FlowSettings(**{"steps": 4, "max_new_tokens": 24} | options)
    requests = [Request(list(range(100, 100 + n)), n, 24 - 4 * (n % 3)) for n in LENGTHS]
    session, found = generator.start(requests, settings, 2), {}
    while session.running:
        for block in session.advance():
            found.setdefault(block.sample, []).extend(block.token_ids)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"guidance_interval": (0.3, 1.0)}, {"first_block": "partial_repaint"}, {"solver": "heun"}]
)
def test_replayed_steps_give_the_same_tokens(model, monkeypatch, options):
    monkeypatch.setattr(cached_attention, "WIDTH", 16)  # so that widths change on the way
    tracer = Tracer()
    expected = tokens(FlowGenerator(model.vae, model.dit), **options)
    found = tokens(FlowGenerator(model.vae, model.dit, tracer), **options)
    assert found == expected
    assert 0 < tracer.recordings < tracer.replays / 3


def test_one_recording_serves_all_blocks_of_a_width(model):
    tracer = Tracer()
    session = FlowGenerator(model.vae, model.dit, tracer).start(
        [Request(list(range(100, 108)), 0)], FlowSettings(steps=4, max_new_tokens=32), 2
    )
    while session.running:
        list(session.advance())
    assert (tracer.recordings, tracer.replays) == (1, 32)


@pytest.mark.parametrize("admitted", [0, 3])
def test_recordings_outlive_samples_that_leave_and_come(model, monkeypatch, admitted):
    """As many samples as before at the same widths: nothing is recorded anew, and the tokens are the same."""
    monkeypatch.setattr(cached_attention, "WIDTH", 64)
    requests = [Request(list(range(100, 100 + n)), n, 8) for n in (8, 12, 4, 9, 8)]
    settings, tracer, found = FlowSettings(steps=3), Tracer(), []
    for recorder in (None, tracer):
        session = FlowGenerator(model.vae, model.dit, recorder).start(requests[:2], settings, 2)
        tokens_of: dict[int, list[int]] = {}
        waiting = requests[2 : 2 + admitted]
        while session.running:
            for block in session.advance():
                tokens_of.setdefault(block.sample, []).extend(block.token_ids)
            if waiting and len(session.running) < 2:
                session.admit([waiting.pop(0) for _ in range(2 - len(session.running)) if waiting])
        found.append(tokens_of)
    assert found[0] == found[1] and len(found[0]) == 2 + admitted
    assert tracer.recordings == (2 if admitted else 1)  # of two samples; the last one is alone


@pytest.mark.slow  # compiles for half a minute
def test_compiled_steps_give_the_same_tokens(model):
    assert tokens(FlowGenerator(model.vae, model.dit, graphs.compiled())) == tokens(FlowGenerator(model.vae, model.dit))
