"""Plaid in training: the loss of `loss.py` as a chain of steps.

What crosses a cut of a pipeline beside the hidden states are thin: x, z and levels of noise, and the embeddings of the
whole vocabulary, (V, C), which the head needs as the input does. The pass that makes first estimates runs the whole
network, and a pipeline's stage has its part alone: there is no self-conditioning in a pipeline
(`config.plaid.PlaidConfig`). It is a step without parameters of its own here, so that costs and cuts see each step of
the network once.

Shapes as in `loss.py`.
"""

from collections.abc import Iterator, Sequence

import torch

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.families.plaid.categorical import embeddings_of
from cola_megatron.families.plaid.denoiser import Denoiser
from cola_megatron.families.plaid.loss import LOSS_WEIGHTS, diffusion_loss, reconstruction_loss, stop_gradient, texts_of
from cola_megatron.families.plaid.network import PlaidParts
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.models.document_kernel import document_kernel
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer import Transformer
from cola_megatron.models.transformer_steps import as_head, block_steps
from cola_megatron.objectives.averages import mean_over_counted
from cola_megatron.objectives.plaid import noisy_embeddings, prior_kl, squared_distance
from cola_megatron.parallel import ProcessGroups
from cola_megatron.parallel.sequence_parts import counted_once


class Plaid(PipelinedModel):
    """Embeddings, noise schedule and transformer, and their loss.

    Called on a batch (tokens, counted, documents and the fields of `draws.plaid_draws`, stacked over B) it returns the
    loss and its terms.

    Args:
        split: for each stage of the pipeline the number of its steps with parameters; None: all of them are here.

    Raises:
        ValueError: a split, and self-conditioning.
    """

    config: PlaidConfig

    def __init__(self, config: PlaidConfig, groups: ProcessGroups, split: Sequence[int] | None = None):
        super().__init__(groups, split)
        self.config = config
        self.self_conditioning = config.objective.self_conditioning > 0
        if self.self_conditioning and split is not None:
            raise ValueError("a stage of a pipeline cannot run the whole network: objective.self_conditioning=0")
        model = config.model
        with self.under_construction():
            self.plaid = PlaidParts(
                model.vocab_size, model.diffusion, model.transformer, self.self_conditioning, groups
            )
            self.transformer = Transformer(model.vocab_size, model.transformer, groups, has_embedding=False)
        kernel = document_kernel(config.training, groups.device)
        self.denoiser = Denoiser(self.transformer, self.plaid, config.training.loss_chunk_tokens, kernel)
        self.keep_own_stage()

    @property
    def batch_names(self) -> set[str]:
        """What every stage finds in its micro-batch."""
        draws = {"noise", "time", "self_conditioned", "cut", "output_prior"}
        return {"tokens", "counted", "documents", *draws}

    def steps(self) -> list[Step]:
        """One training pass in order."""
        config = self.config

        def reconstruction(nll_SB: torch.Tensor, time_B: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
            return counted_once(reconstruction_loss(nll_SB, time_B, counted_BL.t(), config), self.groups)

        def diffusion(
            distance_SB: torch.Tensor,
            gamma_B: torch.Tensor,
            slope_B: torch.Tensor,
            report_B: torch.Tensor,
            time_B: torch.Tensor,
            counted_BL: torch.Tensor,
        ) -> torch.Tensor:
            loss = diffusion_loss(distance_SB, gamma_B, slope_B, report_B, time_B, counted_BL.t(), config)
            return counted_once(loss, self.groups)

        def prior(x_SBC: torch.Tensor, gamma_end_B: torch.Tensor, counted_BL: torch.Tensor) -> torch.Tensor:
            loss = mean_over_counted(prior_kl(x_SBC, gamma_end_B), counted_BL.t()).float()
            return counted_once(loss, self.groups)

        return [
            *self.noise_steps(),
            Step("x, gamma_end, counted -> loss_prior", prior),
            *self.network_steps(),
            Step("nll, time, counted -> loss_reconstruction", reconstruction),
            Step("distance, gamma, slope, report, time, counted -> loss_diffusion", diffusion),
        ]

    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return LOSS_WEIGHTS

    def learning_rate_ratios(self) -> dict[str, float]:
        """Embeddings, schedule and input may learn at another rate than the transformer."""
        return {"plaid": self.config.objective.learning_rate_ratio}

    # Also the steps of a held-out measurement, which reads rows of its own: their names begin with `rows`.

    def noise_steps(self, rows: str = "") -> Iterator[Step]:
        """tokens, noise, time, self_conditioned -> embeddings, x, z, and the levels of noise."""
        plaid = self.plaid

        def lookup(tokens_BL: torch.Tensor, embeddings_VC: torch.Tensor, told_B: torch.Tensor) -> torch.Tensor:
            x_SBC = embeddings_of(tokens_BL, embeddings_VC, self.groups)
            return torch.where(told_B[:, None], stop_gradient(x_SBC), x_SBC)

        yield Step("-> embeddings", plaid.embeddings, part="plaid.embeddings", modules=[plaid.embeddings])
        yield Step(
            f"{rows}time, {rows}self_conditioned -> gamma, slope, gamma_end, report",
            plaid.schedule,
            part="plaid.schedule",
            modules=[plaid.schedule],
        )
        yield Step(f"{rows}tokens, embeddings, {rows}self_conditioned -> x", lookup)
        yield Step(
            f"x, {rows}noise, gamma -> z",
            lambda x_SBC, noise_BSC, gamma_B: noisy_embeddings(x_SBC, noise_BSC.transpose(0, 1), gamma_B),
        )

    def network_steps(self, rows: str = "") -> Iterator[Step]:
        """x, z and their levels of noise -> nll, distance at every position, (S, B)."""
        denoiser, config, plaid = self.denoiser, self.config, self.plaid

        def context(tokens_BL: torch.Tensor, texts_BL: torch.Tensor | None) -> AttentionContext:
            return denoiser.context(tokens_BL.shape[1], tokens_BL.device, texts_BL)

        def compare(
            hidden_SBH: torch.Tensor,
            x_SBC: torch.Tensor,
            z_SBC: torch.Tensor,
            gamma_B: torch.Tensor,
            output_prior_B: torch.Tensor,
            embeddings_VC: torch.Tensor,
            tokens_BL: torch.Tensor,
            told_B: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            estimate_SBC, nll_SB = denoiser.prediction(
                hidden_SBH, z_SBC, gamma_B, output_prior_B, embeddings_VC, tokens_BL.t(), (~told_B).float()
            )
            return nll_SB, squared_distance(x_SBC, estimate_SBC)

        yield Step(
            f"{rows}documents, {rows}cut -> texts", lambda documents_BL, cut_B: texts_of(documents_BL, cut_B, config)
        )
        yield Step(f"{rows}tokens, texts -> context", context)
        told = f"{rows}self_conditioned"
        if self.self_conditioning:
            yield Step(f"z, gamma, {rows}output_prior, embeddings, {told}, texts -> first", denoiser.first_estimate)
        else:
            yield Step("-> first", lambda: None)
        yield Step("z, gamma, first -> hidden", plaid.input, part="plaid.input", modules=[plaid.input])
        yield from block_steps(self.transformer, config.training.activation_checkpointing)
        yield as_head(
            self.transformer,
            Step(
                f"hidden, x, z, gamma, {rows}output_prior, embeddings, {rows}tokens, {told} -> nll, distance", compare
            ),
        )
