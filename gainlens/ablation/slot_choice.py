"""Which frequencies slots get, and which pair goes into which slot.

A pair of frequency θ contributes Re(a·exp(iθΔ)) to the logit of a query and a key at distance Δ.
In a slot of frequency φ, after the best turn and scale that a map can give it, it explains

    |Σ_Δ p(Δ) exp(i(θ - φ)Δ)|²

of that contribution's energy, p being the shares of the distances over which the head attends. The
worth of a set of slots is the sum over heads of the best assignment of pairs to slots, by
importance times what is explained. It is submodular in the set, so a lazy greedy choice is within
1 - 1/e of the best one; moving one slot at a time then improves it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Complex, Float, Int
from scipy.optimize import linear_sum_assignment

SWEEPS = 2
"""How often each slot may move after the greedy choice."""

SAME = 1e-5
"""Frequencies that differ by a smaller share are one candidate."""


def frequency_grid(own: Float[np.ndarray, "*layer pair"], between: int = 3) -> np.ndarray:
    """Candidate frequencies: the model's own, and ``between`` more in each gap, evenly in log."""
    logs = np.log(np.unique(own[own > 0]))
    if not len(logs):
        return np.zeros(1)
    # Layers whose frequencies were measured differ by rounding.
    logs = logs[np.append(True, np.diff(logs) > SAME)]
    steps = np.arange(between + 1) / (between + 1)
    fine = (logs[:-1, None] + steps * np.diff(logs)[:, None]).ravel()
    return np.asarray(np.exp(np.append(fine, logs[-1]))[::-1])


def narrower_grid(own: Float[np.ndarray, " pair"], n_slots: int) -> Float[np.ndarray, " slot"]:
    """The default geometric frequencies of a head with ``n_slots`` pairs and the model's base."""
    if len(own) < 2 or not 0 < own[1] < own[0]:
        return own[:n_slots].copy()
    base = (own[0] / own[1]) ** len(own)
    return np.asarray(own[0] * base ** (-np.arange(n_slots) / n_slots))


def overlaps(
    own: Float[np.ndarray, " pair"],
    candidates: Float[np.ndarray, " candidate"],
    distances: Float[np.ndarray, " distance"],
) -> Complex[np.ndarray, "pair candidate"]:
    """Mean of exp(i(θ - φ)Δ) over the distances 0, 1, …, weighted by ``distances``."""
    delta = np.arange(len(distances))
    share = distances / max(float(distances.sum()), 1e-300)
    pairs = np.exp(1j * np.outer(own, delta)) * share
    return np.asarray(pairs @ np.exp(-1j * np.outer(delta, candidates)))


def assign(value: Float[np.ndarray, "pair slot"]) -> tuple[float, Int[np.ndarray, " slot"]]:
    """The best assignment: its worth, and the pair of each slot."""
    pairs, slots = linear_sum_assignment(value, maximize=True)
    found = np.empty(value.shape[1], dtype=np.int64)
    found[slots] = pairs
    return float(value[pairs, slots].sum()), found


def choose_slots(values: Sequence[Float[np.ndarray, "pair candidate"]], n_slots: int) -> list[int]:
    """The candidates that serve all heads best, with repetition.

    Args:
        values: importance times explained share, per head.
        n_slots: how many; at most as many as there are pairs.

    Returns:
        Indices of candidates, ascending.
    """
    n = values[0].shape[1]
    alone = np.sum([v.max(0) for v in values], axis=0)
    chosen: list[int] = []
    worth = 0.0
    heap = [(-float(alone[c]), c) for c in range(n)]
    heapq.heapify(heap)
    for _ in range(n_slots):
        best, worth = _add(values, chosen, heap, worth)
        chosen.append(best)
    for _ in range(SWEEPS):
        moved = False
        for place in range(n_slots):
            rest = chosen[:place] + chosen[place + 1 :]
            without = _worth(values, rest)
            heap = [(-float(alone[c]), c) for c in range(n)]
            heapq.heapify(heap)
            best, new = _add(values, rest, heap, without)
            if new > worth * (1 + 1e-9):
                chosen[place], worth, moved = best, new, True
        if not moved:
            break
    return sorted(chosen)


def worth_by_slots(
    values: Sequence[Float[np.ndarray, "pair candidate"]], most: int
) -> Float[np.ndarray, " slot"]:
    """What the first, second, … slot adds by the greedy choice; it falls, by submodularity.

    Args:
        values: as for ``choose_slots``.
        most: slots at most.
    """
    alone = np.sum([v.max(0) for v in values], axis=0)
    heap = [(-float(alone[c]), c) for c in range(len(alone))]
    heapq.heapify(heap)
    chosen: list[int] = []
    worth, added = 0.0, []
    for _ in range(most):
        best, more = _add(values, chosen, heap, worth)
        chosen.append(best)
        added.append(more - worth)
        worth = more
    return np.array(added)


def share_out(added: Sequence[Float[np.ndarray, " slot"]], total: int) -> list[int]:
    """How many slots each group gets of ``total``: those that add most, one at least.

    Args:
        added: of each group, what its slots add, in order.
        total: of all groups together.
    """
    counts = [1] * len(added)
    heap = [(-float(one[1]), n) for n, one in enumerate(added) if len(one) > 1]
    heapq.heapify(heap)
    for _ in range(total - len(added)):
        if not heap:
            break
        _, n = heapq.heappop(heap)
        counts[n] += 1
        if counts[n] < len(added[n]):
            heapq.heappush(heap, (-float(added[n][counts[n]]), n))
    return counts


def _add(
    values: Sequence[np.ndarray], chosen: list[int], heap: list[tuple[float, int]], worth: float
) -> tuple[int, float]:
    """The candidate whose addition helps most; bounds in ``heap`` only ever fall."""
    fresh: set[int] = set()
    while True:
        bound, candidate = heapq.heappop(heap)
        if candidate in fresh:
            heapq.heappush(heap, (bound, candidate))
            return candidate, worth - bound
        gain = _worth(values, [*chosen, candidate]) - worth
        fresh.add(candidate)
        heapq.heappush(heap, (-gain, candidate))


def _worth(values: Sequence[np.ndarray], slots: list[int]) -> float:
    if not slots:
        return 0.0
    total = 0.0
    for value in values:
        sub = value[:, slots]
        pairs, places = linear_sum_assignment(sub, maximize=True)
        total += float(sub[pairs, places].sum())
    return total
