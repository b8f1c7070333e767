"""Cola DLM in training: the Text VAE alone (stage 1), or VAE and DiT jointly (stage 2), as a list of steps.

Shapes: B batch, W views of each sample stacked along the batch (the text, then its masked view), L tokens, S latents,
C latent channels, N blocks, H hidden.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from cola_megatron.config import RunConfig
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.models.dit import DiT, two_copy_times
from cola_megatron.models.steps import Step, run_steps
from cola_megatron.models.text_vae import TextEncoder, TextVAE
from cola_megatron.objectives import flow_matching, masking, vae
from cola_megatron.objectives.vae import Posterior
from cola_megatron.parallel import ProcessGroups


class Cola(nn.Module):
    """All networks of one stage, and its loss.

    Stage 2 holds a frozen copy of the stage-1 encoder as `reference` where `objective.reference_weight` asks for it.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups):
        super().__init__()
        self.config = config
        self.vae = TextVAE(config.model.vocab_size, config.model.vae, groups)
        self.dit = DiT(config.model.dit, groups) if config.stage == 2 else None
        self.reference = None
        if config.uses_reference:
            self.reference = TextEncoder(config.model.vocab_size, config.model.vae, groups).requires_grad_(False)
        if config.stage == 2 and config.training.vae_update.mode == "frozen":
            self.vae.requires_grad_(False)

    def forward(self, batch: Mapping[str, torch.Tensor], train_vae: bool = True) -> dict[str, torch.Tensor]:
        """Loss and its terms for one micro-batch.

        Args:
            batch: `tokens` (B, L) and the draws of `objectives.randomness.sample_draws`, stacked over B.
            train_vae: False leaves the VAE out of the loss and of the graph (frozen, or a frozen step of an interval).

        Returns:
            float32 scalars: `loss`, and each term by name.
        """
        state = run_steps(self.steps(train_vae), batch)
        terms = {name.removeprefix("loss_"): term for name, term in state.items() if name.startswith("loss_")}
        return {"loss": self._weighted(terms), **{name: term.detach() for name, term in terms.items()}}

    def steps(self, train_vae: bool = True) -> list[Step]:
        """The stage's computation in order."""
        steps = [*self.encode_steps(train_vae)]
        if self.dit is not None:
            steps += self.flow_steps()
        if train_vae:
            steps += self.decode_steps()
        return steps

    def _weighted(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Stage 1: L_VAE. Stage 2: vae_weight * L_VAE + flow.weight * L_FM + reference_weight * KL(q || q_ref)."""
        objective = self.config.objective
        vae_weight = objective.vae_weight if self.dit is not None else 1.0
        weights = {
            "reconstruction": vae_weight,
            "posterior": vae_weight * objective.vae.beta,
            "mask": vae_weight * objective.vae.mask_weight,
            "flow_matching": objective.flow.weight,
            "reference": objective.reference_weight,
        }
        return sum(weights[name] * term for name, term in terms.items())

    def encode_steps(self, train_vae: bool) -> Iterator[Step]:
        """tokens -> latents of all views, and the terms of the posterior."""
        encoder, config = self.vae.encoder, self.config
        patch_size, recompute = config.model.vae.patch_size, config.training.activation_checkpointing
        has_mask_view = train_vae and config.objective.vae.mask_weight > 0

        def views(tokens_BL: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
            return torch.cat((tokens_BL, masking.masked_view(tokens_BL, masked_BL, encoder.mask_token_id)))

        yield (
            Step("tokens, masked -> views", views)
            if has_mask_view
            else Step("tokens -> views", lambda tokens_BL: tokens_BL)
        )
        if train_vae:
            context = encoder.context(config.latent_length, _device(self))
            yield Step("views -> hidden", encoder.embed)
            for block in encoder.blocks:
                yield Step("hidden -> hidden", lambda x, block=block: block(x, context), recompute=recompute)
            yield Step("hidden -> mean, logvar", encoder.posterior)
        else:
            yield Step("views -> mean, logvar", torch.no_grad()(encoder))

        def sample(mean_SWC: torch.Tensor, logvar_SWC: torch.Tensor | None, noise_BVSC: torch.Tensor) -> torch.Tensor:
            noise_SWC = noise_BVSC[:, : 1 + has_mask_view].permute(2, 1, 0, 3).flatten(1, 2)
            return self.vae.to_prior(vae.sample_posterior(Posterior(mean_SWC, logvar_SWC), noise_SWC))

        yield Step("mean, logvar, posterior_noise -> latents", sample)

        def of_the_text(mean_SWC: torch.Tensor, logvar_SWC: torch.Tensor | None, tokens_BL: torch.Tensor) -> Posterior:
            batch = tokens_BL.shape[0]
            return Posterior(mean_SWC[:, :batch], None if logvar_SWC is None else logvar_SWC[:, :batch])

        if train_vae and config.model.vae.variational:
            term = vae.kl_to_standard_normal if config.posterior_term == "kl" else vae.negative_entropy
            yield Step(
                "mean, logvar, tokens -> loss_posterior",
                lambda mean, logvar, tokens: term(of_the_text(mean, logvar, tokens), patch_size),
            )
        if train_vae and self.reference is not None:
            yield Step("tokens -> reference_mean, reference_logvar", torch.no_grad()(self.reference))
            yield Step(
                "mean, logvar, reference_mean, reference_logvar, tokens -> loss_reference",
                lambda mean, logvar, reference_mean, reference_logvar, tokens: vae.kl_to_reference(
                    of_the_text(mean, logvar, tokens), Posterior(reference_mean, reference_logvar), patch_size
                ),
            )

    def flow_steps(self) -> Iterator[Step]:
        """latents -> velocity and the flow-matching loss, in one pass over `[clean copy | noisy copy]`."""
        dit, length = self.dit, self.config.latent_length
        clean_length = length - self.config.model.dit.block_size  # nobody sees the last clean block
        recompute = self.config.training.activation_checkpointing

        def noise(
            latents_SWC: torch.Tensor, z1_BSC: torch.Tensor, time_BN: torch.Tensor, at_zero_BS: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            z0_SBC = latents_SWC[:, : z1_BSC.shape[0]]
            z1_SBC, at_zero_SB = z1_BSC.transpose(0, 1), at_zero_BS.t()
            t_SB = time_BN.repeat_interleave(length // time_BN.shape[1], dim=1).t()
            zt_SBC = flow_matching.noisy_latents(z0_SBC, z1_SBC, t_SB, at_zero_SB)
            two_copies = torch.cat((z0_SBC[:clean_length].detach(), zt_SBC))
            times = two_copy_times(time_BN, length, clean_length, at_zero_BS)
            return z0_SBC, z1_SBC, two_copies, times.times_T, dit.local_index(times.index_SB)

        yield Step("latents, flow_noise, time, at_zero -> z0, z1, two_copies, distinct_times, time_index", noise)
        yield Step("distinct_times -> time_hidden", dit.embed_time)
        yield Step("two_copies -> flow_hidden", dit.embed)
        yield Step(
            "two_copies, context_dropped -> flow_context",
            lambda two_copies, dropped: dit.two_copy_context(
                # One mask for the whole batch unless blocks lose their context.
                length,
                clean_length,
                dropped if self.config.objective.flow.context_dropout > 0 else None,
                two_copies.device,
            ),
        )
        for block in dit.blocks:
            yield Step("flow_hidden, time_hidden, time_index, flow_context -> flow_hidden", block, recompute=recompute)
        yield Step("flow_hidden, time_hidden, time_index -> velocity", dit.velocity)
        yield Step(
            "velocity, z0, z1, at_zero -> loss_flow_matching",
            lambda velocity, z0, z1, at_zero_BS: flow_matching.flow_matching_loss(
                velocity[clean_length:], z0, z1, at_zero_BS.t()
            ),
        )

    def decode_steps(self) -> Iterator[Step]:
        """latents of all views -> logits, the reconstruction and the mask loss."""
        decoder, config = self.vae.decoder, self.config
        recompute = config.training.activation_checkpointing
        context = decoder.context(config.latent_length, _device(self))

        def token_nll(logits_TWV: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
            views = logits_TWV.shape[1] // tokens_BL.shape[0]
            return token_cross_entropy(logits_TWV, tokens_BL.t().repeat(1, views))

        yield Step("latents -> hidden", decoder.embed)
        for block in decoder.blocks:
            yield Step("hidden -> hidden", lambda x, block=block: block(x, context), recompute=recompute)
        yield Step("hidden -> logits", decoder.logits)
        yield Step("logits, tokens -> nll", token_nll)
        yield Step(
            "nll, tokens -> loss_reconstruction",
            lambda nll_TW, tokens_BL: vae.reconstruction_loss(nll_TW[:, : tokens_BL.shape[0]]),
        )
        if config.objective.vae.mask_weight > 0:
            yield Step(
                "nll, masked, tokens -> loss_mask",
                lambda nll_TW, masked_BL, tokens_BL: masking.mask_loss(nll_TW[:, tokens_BL.shape[0] :], masked_BL),
            )


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
