"""Tensor parallel inference: every process has the tokens of a single one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cola_megatron.interface import ColaDLM
from tests.ranks import run_ranks

FOLDER = Path(__file__).parent / "data" / "reference_tiny"
PROMPTS = ["", "the", "the prior carries meaning and the decoder writes words . a block", "noise becomes structure"]
SETTINGS = [
    {"steps": 8, "max_new_tokens": 16},
    {"steps": 4, "max_new_tokens": [8, 4, 12, 8], "temperature": 0.9, "top_p": 0.9, "stop": "m"},
]
IDS = list(range(100, 116))


def answers(tensor_parallel_size: int, exported: Path) -> dict:
    """What one process is told; arrays in place of tensors, which would cross processes as open files."""
    model = ColaDLM.from_published(FOLDER, device="cpu", tensor_parallel_size=tensor_parallel_size)
    generations = [generation for settings in SETTINGS for generation in model.generate(PROMPTS, **settings)]
    mean, logvar = model.encode(IDS)
    clean, noisy = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model.save_published(exported)
    return {
        "tokens": [generation.token_ids.tolist() for generation in generations],
        "texts": [(generation.text, generation.finish_reason) for generation in generations],
        "latents": [generation.latents.numpy() for generation in generations],
        "others": [
            found.numpy()
            for found in (mean, logvar, model.decode(mean, [8, 8]), model.velocity(clean, noisy, torch.tensor([0.3])))
        ],
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return answers(1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_process_has_the_answers_of_one(ranks, alone, tmp_path):
    for found in run_ranks(answers, ranks, ranks, tmp_path / "export"):
        assert found["tokens"] == alone["tokens"] and found["texts"] == alone["texts"]
        for name in ("latents", "others"):
            for ours, theirs in zip(found[name], alone[name], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    model, original = (ColaDLM.from_published(folder, device="cpu") for folder in (tmp_path / "export", FOLDER))
    for network in ("vae", "dit"):
        ours, theirs = getattr(model, network).state_dict(), getattr(original, network).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
