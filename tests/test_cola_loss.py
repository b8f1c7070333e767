"""The losses as they are defined and the chain that training runs: the same terms and gradients, bit for bit."""

import pytest
import torch

from cola_megatron.config import RunConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.loss import frozen_vae_loss, stage_one_loss, stage_two_loss
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from tests.ranks import run_ranks
from tests.support import perturbed, random_batch

AFTER_STAGE_ONE = "training.vae_update.from_scratch=false"  # stage 2 with a reference encoder
BOTH_STAGES = {
    "plain": [],
    "without a mask view": ["objective.vae.mask_weight=0"],
    "a patch of two tokens": ["model.vae.patch_size=2"],
    "no variance": ["model.vae.variational=false", "objective.vae.beta=0", "objective.reference_weight=0"],
    "fixed log SNR": ["model.vae.fixed_logsnr=1.5"],
    "documents": ["data.document_attention=true"],
    "blocks in the VAE": ["model.vae.block_size=4"],
    "recomputed": ["training.activation_checkpointing=true"],
    "the other posterior term": ["objective.vae.posterior_term={other}"],
}
STAGE_TWO = {
    "from scratch": ["training.vae_update.from_scratch=true"],
    "no context is dropped": ["objective.flow.context_dropout=0"],
    "every context is dropped": ["objective.flow.context_dropout=1"],
    "documents and dropped contexts": ["data.document_attention=true", "objective.flow.context_dropout=0.5"],
    "many clean prefixes": ["objective.flow.clean_prefix_probability=0.9"],
    "no clean prefix": ["objective.flow.clean_prefix_probability=0"],
    "a time for each sample": ["objective.flow.time.per=sample"],
    "weights": ["objective.vae_weight=0.7", "objective.flow.weight=1.9", "objective.reference_weight=0.11"],
}
FROZEN = ["plain", "without a mask view", "a patch of two tokens", "no variance", "documents", "recomputed"]
MODES = [
    *((1, "joint", True, name) for name in BOTH_STAGES),
    *((2, "joint", True, name) for name in (*BOTH_STAGES, *STAGE_TWO)),
    *((2, mode, False, name) for mode in ("frozen", "interval") for name in FROZEN),
    (2, "interval", True, "plain"),
]


def model_of(config: RunConfig) -> Cola:
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    return perturbed(model)


def definition(model: Cola, batch: dict[str, torch.Tensor], train_vae: bool) -> dict[str, torch.Tensor]:
    config = model.config
    if config.stage == 1:
        return stage_one_loss(model.vae, batch, config)
    if train_vae:
        return stage_two_loss(model.vae, model.dit, model.reference, batch, config)
    return frozen_vae_loss(model.vae, model.dit, batch, config)


def gradients(model: Cola, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))


def assert_equal(model: Cola, batch: dict[str, torch.Tensor], train_vae: bool) -> set[str]:
    """The networks that the loss trains."""
    in_chain, defined = model(batch, train_vae=train_vae), definition(model, batch, train_vae)
    assert in_chain.keys() == defined.keys()
    assert all(torch.equal(in_chain[term], defined[term]) for term in in_chain)
    expected, found = gradients(model, defined["loss"]), gradients(model, in_chain["loss"])
    for parameter, gradient in expected.items():
        assert (gradient is None) == (found[parameter] is None), parameter
        assert gradient is None or torch.equal(found[parameter], gradient), parameter
    return {parameter.split(".")[0] for parameter, gradient in expected.items() if gradient is not None}


@pytest.mark.parametrize(("stage", "mode", "train_vae", "name"), MODES)
def test_the_chain_computes_the_definition(tiny, stage, mode, train_vae, name):
    overrides = [text.format(other="kl" if stage == 2 else "entropy") for text in (BOTH_STAGES | STAGE_TWO)[name]]
    model = model_of(tiny(stage, AFTER_STAGE_ONE, f"training.vae_update.mode={mode}", *overrides))
    batch = random_batch(model.config, range(3))
    batch["documents"][0, 11:], batch["documents"][1, 20:] = 1, 1
    batch["counted"][:2, 28:] = False
    trained = {"vae"} if stage == 1 else {"vae", "dit"} if train_vae else {"dit"}
    assert assert_equal(model, batch, train_vae) == trained


def test_the_definition_holds_on_tensor_parallel_ranks(tiny):
    layout = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    run_ranks(compare_on_a_rank, 2, tiny(2, AFTER_STAGE_ONE, "training.vae_update.mode=interval", *layout))


def compare_on_a_rank(config: RunConfig) -> None:
    from cola_megatron.training.build_model import build_model, initialize_run

    groups = initialize_run(config)
    model = build_model(config, groups)
    initialize_parameters(model, config.seed, groups)
    for train_vae in (True, False):
        assert_equal(perturbed(model), random_batch(config, range(3)), train_vae)
