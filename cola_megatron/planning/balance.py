"""How many consecutive pieces of a chain each pipeline stage gets."""

from collections.abc import Sequence


def balance(costs: Sequence[float], stages: int, trained: Sequence[bool] | None = None) -> tuple[int, ...]:
    """Pieces per stage such that the costliest stage is as cheap as it can be; ties go to fewer pieces up front.

    Args:
        costs: of each piece, in order.
        trained: whether a piece holds anything that is trained; every stage gets at least one such piece (an
            optimiser without parameters does not exist). None: all of them do.

    Raises:
        ValueError: there are fewer (trained) pieces than stages.
    """
    count = len(costs)
    trained = [True] * count if trained is None else list(trained)
    if sum(trained) < stages:
        raise ValueError(f"{sum(trained)} pieces cannot be spread over {stages} stages")
    total, seen = [0.0], [0]
    for cost, is_trained in zip(costs, trained, strict=True):
        total.append(total[-1] + cost)
        seen.append(seen[-1] + is_trained)
    # best[k][i]: the least possible cost of the costliest of the last k stages, which hold the pieces from i on.
    best = [{i: total[count] - total[i] for i in range(count) if seen[count] > seen[i]}]
    first_cut: list[dict[int, int]] = [{}]
    for _ in range(stages - 1):
        after, here, cuts = best[-1], {}, {}
        for i in range(count):
            ends = (j for j in range(i + 1, count) if j in after and seen[j] > seen[i])
            options = [(max(total[j] - total[i], after[j]), j) for j in ends]
            if options:
                here[i], cuts[i] = min(options)
        best.append(here)
        first_cut.append(cuts)
    split, start = [], 0
    for remaining in range(stages - 1, 0, -1):
        end = first_cut[remaining][start]
        split.append(end - start)
        start = end
    return (*split, count - start)
