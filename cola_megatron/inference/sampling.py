"""From logits to token ids."""

import torch


def penalize_repetition(logits_BTV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of the ids seen before by `penalty`."""
    if penalty == 1.0:
        return logits_BTV
    penalized = torch.where(logits_BTV < 0, logits_BTV * penalty, logits_BTV / penalty)
    return torch.where(seen_BV[:, None], penalized, logits_BTV)


def choose_tokens(
    logits_BTV: torch.Tensor, temperature: float, generators: list[torch.Generator] | None = None
) -> torch.Tensor:
    """Greedy at temperature 0, else one draw from softmax(logits / temperature), each sample from its own generator."""
    if temperature == 0.0:
        return logits_BTV.argmax(-1)
    probabilities_BTV = torch.softmax(logits_BTV.float() / temperature, dim=-1).cpu()
    drawn = [
        torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        for probabilities, generator in zip(probabilities_BTV, generators, strict=True)
    ]
    return torch.stack(drawn).to(logits_BTV.device)
