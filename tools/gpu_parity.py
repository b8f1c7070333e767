"""Checks against the published package's numbers, which `tests/data/reference_tiny` holds."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from cola_megatron.interface import ColaDLM
from tools.gpu_setting import Record, Setting

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "reference_tiny"

# The golden numbers and ours are both float32 and round differently: the golden ones are up to 6e-6 of a tensor's
# largest magnitude away from the same model in float64, and another float32 evaluation may be as far on the other side.
FP32_TOLERANCE = 2e-5
# Rounding to bfloat16 is wrong by 2^-8 at most, and by 2^-8 / sqrt(3) in the root mean square. Independent roundings in
# series add in squares; the network passes them on roughly as they are, with a factor 2 for what it amplifies.
BF16_ROUNDING = 2**-8 / math.sqrt(3)
BF16_AMPLIFICATION = 2.0
ROUNDINGS_PER_BLOCK, ROUNDINGS_AT_THE_ENDS = 16, 8


def check_golden_fp32(setting: Setting) -> list[Record]:
    """The published package's numbers in float32 without TF32: the largest error of a tensor, relative to its size."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    with without_tf32():
        found = golden_outputs(ColaDLM.from_published(GOLDEN, device=setting.device), golden)
    errors = {name: ((x - golden[name]).abs().max() / golden[name].abs().max()).item() for name, x in found.items()}
    worst = max(errors, key=errors.__getitem__)
    detail = f"worst is {worst}; tolerance {FP32_TOLERANCE:.0e}"
    return [Record("golden.fp32", errors[worst] <= FP32_TOLERANCE, errors[worst], "relative error", detail)]


def check_golden_bf16(setting: Setting) -> list[Record]:
    """The same in bfloat16: the root mean square error of a tensor, relative to its root mean square."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    model = ColaDLM.from_published(GOLDEN, device=setting.device, dtype=torch.bfloat16)
    depths = {
        "encode": model.config.vae.encoder_layers,
        "decode": model.config.vae.decoder_layers,
        "train": model.config.dit.num_layers,
    }
    found = golden_outputs(model, golden)
    errors = {name: ((x - golden[name]).norm() / golden[name].norm()).item() for name, x in found.items()}
    shares = {name: error / bf16_tolerance(depths[name.split(".")[0]]) for name, error in errors.items()}
    worst = max(shares, key=shares.__getitem__)
    tolerance = errors[worst] / shares[worst] if shares[worst] else bf16_tolerance(1)
    detail = f"worst is {worst}; tolerance {tolerance:.1e}, derived from the roundings in series"
    return [Record("golden.bf16", shares[worst] <= 1.0, errors[worst], "relative error", detail)]


def bf16_tolerance(blocks: int) -> float:
    """Relative root mean square error that bfloat16 may cause in a network of so many blocks."""
    roundings = ROUNDINGS_PER_BLOCK * blocks + ROUNDINGS_AT_THE_ENDS
    return BF16_AMPLIFICATION * BF16_ROUNDING * math.sqrt(roundings)


def check_golden_generation(setting: Setting) -> list[Record]:
    """Greedy generation in float32: the share of the first sample's tokens that are the published ones."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    published = json.loads((GOLDEN / "generate.json").read_text())
    prompt, equal, total = published["prompts"][0], 0, 0
    with without_tf32():
        model = ColaDLM.from_published(GOLDEN, device=setting.device)
        for index, run in enumerate(published["runs"]):
            settings = {name: run[name] for name in ("steps", "guidance_scale", "max_new_tokens", "repetition_penalty")}
            (output,) = model.generate(
                [prompt["question"]],
                ids=[prompt["id"]],
                noise_seed=published["noise_seed"],
                padding_id=published["pad_token_id"],
                **settings,
            )
            expected = golden[f"generate.{index}.ids"][0]
            equal += int((output.token_ids[: len(expected)] == expected).sum())
            total += len(expected)
    detail = f"{equal} of {total} tokens in {len(published['runs'])} runs"
    return [Record("golden.generation", equal == total, equal / total, "share of tokens", detail)]


def golden_outputs(model: ColaDLM, golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the golden tensors hold, computed by `model`, in float32 on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for text in range(3):
        mean, logvar = model.encode(golden[f"encode.{text}.ids"])
        found |= {f"encode.{text}.mean": mean, f"encode.{text}.logvar": logvar}
    found["decode.logits"] = model.decode(golden["decode.z"], golden["decode.lengths"].tolist())
    t, z0, z1 = golden["train.t"], golden["train.z0"], golden["train.z1"]
    noisy = (1 - t[:, None, None]) * z0 + t[:, None, None] * z1
    found["train.velocity_noisy"] = model.velocity(z0, noisy, t)
    return {name: tensor.float().cpu() for name, tensor in found.items()}


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Float32 matrix products in float32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn
