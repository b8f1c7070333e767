"""The losses of Cola DLM (paper section 2), from a batch to its terms: the definition.

    stage 1    L_VAE with the posterior term KL(q(z0|x) || N(0, I))
    stage 2    lambda_VAE L_VAE with the posterior term E log q(z0|x)
               + lambda_FM L_FM + lambda_ref E KL(q(z0|x) || q_ref(z0|x))
    where      L_VAE = -E log p(x|z0) + beta * posterior term + lambda_mask L_mask
               L_FM  = E || v(z_t, t; sg(z0^(<b))) - sg(z1 - z0) ||^2,   z_t = (1 - t) z0 + t z1

Training runs the same as a chain of steps that a pipeline can cut (`families/cola/chain.py`); `tests/test_cola_loss.py`
holds both equal, bit for bit, in every term and gradient. A batch has the fields of `families.samples.training_sample`,
stacked over B. A loss is the terms by name, float32 scalars, and their weighted sum as `loss`.

Shapes: B batch, W texts and behind them their masked views (2 B, or B without a mask loss), L tokens (T where they come
first), S latents, C latent channels, N blocks, V vocabulary on this rank.
"""

from collections.abc import Mapping

import torch

from cola_megatron.config import ColaConfig
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextEncoder, TextVAE
from cola_megatron.objectives.flow_matching import flow_matching_loss, noisy_latents, times_of_positions
from cola_megatron.objectives.masking import mask_loss, masked_view
from cola_megatron.objectives.samples import latent_positions
from cola_megatron.objectives.vae import (
    Posterior,
    kl_to_reference,
    kl_to_standard_normal,
    negative_entropy,
    reconstruction_loss,
    sample_posterior,
)

Batch = Mapping[str, torch.Tensor]
Terms = dict[str, torch.Tensor]
stop_gradient = torch.Tensor.detach


def stage_one_loss(vae: TextVAE, batch: Batch, config: ColaConfig) -> Terms:
    """L_VAE: the Text VAE alone."""
    terms, _, _ = vae_terms(vae, batch, config)
    return with_loss(terms, loss_weights(config))


def stage_two_loss(vae: TextVAE, dit: DiT, reference: TextEncoder | None, batch: Batch, config: ColaConfig) -> Terms:
    """lambda_VAE L_VAE + lambda_FM L_FM + lambda_ref E KL(q || q_ref): VAE and prior jointly.

    `reference` is the stage-1 encoder; None where lambda_ref is 0 or stage 2 starts from scratch.
    """
    terms, posterior, z0_SBC = vae_terms(vae, batch, config)
    terms["flow_matching"] = flow_matching_term(dit, z0_SBC, batch, config)
    if reference is not None:
        counted_SB, documents_BS = latent_positions(batch, config)
        with torch.no_grad():  # q_ref is frozen
            q_ref = reference(batch["tokens"], documents_BS)
        terms["reference"] = kl_to_reference(posterior, q_ref, counted_SB, config.model.vae.patch_size)
    return with_loss(terms, loss_weights(config))


def frozen_vae_loss(vae: TextVAE, dit: DiT, batch: Batch, config: ColaConfig) -> Terms:
    """lambda_FM L_FM alone: stage 2 with a frozen VAE, and the frozen steps of an interval."""
    _, documents_BS = latent_positions(batch, config)
    with torch.no_grad():
        posterior = vae.encoder(batch["tokens"], documents_BS)
        z0_SBC = vae.to_prior(sample_posterior(posterior, batch["posterior_noise"][:, 0].transpose(0, 1)))
    terms = {"flow_matching": flow_matching_term(dit, z0_SBC, batch, config)}
    return with_loss(terms, loss_weights(config, train_vae=False))


def vae_terms(vae: TextVAE, batch: Batch, config: ColaConfig) -> tuple[Terms, Posterior, torch.Tensor]:
    """The terms of L_VAE; and, of the texts alone, q(z0|x) and z0 in the prior's coordinates."""
    tokens_BL, counted_TB, texts = batch["tokens"], batch["counted"].t(), len(batch["tokens"])
    counted_SB, documents_BS = latent_positions(batch, config)
    views = [tokens_BL]
    if config.objective.vae.mask_weight > 0:
        views.append(masked_view(tokens_BL, batch["masked"], vae.encoder.mask_token_id))
    documents_WS = None if documents_BS is None else documents_BS.repeat(len(views), 1)
    noise_SWC = batch["posterior_noise"].permute(2, 1, 0, 3).flatten(1, 2)

    posterior = vae.encoder(torch.cat(views), documents_WS)
    z0_SWC = vae.to_prior(sample_posterior(posterior, noise_SWC))
    logits_TWV = vae.decoder(z0_SWC, documents_WS)
    nll_TW = token_cross_entropy(logits_TWV, tokens_BL.t().repeat(1, len(views)))

    terms = {"reconstruction": reconstruction_loss(nll_TW[:, :texts], counted_TB)}
    if config.model.vae.variational:
        term = kl_to_standard_normal if config.posterior_term == "kl" else negative_entropy
        terms["posterior"] = term(posterior.of_first(texts), counted_SB, config.model.vae.patch_size)
    if config.objective.vae.mask_weight > 0:
        terms["mask"] = mask_loss(nll_TW[:, texts:], batch["masked"], counted_TB)
    return terms, posterior.of_first(texts), z0_SWC[:, :texts]


def flow_matching_term(dit: DiT, z0_SBC: torch.Tensor, batch: Batch, config: ColaConfig) -> torch.Tensor:
    """L_FM, of all blocks in one pass over `[clean copy | noisy copy]`."""
    counted_SB, documents_BS = latent_positions(batch, config)
    z1_SBC, at_zero_SB = batch["flow_noise"].transpose(0, 1), batch["at_zero"].t()
    has_dropout = config.objective.flow.context_dropout > 0

    # The only way of the gradient from L_FM to the encoder is z_t: context and target are detached.
    zt_SBC = noisy_latents(z0_SBC, z1_SBC, times_of_positions(batch["time"], len(z0_SBC)))
    zt_SBC = torch.where(at_zero_SB[..., None], stop_gradient(z0_SBC), zt_SBC)  # a clean prefix is context as well
    velocity_SBC = dit.two_copy_velocity(
        stop_gradient(z0_SBC[: -config.model.dit.block_size]),  # no noisy block sees the last clean one
        zt_SBC,
        batch["time"],
        batch["at_zero"],
        batch["context_dropped"] if has_dropout else None,
        documents_BS,
    )
    target_SBC = stop_gradient(z1_SBC - z0_SBC)
    return flow_matching_loss(velocity_SBC, target_SBC, at_zero_SB, counted_SB)


def loss_weights(config: ColaConfig, train_vae: bool = True) -> dict[str, float]:
    """The weight of each term that a pass has, in the order in which they are added up.

    Without a variance there is no posterior term, without a weight no masked view, without a stage-1 encoder no
    reference; stage 1 has no flow, and a pass that leaves the VAE frozen has nothing else.
    """
    objective = config.objective
    vae_weight = objective.vae_weight if config.stage == 2 else 1.0
    weights = {}
    if train_vae and config.model.vae.variational:
        weights["posterior"] = vae_weight * objective.vae.beta
    if train_vae and config.uses_reference:
        weights["reference"] = objective.reference_weight
    if config.stage == 2:
        weights["flow_matching"] = objective.flow.weight
    if train_vae:
        weights["reconstruction"] = vae_weight
    if train_vae and objective.vae.mask_weight > 0:
        weights["mask"] = vae_weight * objective.vae.mask_weight
    return weights


def with_loss(terms: Terms, weights: Mapping[str, float]) -> Terms:
    """The terms, and under `loss` their weighted sum."""
    loss = sum((weight * terms[name] for name, weight in weights.items()), torch.zeros(()))
    return {"loss": loss, **terms}
