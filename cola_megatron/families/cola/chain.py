"""Cola DLM in training: the losses of `families/cola/loss.py` as a chain of steps.

Latents, posteriors, velocities and what is computed of them are of whole sequences on every rank of a context; hidden
states and logits are of its own part.

Shapes: B batch, W views of each sample stacked along the batch (the text, then its masked view), L tokens (T where they
come first, P of this rank's part), S latents, C latent channels, N blocks, H hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cola_megatron.config import ColaConfig
from cola_megatron.families.cola.loss import loss_weights, stop_gradient
from cola_megatron.layers.embedding import token_cross_entropy
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.attention_chunks import attention_chunk
from cola_megatron.models.dit import DiT, two_copy_times
from cola_megatron.models.document_kernel import document_kernel
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Step
from cola_megatron.models.text_vae import TextEncoder, TextStack, TextVAE
from cola_megatron.objectives import flow_matching, masking, samples, vae
from cola_megatron.objectives.averages import weights_of_mean
from cola_megatron.objectives.vae import Posterior
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.sequence_parts import counted_once, own_part, whole_sequence


class Cola(PipelinedModel):
    """All networks of one stage of training, and its loss.

    Stage 2 holds a frozen copy of the stage-1 encoder as `reference` where `objective.reference_weight` asks for it.
    Called on a batch (the fields of `objectives.samples.training_sample`, stacked over B) it
    returns the loss and its terms; `train_vae=False` leaves the VAE out of the loss and of the graph (frozen, or a
    frozen step of an interval).

    Args:
        split: for each stage of the pipeline the number of its steps with parameters; None: all of them are here.
    """

    config: ColaConfig

    def __init__(self, config: ColaConfig, groups: ProcessGroups, split: Sequence[int] | None = None):
        super().__init__(groups, split)
        self.config = config
        with self.under_construction():
            self.vae = TextVAE(config.model.vocab_size, config.model.vae, groups)
            self.dit = DiT(config.model.dit, groups) if config.stage == 2 else None
            self.reference = None
            if config.uses_reference:
                self.reference = TextEncoder(config.model.vocab_size, config.model.vae, groups).requires_grad_(False)
            if config.stage == 2 and config.training.vae_update.mode == "frozen":
                self.vae.requires_grad_(False)
        if self.dit is not None:
            self.dit.attention_chunk = attention_chunk(config.training, config.latent_length, groups.device)
        self.keep_own_stage()

    @property
    def prior(self) -> DiT:
        """The DiT of stage 2."""
        assert self.dit is not None, "stage 1 has no prior"
        return self.dit

    def trained_networks(self) -> dict[str, nn.Module]:
        """The VAE unless it is frozen, and the prior."""
        networks: dict[str, nn.Module] = {}
        if self.dit is None or self.config.training.vae_update.mode != "frozen":
            networks["vae"] = self.vae
        if self.dit is not None:
            networks["dit"] = self.dit
        return networks

    def idle_networks(self, train_vae: bool = True) -> dict[str, nn.Module]:
        """The VAE in a step that leaves it frozen."""
        return {} if train_vae else {"vae": self.vae}

    def learning_rate_ratios(self) -> dict[str, float]:
        """Stage 2 may train the VAE at another rate than the prior."""
        return {"vae": self.config.training.vae_update.learning_rate_ratio} if self.config.stage == 2 else {}

    @property
    def batch_names(self) -> set[str]:
        """What every stage finds in its micro-batch."""
        names = {"tokens", "counted", "documents", "posterior_noise"}
        if self.config.objective.vae.mask_weight > 0:
            names |= {"masked"}
        if self.dit is not None:
            names |= {"flow_noise", "time", "at_zero", "context_dropped"}
        return names

    def steps(self, train_vae: bool = True) -> list[Step]:
        """One training pass in order; a part that has no work in it is there as an idle step."""
        return [
            *self.position_steps(),
            *self._views(train_vae),
            *self.encoder_steps("views", gradient=train_vae, views=1 + self._has_mask_view(train_vae)),
            *self._posterior_terms(train_vae),
            *self.reference_steps(train_vae),
            *(self._noise_steps() if self.dit is not None else ()),
            *(self.flow_steps() if self.dit is not None else ()),
            *(self._flow_term() if self.dit is not None else ()),
            *self._decoding(train_vae),
        ]

    def weights(self, train_vae: bool = True) -> dict[str, float]:
        """Weight of each term of `steps(train_vae)`."""
        return loss_weights(self.config, train_vae)

    # Networks: the steps that hold parameters, in the order of the chain whatever is computed with them.

    def position_steps(self) -> Iterator[Step]:
        """Of the latents: whether they count, and of which document they are."""
        patch_size = self.config.model.vae.patch_size
        yield Step("counted -> counted_latents", lambda counted_BL: samples.latents_that_count(counted_BL, patch_size))
        if self.config.data.document_attention:
            yield Step(
                "documents -> latent_documents",
                lambda documents_BL: samples.latents_to_documents(documents_BL, patch_size),
            )
        else:
            yield Step("-> latent_documents", lambda: None)

    def encoder_steps(self, tokens: str, gradient: bool = True, views: int = 1) -> Iterator[Step]:
        """Token ids under the name `tokens`, `views` of each sample -> mean, logvar."""
        encoder, recompute = self.vae.encoder, self.config.training.activation_checkpointing and gradient
        yield self._text_context("encoder_context", encoder, views)
        mode: Callable[[Callable[..., Any]], Callable[..., Any]] = (lambda run: run) if gradient else torch.no_grad()
        part = "vae.encoder."
        embed = [encoder.embedding, encoder.patch]
        yield Step(f"{tokens} -> hidden", mode(encoder.embed), part=f"{part}embed", modules=embed)
        for block in encoder.blocks:
            yield Step(
                "hidden, encoder_context -> hidden",
                mode(block),
                part=f"{part}block",
                modules=[block],
                recompute=recompute,
            )
        yield Step("hidden -> mean, logvar", mode(encoder.posterior), part=f"{part}head", modules=[encoder.head])

    def reference_steps(self, train_vae: bool) -> Iterator[Step]:
        """KL(q || q_ref): the frozen stage-1 encoder on the text."""
        if self.reference is None:
            return
        if not train_vae:
            yield Step.idle("reference", [self.reference])
            return
        patch_size = self.config.model.vae.patch_size
        yield Step(
            "tokens, latent_documents -> reference_mean, reference_logvar",
            torch.no_grad()(self.reference),
            part="reference",
            modules=[self.reference],
        )
        yield Step(
            "mean, logvar, reference_mean, reference_logvar, counted_latents -> loss_reference",
            lambda mean, logvar, reference_mean, reference_logvar, counted_BS: counted_once(
                vae.kl_to_reference(
                    Posterior(mean, logvar).of_first(len(counted_BS)),
                    Posterior(reference_mean, reference_logvar),
                    counted_BS.t(),
                    patch_size,
                ),
                self.groups,
            ),
        )

    def flow_steps(self) -> Iterator[Step]:
        """two_copies (`[clean copy | noisy copy]`), its times and its context -> velocity of every position."""
        dit, recompute = self.prior, self.config.training.activation_checkpointing
        yield Step("distinct_times -> time_hidden", dit.embed_time, part="dit.time", modules=[dit.time_embedding])
        yield Step("two_copies -> flow_hidden", dit.embed, part="dit.embed", modules=[dit.input])
        for block in dit.blocks:
            yield Step(
                "flow_hidden, time_hidden, time_index, flow_context -> flow_hidden",
                block,
                part="dit.block",
                modules=[block],
                recompute=recompute,
            )
        yield Step(
            "flow_hidden, time_hidden, time_index -> velocity",
            dit.head,
            part="dit.head",
            modules=[dit.output_norm, dit.output_shift_scale, dit.output],
        )

    def decoder_steps(self, head: Step, views: int = 1) -> Iterator[Step]:
        """latents, `views` of each sample -> hidden, and then `head`, which holds unpatching, norm and vocabulary."""
        decoder, recompute = self.vae.decoder, self.config.training.activation_checkpointing
        yield self._text_context("decoder_context", decoder, views)
        yield Step("latents -> hidden", decoder.embed, part="vae.decoder.embed", modules=[decoder.input])
        for block in decoder.blocks:
            yield Step(
                "hidden, decoder_context -> hidden",
                block,
                part="vae.decoder.block",
                modules=[block],
                recompute=recompute,
            )
        head.part, head.modules = "vae.decoder.head", (decoder.unpatch, decoder.norm, decoder.head)
        yield head

    def _text_context(self, name: str, stack: TextStack, views: int) -> Step:
        length, device = self.config.latent_length, self.groups.device
        if not self.config.data.document_attention:
            context = stack.context(length, device)
            return Step(f"-> {name}", lambda: context)
        kernel = document_kernel(self.config.training, device)
        return Step(
            f"latent_documents -> {name}",
            lambda documents_BS: stack.context(length, device, documents_BS.repeat(views, 1), kernel),
        )

    # What training computes with them.

    def _has_mask_view(self, train_vae: bool) -> bool:
        return train_vae and self.config.objective.vae.mask_weight > 0

    def _views(self, train_vae: bool) -> Iterator[Step]:
        mask_token_id = self.vae.encoder.mask_token_id
        if self._has_mask_view(train_vae):
            yield Step(
                "tokens, masked -> views",
                lambda tokens_BL, masked_BL: torch.cat(
                    (tokens_BL, masking.masked_view(tokens_BL, masked_BL, mask_token_id))
                ),
            )
        else:
            yield Step("tokens -> views", lambda tokens_BL: tokens_BL)

    def _posterior_terms(self, train_vae: bool) -> Iterator[Step]:
        """The latents of all views, and the regulariser of the posterior."""
        config, views = self.config, 1 + self._has_mask_view(train_vae)

        def sample(mean_SWC: torch.Tensor, logvar_SWC: torch.Tensor | None, noise_BVSC: torch.Tensor) -> torch.Tensor:
            noise_SWC = noise_BVSC[:, :views].permute(2, 1, 0, 3).flatten(1, 2)
            return self.vae.to_prior(vae.sample_posterior(Posterior(mean_SWC, logvar_SWC), noise_SWC))

        yield Step("mean, logvar, posterior_noise -> latents", sample)
        if train_vae and config.model.vae.variational:
            term = vae.kl_to_standard_normal if config.posterior_term == "kl" else vae.negative_entropy
            yield Step(
                "mean, logvar, counted_latents -> loss_posterior",
                lambda mean, logvar, counted_BS: counted_once(
                    term(
                        Posterior(mean, logvar).of_first(len(counted_BS)), counted_BS.t(), config.model.vae.patch_size
                    ),
                    self.groups,
                ),
            )

    def _noise_steps(self) -> Iterator[Step]:
        """latents -> `[clean copy | noisy copy]`; the rest follows from the batch alone."""
        dit, length, clean_length = self.prior, self.config.latent_length, self.clean_length
        has_dropout = self.config.objective.flow.context_dropout > 0

        def noise(
            latents_SWC: torch.Tensor, z1_SBC: torch.Tensor, time_BN: torch.Tensor, at_zero_BS: torch.Tensor
        ) -> torch.Tensor:
            z0_SBC = latents_SWC[:, : z1_SBC.shape[1]]
            t_SB = flow_matching.times_of_positions(time_BN, length)
            zt_SBC = flow_matching.noisy_latents(z0_SBC, z1_SBC, t_SB)
            zt_SBC = torch.where(at_zero_BS.t()[..., None], stop_gradient(z0_SBC), zt_SBC)
            return torch.cat((stop_gradient(z0_SBC[:clean_length]), zt_SBC))

        def times(time_BN: torch.Tensor, at_zero_BS: torch.Tensor) -> tuple[torch.Tensor, TimeRows | None]:
            table = two_copy_times(time_BN, length, clean_length, at_zero_BS)
            return table.times_T, dit.local_index(table.rows)

        yield Step("flow_noise -> z1", lambda z1_BSC: z1_BSC.transpose(0, 1))
        yield Step("latents, z1, time, at_zero -> two_copies", noise)
        yield Step("time, at_zero -> distinct_times, time_index", times)
        # One mask for the whole batch unless blocks lose their context.
        yield Step(
            "context_dropped, latent_documents -> flow_context",
            lambda dropped_BN, documents_BS: dit.two_copy_context(
                length, clean_length, dropped_BN if has_dropout else None, dropped_BN.device, documents_BS
            ),
        )

    def _flow_term(self) -> Iterator[Step]:
        clean_length = self.clean_length

        def loss(
            velocity: torch.Tensor,
            latents_SWC: torch.Tensor,
            z1_SBC: torch.Tensor,
            at_zero_BS: torch.Tensor,
            counted_BS: torch.Tensor,
        ) -> torch.Tensor:
            target_SBC = stop_gradient(z1_SBC - latents_SWC[:, : z1_SBC.shape[1]])
            loss = flow_matching.flow_matching_loss(velocity[clean_length:], target_SBC, at_zero_BS.t(), counted_BS.t())
            return counted_once(loss, self.groups)

        yield Step("velocity, latents, z1, at_zero, counted_latents -> loss_flow_matching", loss)

    def _decoding(self, train_vae: bool) -> Iterator[Step]:
        """latents of all views -> logits, the reconstruction and the mask loss."""
        decoder = self.vae.decoder
        if not train_vae:
            for step in self.decoder_steps(Step("hidden -> logits", decoder.logits)):
                if step.modules:
                    yield Step.idle(step.part, step.modules)
            return

        def token_nll(logits_PWV: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
            views = logits_PWV.shape[1] // tokens_BL.shape[0]
            targets_PW = own_part(tokens_BL.t(), self.groups).repeat(1, views)
            return whole_sequence(token_cross_entropy(logits_PWV, targets_PW), self.groups)

        views = 1 + self._has_mask_view(train_vae)
        if self.config.training.loss_chunk_tokens:
            yield from self.decoder_steps(self._chunked_losses(), views)
            return
        yield from self.decoder_steps(Step("hidden -> logits", decoder.logits), views)
        yield Step("logits, tokens -> nll", token_nll)
        yield Step(
            "nll, counted -> loss_reconstruction",
            lambda nll_TW, counted_BL: counted_once(
                vae.reconstruction_loss(nll_TW[:, : counted_BL.shape[0]], counted_BL.t()), self.groups
            ),
        )
        if self._has_mask_view(train_vae):
            yield Step(
                "nll, masked, counted -> loss_mask",
                lambda nll_TW, masked_BL, counted_BL: counted_once(
                    masking.mask_loss(nll_TW[:, counted_BL.shape[0] :], masked_BL, counted_BL.t()), self.groups
                ),
            )

    def _chunked_losses(self) -> Step:
        """Reconstruction and mask loss in one step, which never holds the logits of all tokens."""
        decoder, chunk = self.vae.decoder, self.config.training.loss_chunk_tokens

        def reconstruction(hidden_SWH: torch.Tensor, tokens_BL: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
            return mean_nll(decoder.to_tokens(hidden_SWH), tokens_BL, counted_BL)

        def both(
            hidden_SWH: torch.Tensor, tokens_BL: torch.Tensor, counted_BL: torch.Tensor, masked_BL: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_PWH, texts = decoder.to_tokens(hidden_SWH), len(tokens_BL)
            return (
                mean_nll(hidden_PWH[:, :texts], tokens_BL, counted_BL),
                mean_nll(hidden_PWH[:, texts:], tokens_BL, counted_BL & masked_BL),
            )

        def mean_nll(hidden_PBH: torch.Tensor, tokens_BL: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
            targets_PB, weights_PB = (
                own_part(x_TB, self.groups) for x_TB in (tokens_BL.t(), weights_of_mean(counted_BL.t()))
            )
            return decoder.head.weighted_nll(hidden_PBH, targets_PB, weights_PB, chunk)

        if self.config.objective.vae.mask_weight > 0:
            return Step("hidden, tokens, counted, masked -> loss_reconstruction, loss_mask", both)
        return Step("hidden, tokens, counted -> loss_reconstruction", reconstruction)

    @property
    def clean_length(self) -> int:
        """Positions of the clean copy: nobody sees its last block."""
        return self.config.latent_length - self.config.model.dit.block_size
