"""Sequences of several documents: padding counts for nothing, and attention can be kept inside each document."""

import pytest
import torch

from cola_megatron.families.cola.chain import Cola
from cola_megatron.objectives.averages import mean_over_counted
from cola_megatron.objectives.samples import positions
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed, random_batch

PADDING, END = 2, 0


@pytest.fixture
def model_of(tiny):
    def build(stage, *overrides):
        config, groups = tiny(stage, *overrides), initialize_parallel()
        model = Cola(config, groups)
        initialize_parameters(model, 1, groups)
        return config, perturbed(model)

    return build


def test_positions_number_the_documents_and_leave_padding_out():
    import numpy as np

    fields = positions(np.array([7, 8, END, 9, END, 5, PADDING, PADDING]), PADDING, END)
    assert fields["documents"].tolist() == [0, 0, 0, 1, 1, 2, -1, -1]
    assert fields["counted"].tolist() == [True] * 6 + [False] * 2


def test_the_mean_of_a_batch_is_the_mean_of_its_micro_batches():
    generator = torch.Generator().manual_seed(0)
    values, counted = torch.rand(6, 4, generator=generator), torch.rand(6, 4, generator=generator) < 0.5
    counted[0] = True
    halves = [mean_over_counted(values[:, part], counted[:, part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(mean_over_counted(values, counted), sum(halves) / 2)
    assert mean_over_counted(values, torch.zeros_like(counted)) == 0


def with_padding(batch, first):
    counted = batch["counted"].clone()
    counted[:, first:] = False
    return {**batch, "counted": counted}


@pytest.mark.parametrize("stage", [1, 2])
def test_padding_has_no_loss(model_of, stage):
    """What stands in the padding changes no term: the encoder is causal, and nothing of it counts."""
    config, model = model_of(stage, "model.vae.block_size=1")
    batch = with_padding(random_batch(config, range(3)), 24)  # whole blocks of the prior
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][:, 24:] = (other["tokens"][:, 24:] + 17) % 300
    loss = model(batch)["loss"]
    assert loss.isfinite()
    torch.testing.assert_close(loss, model(other)["loss"], rtol=1e-6, atol=1e-6)
    assert abs(model({**batch, "counted": torch.ones_like(batch["counted"])})["loss"] - loss) > 1e-4


@pytest.mark.parametrize("stage", [1, 2])
def test_documents_do_not_see_each_other(model_of, stage):
    """With document attention the first document's terms do not change with the second; without they do."""
    for attention in ("true", "false"):
        config, model = model_of(stage, f"data.document_attention={attention}", "model.vae.block_size=4")
        batch = random_batch(config, range(2))
        batch["documents"][:, 16:] = 1
        # Only the second document counts; the first changes.
        batch["counted"][:, :16] = False
        other = {**batch, "tokens": batch["tokens"].clone()}
        other["tokens"][:, :16] = (other["tokens"][:, :16] + 17) % 300
        difference = abs(model(batch)["loss"] - model(other)["loss"]).item()
        assert difference < 1e-6 if attention == "true" else difference > 1e-5, (attention, difference)
