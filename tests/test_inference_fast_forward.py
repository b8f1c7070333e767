"""The prepared forwards compute what the original ones do, notice new weights, and leave gradients alone."""

from pathlib import Path

import pytest
import torch

from cola_megatron.config import DiTConfig, VAEConfig
from cola_megatron.inference.fast_forward import Product, phases, prepare, rotate
from cola_megatron.layers.rotary import rotary_table, rotate_interleaved
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.support import perturbed

GROUPS = initialize_parallel()
ROWS = [*range(1, 40), 64, 96, 128, 200]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def networks(dtype: torch.dtype = torch.float32) -> tuple[TextVAE, DiT]:
    vae = TextVAE(
        50,
        VAEConfig(
            encoder_layers=1, decoder_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, latent_dim=4
        ),
        GROUPS,
    )
    dit = DiT(
        DiTConfig(
            num_layers=2, hidden_size=32, num_attention_heads=2, head_dim=16, rotary_dim=12, latent_dim=4, qkv_bias=True
        ),
        GROUPS,
    )
    for network in (vae, dit):
        initialize_parameters(network, 0, GROUPS)
        perturbed(network).to(dtype).eval().requires_grad_(False)
    return vae, dit


def outputs(vae: TextVAE, dit: DiT) -> list[torch.Tensor]:
    posterior = vae.encoder(torch.arange(48).view(3, 16))
    times = torch.tensor([0.0, 0.4])
    from cola_megatron.layers.time_embedding import TimeRows
    from cola_megatron.models.dit import TimeTable

    table = TimeTable(times, TimeRows(torch.arange(2).repeat(8)[:, None].expand(16, 3)))
    context = dit.two_copy_context(16, 0, None, torch.device("cpu"))
    return [posterior.mean, posterior.logvar, vae.decoder(draw(16, 3, 4)), dit(draw(16, 3, 4), table, context)]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_prepared_networks_compute_the_same(dtype, tolerance):
    vae, dit = networks(dtype)
    names = [set(network.state_dict()) for network in (vae, dit)]
    expected = outputs(vae, dit)
    for network in (vae, dit, vae, dit):  # a second time changes nothing
        prepare(network, GROUPS)
    found = outputs(vae, dit)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert [set(network.state_dict()) for network in (vae, dit)] == names


@torch.no_grad()
def test_new_weights_are_noticed():
    vae, dit = networks()
    for network in (vae, dit):
        prepare(network, GROUPS)
    outputs(vae, dit)
    for network in (vae, dit):
        perturbed(network)
    found = outputs(vae, dit)
    again = networks()
    for network in again:
        perturbed(network)
    for ours, theirs in zip(found, outputs(*again), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_the_original_forward():
    _, dit = networks()
    prepare(dit, GROUPS)
    x = draw(5, 1, 32).requires_grad_()
    dit.blocks[0].ffn(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inputs", "width"), [(16, 64), (64, 192), (256, 64), (512, 1536), (2048, 512), (100, 300)])
def test_a_row_does_not_depend_on_how_many_come_along(inputs, width, gelu):
    """What batch invariance on a CPU rests on; it is a property of oneDNN's kernels, not a promise of theirs."""
    weight = torch.nn.Parameter(draw(width, inputs), requires_grad=False)
    product = Product(weight, torch.nn.Parameter(draw(width, seed=1), requires_grad=False), gelu)
    x = draw(300, inputs, seed=2)
    whole = product(x)
    if product._packed is None:
        pytest.skip("no packed product on this machine")
    for rows in ROWS:
        for start in (0, 16, 37):
            assert torch.equal(product(x[start : start + rows]), whole[start : start + rows]), rows


@torch.no_grad()
def test_without_the_kernel_the_general_product_is_taken(monkeypatch):
    weight = torch.nn.Parameter(draw(8, 4), requires_grad=False)
    bias = torch.nn.Parameter(draw(8, seed=1), requires_grad=False)
    expected = [Product(weight, bias, gelu)(draw(2, 3, 4)) for gelu in (False, True)]
    monkeypatch.setattr("cola_megatron.inference.fast_forward._packed", lambda weight: None)
    for gelu, theirs in zip((False, True), expected, strict=True):
        torch.testing.assert_close(Product(weight, bias, gelu)(draw(2, 3, 4)), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_one_multiplication(dtype):
    x = draw(6, 2, 3, 16).to(dtype)
    table = rotary_table(torch.arange(12).view(6, 2) * 37, 12, 10_000.0)
    expected = rotate_interleaved(x, table)
    assert torch.equal(rotate(x, table), expected)
    found = rotate(x.clone(), phases(table))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_the_golden_model_is_prepared():
    from cola_megatron.interface import ColaDLM

    model = ColaDLM.from_published(Path(__file__).parent / "data" / "reference_tiny", device="cpu")
    assert "forward" in vars(model.dit.blocks[0].attention.qkv) and "forward" in vars(model.vae.decoder.head.linear)
    assert "forward" not in vars(model.dit.blocks[0].attention_gate.linear)
