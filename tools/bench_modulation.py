"""How much evaluating AdaLN once per distinct time saves, against once per position, on the same work in one run.

    python -m tools.bench_modulation --hidden-size 512 --layers 6 --length 512 --batch 4

Counted per position and layer of width w: 12 w^2 multiply-adds in the matrices and, with a row for every position,
6 w^2 more in the modulations; so the bound of the ratio is 1.5 where attention and elementwise work cost nothing.
"""

import argparse
import statistics
import time

import torch

from cola_megatron.config import DiTConfig
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.dit import DiT, TimeTable, two_copy_times
from cola_megatron.parallel import initialize_parallel, initialize_parameters


def main() -> None:
    """Times forward and backward of the two-copy pass in both forms, alternating, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden-size", 512), ("layers", 6), ("length", 512), ("batch", 4), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    groups = initialize_parallel()
    config = DiTConfig(
        num_layers=chosen.layers,
        hidden_size=chosen.hidden_size,
        num_attention_heads=chosen.hidden_size // 64,
        head_dim=64,
        rotary_dim=48,
    )
    dit = DiT(config, groups)
    initialize_parameters(dit, 0, groups)
    dit.to(groups.device)
    clean_length = chosen.length - config.block_size
    times_BN = torch.rand(chosen.batch, chosen.length // config.block_size, device=groups.device)
    distinct = two_copy_times(times_BN, chosen.length, clean_length, None)
    forms = {"once per distinct time": distinct, "once per position": per_position(distinct)}
    z_SBC = torch.randn(clean_length + chosen.length, chosen.batch, config.latent_dim, device=groups.device)
    context = dit.two_copy_context(chosen.length, clean_length, None, groups.device)

    def step(times: TimeTable) -> float:
        _wait(groups.device)
        began = time.perf_counter()
        dit(z_SBC, times, context).square().mean().backward()
        _wait(groups.device)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(chosen.repeats + 1):
        for name, times in forms.items():
            taken = step(times)
            if repeat:  # the first round warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, times in forms.items():
        print(f"{name:<24} {medians[name] * 1e3:10.1f} ms   {times.times_T.numel():6d} rows")
    print(f"ratio                    {medians['once per position'] / medians['once per distinct time']:10.2f}")


def per_position(times: TimeTable) -> TimeTable:
    """The same times with a row of its own for every position, as the published code evaluates them."""
    assert times.rows is not None, "a table of several times"
    rows_SB = times.rows.rows_SB
    positions = torch.arange(rows_SB.numel(), device=rows_SB.device)
    return TimeTable(times.times_T[rows_SB].flatten(), TimeRows(positions.view(rows_SB.shape)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
