"""From logits to token ids.

Shapes: B batch, T tokens, V vocabulary.
"""

import torch


def penalize_repetition(logits_BTV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of the ids seen before by `penalty`."""
    if penalty == 1.0:
        return logits_BTV
    if logits_BTV.device.type == "cpu":
        # Few ids of a vocabulary have been seen. On a GPU their number would have to be waited for.
        row_N, id_N = seen_BV.nonzero(as_tuple=True)
        seen_NT = logits_BTV[row_N, :, id_N]
        penalized_NT = torch.where(seen_NT < 0, seen_NT * penalty, seen_NT / penalty)
        logits_BTV = logits_BTV.clone()
        logits_BTV[row_N, :, id_N] = penalized_NT
        return logits_BTV
    penalized = torch.where(logits_BTV < 0, logits_BTV * penalty, logits_BTV / penalty)
    return torch.where(seen_BV[:, None], penalized, logits_BTV)


def keep_top_k(logits_BTV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Minus infinity for all logits below the k-th largest; 0: none. Ties with the k-th stay."""
    if top_k == 0 or top_k >= logits_BTV.shape[-1]:
        return logits_BTV
    least_BT1 = logits_BTV.topk(top_k, dim=-1).values[..., -1:]
    return logits_BTV.masked_fill(logits_BTV < least_BT1, -torch.inf)


def keep_top_p(logits_BTV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Minus infinity for all but the most likely ids that together reach probability `top_p`; 1: none.

    The id that reaches it stays, so the most likely one always does.
    """
    if top_p == 1.0:
        return logits_BTV
    ordered_BTV, order_BTV = logits_BTV.sort(dim=-1, descending=True, stable=True)
    probabilities_BTV = torch.softmax(ordered_BTV, dim=-1)
    before_BTV = probabilities_BTV.cumsum(dim=-1) - probabilities_BTV
    dropped_BTV = torch.zeros_like(order_BTV, dtype=torch.bool).scatter(-1, order_BTV, before_BTV >= top_p)
    return logits_BTV.masked_fill(dropped_BTV, -torch.inf)


def choose_tokens(
    logits_BTV: torch.Tensor,
    temperature: float,
    generators: list[torch.Generator] | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Ids (B, T): greedy at temperature 0, else one draw from softmax(logits / temperature) of what top k, then top p
    leave; each sample from its own generator."""
    if temperature == 0.0:
        return logits_BTV.argmax(-1)
    assert generators is not None, "draws need their generators"
    kept_BTV = keep_top_p(keep_top_k(logits_BTV.float() / temperature, top_k), top_p)
    probabilities_BTV = torch.softmax(kept_BTV, dim=-1).cpu()
    drawn = [
        torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        for probabilities, generator in zip(probabilities_BTV, generators, strict=True)
    ]
    return torch.stack(drawn).to(logits_BTV.device)
