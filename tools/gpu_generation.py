"""Check of the speed of generation."""

from __future__ import annotations

import time

import numpy as np
import torch

from cola_megatron.inference.generate import GeneratedBlocks, GenerationSettings, generate_blocks
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import initialize_parameters
from tools.gpu_measurements import Record, Setting, synchronize


def check_generation(setting: Setting, batch: int) -> list[Record]:
    """Speed of guided generation with random weights: 16 Euler steps a block, both passes."""
    config = setting.config(setting.preset, "training.vae_update.from_scratch=true")
    model = Cola(config, setting.groups)
    initialize_parameters(model, config.seed, setting.groups)
    model = model.to(setting.device, torch.bfloat16).eval()
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.model.vocab_size, (batch, 64 if setting.on_gpu else 16)).tolist()
    new_tokens = (32 if setting.quick else 128) if setting.on_gpu else 16
    timed_generation(setting, model, prompts, 1)
    outputs, seconds = timed_generation(setting, model, prompts, new_tokens)
    generated = sum(len(output.token_ids) for output in outputs)
    ok = all(
        output.latents.isfinite().all() and int(output.token_ids.max()) < config.model.vocab_size for output in outputs
    )
    detail = f"{setting.preset}, bf16, prompts of {len(prompts[0])} tokens, {new_tokens} new ones, 16 steps, guidance 7"
    return [Record(f"generate.batch{batch}", bool(ok), generated / seconds, "tokens/s", detail)]


def timed_generation(
    setting: Setting, model: Cola, prompts: list[list[int]], new_tokens: int
) -> tuple[list[GeneratedBlocks], float]:
    """The generated blocks and the seconds they took."""
    settings = GenerationSettings(steps=16, guidance_scale=7.0, max_new_tokens=new_tokens)
    synchronize(setting)
    began = time.perf_counter()
    outputs = generate_blocks(model.vae, model.dit, prompts, list(range(len(prompts))), 0, settings)
    synchronize(setting)
    return outputs, time.perf_counter() - began
