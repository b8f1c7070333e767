"""Where a training step makes the host wait for the device: no place beyond those that docs/performance.md lists.

Every operation whose answer the host must know is counted, as it would be on a GPU, over one step of each family.
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cola_megatron.config import load_config
from cola_megatron.models import document_kernel
from cola_megatron.training.build_model import initialize_run
from cola_megatron.training.engine import Engine
from tools.bench_step import random_batches, with_micro_batches
from tools.gpu_setting import random_model

aten = torch.ops.aten
PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
MICRO_BATCHES = 2
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class Waits(TorchDispatchMode):
    """Counts, by the place in this project or in DeepSpeed, what a GPU could not answer without being waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in READS or _selects_by_mask(operation, args):
            place = _place(sys._getframe())
            if place is not None:
                self.at[place] += 1
        return operation(*args, **(kwargs or {}))


def _selects_by_mask(operation: Any, args: Any) -> bool:
    """x[mask] has as many rows as the mask has ones; x[mask] = number fills without knowing it."""
    if operation not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return False
    fills = operation is not aten.index.Tensor and args[2].numel() == 1
    return not fills and any(index is not None and index.dtype == torch.bool for index in args[1])


def _place(frame: FrameType | None) -> str | None:
    """`module: function` of the innermost frame that is not torch's; None: AdamW, whose counters are the host's own."""
    while frame is not None:
        module = frame.f_globals["__name__"]
        if module.startswith("torch.optim."):
            return None
        if module.split(".")[0] in ("deepspeed", "cola_megatron"):
            return f"{module}: {frame.f_code.co_name}"
        frame = frame.f_back
    return None


def listed() -> Iterator[tuple[str, str, str]]:
    """Place, how often, and for whom, of each row of the table."""
    table = PERFORMANCE.read_text().split("## Where the host waits")[1].split("\n## ")[0]
    yield from re.findall(r"^\| `([^`]+: \w+)` \| (\w[^|]*) \| ([^|]+) \|", table, re.MULTILINE)


CASES = [
    ("tiny", "fp32", False),
    *((preset, "bf16", False) for preset in ("tiny", "tiny-autoregressive", "tiny-masked-diffusion", "tiny-plaid")),
    ("tiny-autoregressive", "bf16", True),
]


@pytest.mark.parametrize(("preset", "precision", "kernel"), CASES)
def test_a_step_waits_where_the_page_says_and_nowhere_else(preset, precision, kernel, monkeypatch):
    """`kernel`: attention inside documents has one, as on a GPU; what it computes does not matter here."""
    if kernel:
        monkeypatch.setattr(document_kernel, "kernel_of_variable_lengths", lambda *device: lambda q, *others: q)
    options = ["data.sequence_length=32", "training.micro_batch_size=2", "parallel.zero_stage=1"]
    options += [f"training.precision={precision}", f"data.document_attention={str(kernel).lower()}"]
    config = load_config(preset, options)
    groups = initialize_run(config)
    config = with_micro_batches(config, MICRO_BATCHES, groups.data_parallel_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(random_model(config, groups), config, groups)
    try:
        batches = random_batches(config, groups)
        engine.step(batches, 0)
        prepared = [next(batches) for _ in range(MICRO_BATCHES)]
        with Waits() as waits:
            engine.step(iter(prepared), 1)
    finally:
        engine.close()
    often = {
        "step": 1,
        "micro-batch": MICRO_BATCHES,
        "step, and a group of parameters": 1 + len(engine.optimizer.adam.param_groups),
    }
    allowed = {
        place: often[how] for place, how, whose in listed() if preset.removeprefix("tiny-") in whose or "all" in whose
    }
    assert {place: count for place, count in waits.at.items() if count > allowed.get(place, 0)} == {}
    assert waits.at["cola_megatron.training.engine: step"] == 1, "the loss is read once"
    assert waits.at["cola_megatron.layers.packed_documents: pack_documents"] == (MICRO_BATCHES if kernel else 0)
