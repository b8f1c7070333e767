"""A training step of the prior beside the straightforward one and beside the products that it cannot do without.

    python -m tools.bench_prior                      4 x 256, 2 x 512 and 1 x 1024 latents, on this machine
    python -m tools.bench_prior --shapes 2x512

Forward, backward and AdamW of a diffusion transformer of 6 layers of 512 with blocks of 16, in float32, with equal
weights and inputs; the forms alternate in one process. `products` are the matrix products of our step alone, forward
and both gradients, at their own shapes, with the attention pairs that the mask keeps at the rate of the products: what
is left beside them is elementwise work, the mask and the optimiser. Memory is the peak of a process of its own beyond
what it held before its first step.

Predicted: AdaLN for every token costs a half of what the other matrices cost, and the mask keeps a quarter to a third
of the pairs, so that the straightforward step has 1.6 to 1.8 times our products.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from cola_megatron.config import DiTConfig, TrainingConfig
from cola_megatron.costs.part import two_copy_pairs
from cola_megatron.models.attention_chunks import attention_chunk
from cola_megatron.models.dit import DiT
from cola_megatron.parallel import ProcessGroups, initialize_parallel, initialize_parameters
from tools.bench_ranks import PeakMemory
from tools.plain_prior import plain_velocity

SHAPES = ((4, 256), (2, 512), (1, 1024))
CONFIG = DiTConfig(num_layers=6, hidden_size=512, num_attention_heads=8, head_dim=64, rotary_dim=48)
TOLERANCE = 1e-4
"""Relative, of a gradient in float32: both forms add up to a million products in different orders."""


class Work(NamedTuple):
    """What both forms are given."""

    clean_SBC: torch.Tensor
    noisy_SBC: torch.Tensor
    target_SBC: torch.Tensor
    times_BN: torch.Tensor


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for each shape; raises AssertionError where the forms compute something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="BATCHxLATENTS")
    parser.add_argument("--repeats", type=int, default=9, help="of which the median is printed (default 9)")
    chosen = parser.parse_args(arguments)
    groups = initialize_parallel()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {groups.device.type}")
    print(
        f"{'shape':<12}{'plain ms':>10}{'ours ms':>10}{'ratio':>8}{'products ms':>13}{'x products':>12}{'memory':>20}"
    )
    for batch, latents in chosen.shapes:
        assert_equal(batch, latents, groups)
        plain, ours, products = measure(batch, latents, chosen.repeats, groups)
        of_plain, of_ours = (peak_memory(form, batch, latents) for form in ("plain", "ours"))
        print(
            f"{f'{batch} x {latents}':<12}{plain * 1e3:>10.0f}{ours * 1e3:>10.0f}{plain / ours:>8.2f}"
            f"{products * 1e3:>13.0f}{ours / products:>12.2f}{f'{of_ours:.0f} of {of_plain:.0f} MiB':>20}",
            flush=True,
        )


def _shape(text: str) -> tuple[int, int]:
    batch, latents = text.split("x")
    return int(batch), int(latents)


def build(groups: ProcessGroups, latents: int) -> DiT:
    """The model, away from its start, where gates are closed."""
    dit = DiT(CONFIG, groups)
    initialize_parameters(dit, 0, groups)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
    dit.attention_chunk = attention_chunk(TrainingConfig(), latents, groups.device)
    return dit.to(groups.device)


def work_of(batch: int, latents: int, device: torch.device) -> Work:
    """Random latents and times."""
    random = torch.Generator().manual_seed(0)
    clean, noisy, target = (torch.randn(latents, batch, CONFIG.latent_dim, generator=random) for _ in range(3))
    times = torch.rand(batch, latents // CONFIG.block_size, generator=random)
    return Work(*(tensor.to(device) for tensor in (clean, noisy, target, times)))


def our_loss(dit: DiT, work: Work) -> torch.Tensor:
    """The clean copy without its last block, which nobody sees."""
    clean = work.clean_SBC[: -CONFIG.block_size]
    return (dit.two_copy_velocity(clean, work.noisy_SBC, work.times_BN) - work.target_SBC).square().mean()


def plain_loss(dit: DiT, work: Work) -> torch.Tensor:
    """The same, batch first."""
    clean, noisy, target = (x.transpose(0, 1).contiguous() for x in work[:3])
    return (plain_velocity(dit, clean, noisy, work.times_BN) - target).square().mean()


def assert_equal(batch: int, latents: int, groups: ProcessGroups) -> None:
    """Loss and every gradient."""
    dit, work = build(groups, latents), work_of(batch, latents, groups.device)
    parameters = dict(dit.named_parameters())
    found, expected = (
        torch.autograd.grad(loss(dit, work), list(parameters.values()), materialize_grads=True)
        for loss in (our_loss, plain_loss)
    )
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm() + 1e-9, name


def stepper(form: str, batch: int, latents: int, groups: ProcessGroups) -> Callable[[], None]:
    """A function that takes one step."""
    dit, work = build(groups, latents), work_of(batch, latents, groups.device)
    loss = our_loss if form == "ours" else plain_loss
    parameters = [{"params": list(dit.parameters())}]
    optimizer = torch.optim.AdamW(parameters, fused=form == "ours")

    def step() -> None:
        loss(dit, work).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(batch: int, latents: int, repeats: int, groups: ProcessGroups) -> tuple[float, float, float]:
    """Median seconds of the straightforward step, of ours, and of the products of ours, alternating."""
    forms = {
        "plain": stepper("plain", batch, latents, groups),
        "ours": stepper("ours", batch, latents, groups),
        "products": products(batch, latents, groups.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 2):
        for name, form in forms.items():
            _wait(groups.device)
            began = time.perf_counter()
            form()
            _wait(groups.device)
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - began)
    plain, ours, alone = (statistics.median(taken) for taken in seconds.values())
    return plain, ours, alone


def products(batch: int, latents: int, device: torch.device) -> Callable[[], None]:
    """The matrix products of our step, one after the other, into memory that is there already.

    Attention's are as many multiply-adds of one square product.
    """
    width, rows = CONFIG.hidden_size, batch * (2 * latents - CONFIG.block_size)
    times = 1 + batch * latents // CONFIG.block_size
    inner, heads = CONFIG.ffn_hidden_size, CONFIG.num_attention_heads * CONFIG.head_dim
    of_layer = [(rows, width, 3 * heads), (rows, heads, width), (rows, width, inner), (rows, inner, width)]
    of_layer += [(times, width, 2 * width), (times, width, width)] * 2
    shapes = [*of_layer * CONFIG.num_layers, (times, width, width), (times, width, width), (times, width, 2 * width)]
    pairs = two_copy_pairs(latents, CONFIG.block_size)
    # Queries by keys and weights by values forward, four products backward and the scores once more.
    attention = 7 * batch * pairs * heads * CONFIG.num_layers
    square = 512
    a, b, c = (torch.randn(square, square, device=device) for _ in range(3))
    operands = {
        (n, i, o): (
            torch.randn(n, i, device=device),
            torch.randn(o, i, device=device),
            torch.randn(n, o, device=device),
        )
        for n, i, o in set(shapes)
    }

    def run() -> None:
        for shape in shapes:
            x, weight, gradient = operands[shape]
            torch.mm(x, weight.t(), out=outputs[shape][0])
            torch.mm(gradient, weight, out=outputs[shape][1])
            torch.mm(gradient.t(), x, out=outputs[shape][2])
        for _ in range(round(attention / square**3)):
            torch.mm(a, b, out=c)

    outputs = {shape: tuple(torch.empty_like(operands[shape][index]) for index in (2, 0, 1)) for shape in operands}
    return run


def peak_memory(form: str, batch: int, latents: int) -> float:
    """MiB that steps need at their peak beyond what the process held before, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_of_process, (form, batch, latents))


def _peak_of_process(form: str, batch: int, latents: int) -> float:
    groups = initialize_parallel()
    step = stepper(form, batch, latents, groups)
    peak = PeakMemory(groups.device)
    for _ in range(3):
        step()
    return peak.bytes() / 2**20


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
