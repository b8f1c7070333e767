"""Context parallelism: every rank holds one part of each sequence, and attention exchanges parts for heads.

Between the layers rank r of n holds positions r S / n ... (r + 1) S / n. In attention one all-to-all hands every rank
all positions of 1 / n of the heads, and a second one brings the outputs back (DeepSpeed Ulysses, arXiv 2309.14509). So
a rank sees whole sequences under the mask of one process, whatever that mask is.

Gradients follow one rule. The loss is the sum over the ranks of what each of them counts, and what crosses between them
has the gradient of that sum. So every rank ends with a summand of each gradient, and they are added up with those of
the replicas. Two things follow:

* A loss of values of whole sequences, which all ranks compute alike, counts 1 / n on each (`counted_once`); a weighted
  sum over the own positions counts these alone (`own_part` of its weights).
* What every rank makes for itself from the batch or from small tensors of whole sequences needs no communication.

Shapes: S positions of a sequence, s of this rank's part, B batch, G groups of heads, H hidden.
"""

import torch

from cola_megatron.parallel.groups import ProcessGroups
from cola_megatron.parallel.megatron import all_to_all, gather_from_sequence_parallel_region


def own_part(x: torch.Tensor, groups: ProcessGroups, dim: int = 0) -> torch.Tensor:
    """This rank's part of a whole sequence, S -> s along `dim`."""
    if groups.context_parallel_size == 1:
        return x
    length = x.shape[dim] // groups.context_parallel_size
    return x.narrow(dim, groups.context_parallel_rank * length, length)


def whole_sequence(x_sB: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """The parts of all ranks one behind the other, on every rank: (s, B, ...) -> (S, B, ...); for small tensors."""
    if groups.context_parallel_size == 1:
        return x_sB
    return gather_from_sequence_parallel_region(x_sB.contiguous(), group=groups.context_group)


def counted_once(term: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """What this rank counts of a loss that all ranks compute alike."""
    return term if groups.context_parallel_size == 1 else term / groups.context_parallel_size


def heads_for_positions(x_sBG: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """All positions of this rank's share of the groups of heads: (s, B, G, ...) -> (S, B, G / ranks, ...)."""
    ranks = groups.context_parallel_size
    by_rank = x_sBG.unflatten(2, (ranks, -1)).movedim(2, 0).flatten(0, 1)
    return all_to_all(groups.context_group, by_rank)


def positions_for_heads(x_SBH: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """The way back: (S, B, H of this rank's heads) -> (s, B, H of all heads)."""
    exchanged = all_to_all(groups.context_group, x_SBH)
    return exchanged.unflatten(0, (groups.context_parallel_size, -1)).movedim(0, 2).flatten(2)


def even_parts_from(x_sB: torch.Tensor, start: int, groups: ProcessGroups) -> torch.Tensor:
    """This rank's even part of the positions from `start` on, of which the ranks hold uneven ones.

    (s, B, ...) -> ((S - start) / ranks, B, ...).
    """
    ranks, rank = groups.context_parallel_size, groups.context_parallel_rank
    if ranks == 1:
        return x_sB[start:]
    if start == 0:
        return x_sB
    held = len(x_sB)
    even = (ranks * held - start) // ranks

    def moves(source: int, target: int) -> int:
        first, last = start + target * even, start + (target + 1) * even
        return max(0, min((source + 1) * held, last) - max(source * held, first))

    return all_to_all(
        groups.context_group,
        x_sB[min(held, max(0, start - rank * held)) :],
        [moves(source, rank) for source in range(ranks)],
        [moves(rank, target) for target in range(ranks)],
    )
