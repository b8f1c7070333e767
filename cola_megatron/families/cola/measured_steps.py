"""What a held-out measurement computes, as a chain over the same parts as training: any pipeline can run it.

Names that begin with `sum_` are sums over the counted positions of a micro-batch, each sample weighted by `weight`.
Shapes as in `families/cola/chain.py`.
"""

from collections.abc import Iterator

import torch

from cola_megatron.config import ColaConfig
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.posterior_statistics import posterior_sums
from cola_megatron.families.cola.velocity_passes import Passes, total
from cola_megatron.models.steps import Step
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region
from cola_megatron.parallel.sequence_parts import own_part, whole_sequence

ROBUSTNESS_TIMES = (0.0, 0.25, 0.5)


def measured_steps(
    model: Cola, config: ColaConfig, shuffled_context: bool = False, posterior_statistics: bool = False
) -> list[Step]:
    """Posterior, reconstruction of latents at several flow times, and the velocity's error with and without context."""
    steps = [*model.position_steps(), *model.encoder_steps("tokens", gradient=False), *_of_the_posterior(model)]
    if posterior_statistics:
        steps += posterior_sums(config.model.vae.variational)
    steps += model.reference_steps(train_vae=False)
    if model.dit is not None:
        passes = Passes(model, config, shuffled_context)
        steps += [*passes.inputs(), *model.flow_steps(), *passes.errors()]
    return [*steps, *model.decoder_steps(_of_the_logits(model), views=len(ROBUSTNESS_TIMES))]


def _of_the_posterior(model: Cola) -> Iterator[Step]:
    def noisy(mean_SBC: torch.Tensor, z1_SBC: torch.Tensor) -> torch.Tensor:
        mean_SBC = model.vae.to_prior(mean_SBC)
        return torch.cat([(1 - t) * mean_SBC + t * z1_SBC for t in ROBUSTNESS_TIMES], dim=1)

    def numbers(
        mean_SBC: torch.Tensor, counted_BL: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return counted_BL.double().sum(1) @ weight_B, counted_BS.double().sum(1) @ weight_B

    def power(value_SBC: torch.Tensor, counted_BS: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        return total(value_SBC.double().sum(-1), counted_BS, weight_B)

    # Reads the mean so that one stage of a pipeline counts, not each of them.
    yield Step("mean, counted, counted_latents, weight -> sum_tokens, sum_latents", numbers)
    yield Step(
        "mean, counted_latents, weight -> sum_mean_square",
        lambda mean, counted, weight: power(mean.square(), counted, weight),
    )
    if model.config.model.vae.variational:
        yield Step(
            "logvar, counted_latents, weight -> sum_variance",
            lambda logvar, counted, weight: power(logvar.exp(), counted, weight),
        )
    yield Step("mean, flow_noise -> latents", noisy)


def _of_the_logits(model: Cola) -> Step:
    """Latents at each robustness time in turn: the logits of all of them at once would not fit."""
    names = [f"sum_correct_t{round(1000 * t)}" for t in ROBUSTNESS_TIMES]

    def count(
        hidden: torch.Tensor, tokens_BL: torch.Tensor, counted_BL: torch.Tensor, weight_B: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        correct: list[torch.Tensor] = []
        nll, spread = torch.empty(0), torch.empty(0)
        for hidden_SBH in hidden.chunk(len(ROBUSTNESS_TIMES), dim=1):
            logits_PBV, targets_BP = whole_logits(model, hidden_SBH), own_part(tokens_BL, model.groups, dim=1)
            if not correct:
                nll_BP = torch.nn.functional.cross_entropy(
                    logits_PBV.permute(1, 2, 0).float(), targets_BP, reduction="none"
                )
                nll = total(whole_sequence(nll_BP.t(), model.groups), counted_BL, weight_B)
            correct_TB = whole_sequence(logits_PBV.argmax(-1), model.groups) == tokens_BL.t()
            if not correct:
                share_B = (correct_TB & counted_BL.t()).double().sum(0) / counted_BL.double().sum(1).clamp(min=1)
                spread = torch.stack((weight_B.sum(), share_B @ weight_B, share_B.square() @ weight_B))
            correct.append(total(correct_TB, counted_BL, weight_B))
        return *correct, nll, spread

    return Step(f"hidden, tokens, counted, weight -> {', '.join(names)}, sum_nll, sum_accuracy_spread", count)


def whole_logits(model: Cola, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """What the decoder's head makes of its last block, over the whole vocabulary on every rank, of the tokens of the
    rank's part of the sequence: (S, B, H) -> (P, B, V)."""
    logits_PBV: torch.Tensor = model.vae.decoder.logits(hidden_SBH)
    if model.groups.tensor_parallel_size == 1:
        return logits_PBV
    return gather_from_tensor_model_parallel_region(logits_PBV)[..., : model.config.model.vocab_size]
