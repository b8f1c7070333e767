"""The loss of Plaid (arXiv 2305.18619), from a batch to its terms: the definition.

    loss = reconstruction + prior + diffusion      (nats per token; `objectives/plaid.py` has the equations)

Every sample is at one time t. Those at t = 0 estimate the reconstruction, the others the diffusion term; each term is
weighted so that it is the mean over a global batch. As published: x_hat = sum_v softmax(l)_v e_v, the output prior in
l, samples that are told their own first estimate train the network alone, and the schedule's shape minimises the
variance of the diffusion term (`schedule.py`). Ours: how many samples are at t = 0 is fixed (`draws.py`); and the
network is the transformer that the other families have.

Training runs the same as a chain of steps (`chain.py`); `tests/test_plaid.py` holds both equal, bit for bit.

Shapes: B batch, L tokens, S the same where they come first, C channels of an embedding, V vocabulary on this rank.
"""

from collections.abc import Mapping

import torch

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.families.plaid.categorical import embeddings_of
from cola_megatron.families.plaid.denoiser import Denoiser
from cola_megatron.families.plaid.draws import reconstruction_samples
from cola_megatron.families.plaid.network import PlaidParts
from cola_megatron.families.plaid.schedule import report_loss
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.averages import mean_over_counted, sample_means
from cola_megatron.objectives.plaid import diffusion_term, noisy_embeddings, prior_kl, squared_distance

stop_gradient = torch.Tensor.detach


LOSS_WEIGHTS = {"prior": 1.0, "reconstruction": 1.0, "diffusion": 1.0}
"""Of each term."""


def plaid_loss(
    transformer: Transformer, plaid: PlaidParts, batch: Mapping[str, torch.Tensor], config: PlaidConfig
) -> dict[str, torch.Tensor]:
    """The three terms and, under `loss`, their sum: float32 scalars.

    Args:
        batch: tokens, counted, documents (B, L) and the fields of `draws.plaid_draws`, stacked over B.
    """
    denoiser = Denoiser(transformer, plaid, config.training.loss_chunk_tokens)
    tokens_SB, counted_SB, told_B = batch["tokens"].t(), batch["counted"].t(), batch["self_conditioned"]
    time_B, output_prior_B = batch["time"], batch["output_prior"]
    documents_BL = texts_of(batch["documents"], batch["cut"], config)

    embeddings_VC = plaid.embeddings()
    gamma_B, slope_B, gamma_end_B, report_B = plaid.schedule(time_B, told_B)
    x_SBC = embeddings_of(batch["tokens"], embeddings_VC, transformer.groups)
    x_SBC = torch.where(told_B[:, None], stop_gradient(x_SBC), x_SBC)
    z_SBC = noisy_embeddings(x_SBC, batch["noise"].transpose(0, 1), gamma_B)
    first_SBC = None
    if config.objective.self_conditioning:
        first_SBC = denoiser.first_estimate(z_SBC, gamma_B, output_prior_B, embeddings_VC, told_B, documents_BL)
    context = denoiser.context(len(z_SBC), z_SBC.device, documents_BL)
    hidden_SBH = denoiser.hidden(z_SBC, gamma_B, first_SBC, context)
    estimate_SBC, nll_SB = denoiser.prediction(
        hidden_SBH, z_SBC, gamma_B, output_prior_B, embeddings_VC, tokens_SB, (~told_B).float()
    )

    terms = {
        "prior": mean_over_counted(prior_kl(x_SBC, gamma_end_B), counted_SB).float(),
        "reconstruction": reconstruction_loss(nll_SB, time_B, counted_SB, config),
        "diffusion": diffusion_loss(
            squared_distance(x_SBC, estimate_SBC), gamma_B, slope_B, report_B, time_B, counted_SB, config
        ),
    }
    return {"loss": sum(terms.values(), torch.zeros(())), **terms}


def reconstruction_loss(
    nll_SB: torch.Tensor, time_B: torch.Tensor, counted_SB: torch.Tensor, config: PlaidConfig
) -> torch.Tensor:
    """-E log p(x | z_0): over a global batch the mean of its samples at t = 0."""
    batch_size = config.training.global_batch_size
    share = reconstruction_samples(config.objective.reconstruction_share, batch_size) / batch_size
    return (sample_means(nll_SB, counted_SB) * (time_B == 0) / share).mean().float()


def diffusion_loss(
    distance_SB: torch.Tensor,
    gamma_B: torch.Tensor,
    slope_B: torch.Tensor,
    report_B: torch.Tensor,
    time_B: torch.Tensor,
    counted_SB: torch.Tensor,
    config: PlaidConfig,
) -> torch.Tensor:
    """1/2 E gamma' exp(-gamma) || x - x_hat ||^2: over a global batch the mean of its samples at t > 0."""
    batch_size = config.training.global_batch_size
    share = 1 - reconstruction_samples(config.objective.reconstruction_share, batch_size) / batch_size
    loss_B = sample_means(diffusion_term(distance_SB, gamma_B, slope_B), counted_SB)
    return (report_loss(loss_B, report_B) * (time_B > 0) / share).mean().float()


def texts_of(documents_BL: torch.Tensor, cut_B: torch.Tensor, config: PlaidConfig) -> torch.Tensor | None:
    """Which positions see each other: those of one number; None: all.

    A sample that is cut is two texts; with `data.document_attention` so is every document of it.
    """
    by_document, can_be_cut = config.data.document_attention, config.objective.cut_share > 0
    if not by_document and not (can_be_cut and bool((cut_B > 0).any())):
        return None
    positions_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    behind_BL = (positions_L >= cut_B[:, None]) & (cut_B[:, None] > 0)
    return 2 * documents_BL + behind_BL if by_document else behind_BL.long()
