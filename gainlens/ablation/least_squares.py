"""Refit a head's kept query and key dimensions to the attention logits of the intact head.

A cut head still sees all of its projected queries and keys, so the kept dimensions may carry any
linear map of them: q' = M_q q, k' = M_k k, both rotated by the frequencies of the kept pairs (their
own, or those of slots). The maps are the least-squares fit of the logits on calibration text,

    min Σ_ij w_ij (s_ij · (scale · q'_i·k'_j - L_ij) - c_i)²,

w_ij the intact attention (mixed with a little uniform weight), zero where the model's mask hides a
key; s_ij the slope of a soft cap at L_ij, 1 without one; c_i free, since the softmax ignores it.
This is, to second order, the Kullback-Leibler divergence of the attention patterns. It is a linear
problem in M_q with M_k held and the other way round; the two are solved in turns by conjugate
gradients, whose sums run over one document at a time. Folded into W_Q and W_K the maps cost
nothing, and no gradient of the model's loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from gainlens.model.rotation import Turn


@dataclass(frozen=True)
class Part:
    """Some documents of one length, as one key head of one layer sees them.

    Attributes:
        queries, keys: projected (before the rotation), as the cut model sees them.
        at: positions of the queries; the keys are at 0, 1, ….
        logits: of the intact head, scaled, before any soft cap.
        weights: of the squares, the rows summing to 1; zero where a query does not see a key.
        turn: the rotation of the dimensions that are kept, at the positions of the keys.
        slope: of the soft cap at ``logits``, or None without one.
    """

    queries: Float[torch.Tensor, "group doc query_pos d_head"]
    keys: Float[torch.Tensor, "doc key_pos d_head"]
    at: Int[torch.Tensor, "doc query_pos"]
    logits: Float[torch.Tensor, "group doc query_pos key_pos"]
    weights: Float[torch.Tensor, "group doc query_pos key_pos"]
    turn: Turn
    slope: Float[torch.Tensor, "group doc query_pos key_pos"] | None = None

    @property
    def query_turn(self) -> Turn:
        """The rotation at the positions of the queries."""
        return self.turn.at(self.at)

    def rows(self, rows: Int[torch.Tensor, " some"]) -> Part:
        """Some of the queries."""
        slope = None if self.slope is None else self.slope[:, :, rows]
        queries, logits, weights = (
            x[:, :, rows] for x in (self.queries, self.logits, self.weights)
        )
        return Part(queries, self.keys, self.at[:, rows], logits, weights, self.turn, slope)

    def centred(self, error: torch.Tensor) -> torch.Tensor:
        """An error of the logits, as the softmax sees it: sloped, without its weighted mean."""
        if self.slope is not None:
            error = error * self.slope
        return error - (self.weights * error).sum(-1, keepdim=True)

    def pulled_(self, error: torch.Tensor) -> torch.Tensor:
        """Half the derivative of the weighted squares by the logits; overwrites ``error``.

        The weights of a query sum to 1, so w·(e - Σw·e) is w·e - w·Σw·e.
        """
        if self.slope is not None:
            error.mul_(self.slope)
        error.mul_(self.weights).addcmul_(self.weights, -error.sum(-1, keepdim=True))
        return error if self.slope is None else error.mul_(self.slope)


Maps = tuple[torch.Tensor, torch.Tensor]
"""M_q ``[group, kept, d_head]``, one per query head, and M_k ``[kept, d_head]``."""


@dataclass(frozen=True)
class Problem:
    """One key head of one layer on calibration text.

    Attributes:
        parts: its documents, of any lengths.
        scale: of the logits, 1/sqrt(d_head) on most models.
    """

    parts: Sequence[Part]
    scale: float


def fit_rounds(
    problem: Problem,
    start: Maps,
    *,
    rounds: int,
    iterations: int,
    ridge: float,
    shared: bool = False,
) -> Iterator[Maps]:
    """The maps after each round.

    Args:
        problem: the head's calibration data.
        start: maps to begin with: plain selection of the kept dimensions, or the assignment.
        rounds: how often the two linear problems are solved in turn.
        iterations: conjugate-gradient steps of each.
        ridge: pull of each solve towards where it began, relative to the mean curvature.
        shared: one map for all query heads of the group: fewer numbers to learn from the same text.
    """
    m_q, m_k = start
    q_cov = _mean_outer([p.queries.flatten(1, 2) for p in problem.parts])
    k_cov = _mean_outer([p.keys.flatten(0, 1)[None] for p in problem.parts])
    turns = [(p.query_turn, p.turn) for p in problem.parts]
    for _ in range(rounds):
        m_q = _solve_queries(problem, turns, m_q, m_k, q_cov, iterations, ridge, shared)
        m_k = _solve_keys(problem, turns, m_q, m_k, k_cov, iterations, ridge)
        yield m_q, m_k


def misfit(problem: Problem, maps: Maps) -> float:
    """Half the weighted mean square error of the logits: about the KL divergence in nats."""
    m_q, m_k = maps
    total, count = 0.0, 0
    for part in problem.parts:
        q = part.query_turn(part.queries @ _transposed(m_q))
        k = part.turn.of_product(part.keys, m_k)
        error = part.centred(problem.scale * q @ k.mT - part.logits)
        total += float((part.weights * error.square()).sum(dtype=torch.float64))
        count += part.weights[..., 0].numel()
    return 0.5 * total / max(1, count)


PRECONDITION = 256
"""Queries of a head whose exact curvature is averaged to precondition the query problem."""

Turns = Sequence[tuple[Turn, Turn]]


def _transposed(m_q: Float[torch.Tensor, "group kept d_head"]) -> torch.Tensor:
    """To multiply queries of several documents from the right."""
    return m_q.mT.unsqueeze(1)


def _mean_outer(
    xs: list[Float[torch.Tensor, "group _ d_head"]],
) -> Float[torch.Tensor, "group d_head d_head"]:
    total = sum(x.transpose(-1, -2) @ x for x in xs)
    mean: torch.Tensor = torch.as_tensor(total) / max(1, sum(x.shape[1] for x in xs))
    return mean


def _solve_queries(
    problem: Problem,
    turns: Turns,
    start: Float[torch.Tensor, "group kept d_head"],
    m_k: Float[torch.Tensor, "kept d_head"],
    covariance: Float[torch.Tensor, "group d_head d_head"],
    iterations: int,
    ridge: float,
    shared: bool,
) -> Float[torch.Tensor, "group kept d_head"]:
    keys = [turn.of_product(p.keys, m_k) for p, (_, turn) in zip(problem.parts, turns, strict=True)]

    def joined(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0, keepdim=True) if shared else x

    def back(n: int, pull: torch.Tensor) -> torch.Tensor:
        field = turns[n][0].adjoint(problem.scale * pull @ keys[n])
        return joined(field.flatten(1, 2).mT @ problem.parts[n].queries.flatten(1, 2))

    def normal(m: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(m)
        for n, part in enumerate(problem.parts):
            field = turns[n][0](part.queries @ _transposed(m))
            total += back(n, part.pulled_(problem.scale * field @ keys[n].mT))
        return total

    right = sum(back(n, part.pulled_(part.logits.clone())) for n, part in enumerate(problem.parts))
    left = joined(_query_curvature(problem, turns, keys))
    n_heads = len(start)
    if shared:
        start, covariance = (x.mean(0, keepdim=True) for x in (start, covariance))
    found = _conjugate_gradients(
        normal, torch.as_tensor(right), start, left, covariance, iterations, ridge
    )
    return found.expand(n_heads, -1, -1).clone() if shared else found


def _query_curvature(
    problem: Problem, turns: Turns, keys: Sequence[Float[torch.Tensor, "_ _ kept"]]
) -> Float[torch.Tensor, "group kept kept"]:
    """Sum over queries of the curvature in the frame before the rotation, from some of them."""
    n_queries = sum(p.at.numel() for p in problem.parts)
    stride = max(1, n_queries // PRECONDITION)
    kept = keys[0].shape[-1]
    total = keys[0].new_zeros(len(problem.parts[0].queries), kept, kept)
    used = 0
    for n, whole in enumerate(problem.parts):
        rows = torch.arange(n % min(stride, whole.at.shape[1]), whole.at.shape[1], stride)
        part, k = whole.rows(rows), keys[n]
        turn = part.query_turn
        w = part.weights if part.slope is None else part.weights * part.slope.square()
        mean = (part.weights if part.slope is None else part.weights * part.slope) @ k
        k = k.unsqueeze(1)
        second = (w.unsqueeze(-1) * k).mT @ k
        bent = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)  # [group, doc, query, kept, kept]
        half = turn.adjoint(bent.permute(0, 3, 1, 2, 4))  # rotates the last dimension
        both = turn.adjoint(half.permute(0, 4, 2, 3, 1))
        total += problem.scale**2 * both.sum((2, 3))
        used += part.at.numel()
    return total * (n_queries / max(1, used))


def _solve_keys(
    problem: Problem,
    turns: Turns,
    m_q: Float[torch.Tensor, "group kept d_head"],
    start: Float[torch.Tensor, "kept d_head"],
    covariance: Float[torch.Tensor, "one d_head d_head"],
    iterations: int,
    ridge: float,
) -> Float[torch.Tensor, "kept d_head"]:
    queries = [
        turn(part.queries @ _transposed(m_q))
        for part, (turn, _) in zip(problem.parts, turns, strict=True)
    ]
    scaled = [problem.scale * q for q in queries]

    def back(n: int, pull: torch.Tensor) -> torch.Tensor:
        pulled = (pull.mT @ scaled[n]).sum(0)
        return turns[n][1].product_gradient(problem.parts[n].keys, pulled)

    def normal(m: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(m)
        for n, part in enumerate(problem.parts):
            field = turns[n][1].of_product(part.keys, m[0])
            total += back(n, part.pulled_(scaled[n] @ field.mT))
        return total

    right = sum(back(n, part.pulled_(part.logits.clone())) for n, part in enumerate(problem.parts))
    plain = [turn.adjoint(q) for q, (turn, _) in zip(queries, turns, strict=True)]
    left = problem.scale**2 * sum((q.mT @ q).sum((0, 1)) for q in plain)
    return _conjugate_gradients(
        normal,
        torch.as_tensor(right)[None],
        start[None],
        torch.as_tensor(left)[None],
        covariance,
        iterations,
        ridge,
    )[0]


def _conjugate_gradients(
    normal: Callable[[torch.Tensor], torch.Tensor],
    right: Float[torch.Tensor, "group kept d_head"],
    start: Float[torch.Tensor, "group kept d_head"],
    left_scale: Float[torch.Tensor, "group kept kept"],
    right_scale: Float[torch.Tensor, "group d_head d_head"],
    iterations: int,
    ridge: float,
) -> Float[torch.Tensor, "group kept d_head"]:
    """Solve normal(m) + λ(m - start)·Σ = right of each head by itself.

    Preconditioned by (left ⊗ right)⁻¹.
    """

    def mean_diagonal(x: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = torch.diagonal(x, dim1=-2, dim2=-1).mean(-1)
        return mean[:, None, None].clamp_min(1e-12)

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    level, spread = mean_diagonal(left_scale), mean_diagonal(right_scale)
    eye = torch.eye(left_scale.shape[-1]).to(right)
    sigma = right_scale + 1e-4 * spread * torch.eye(right_scale.shape[-1]).to(right)
    left = left_scale + (ridge + 1e-4) * level * eye
    left_inverse = torch.linalg.inv(left.double()).to(right)
    right_inverse = torch.linalg.inv(sigma.double()).to(right)

    def operator(m: torch.Tensor) -> torch.Tensor:
        return normal(m) + ridge * level * (m @ sigma)

    x = start
    residual = right + ridge * level * (start @ sigma) - operator(x)
    z = left_inverse @ residual @ right_inverse
    direction = z
    gain = dot(residual, z)
    # Beyond rounding there is nothing to gain (and denormal numbers are slow); a direction without
    # curvature would be followed without end.
    eps = torch.finfo(right.dtype).eps
    floor = (8 * eps) ** 2 * dot(right, left_inverse @ right @ right_inverse)
    active = torch.ones_like(gain, dtype=torch.bool)
    for _ in range(iterations):
        moved = operator(direction)
        bend = dot(direction, moved)
        active = (
            active & (gain > floor) & (bend > 8 * eps * dot(direction, left @ direction @ sigma))
        )
        if not bool(active.any()):
            break
        step = torch.where(active, gain / torch.where(active, bend, 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * moved
        z = left_inverse @ residual @ right_inverse
        new = dot(residual, z)
        direction = z + torch.where(active, new / torch.where(active, gain, 1.0), 0.0) * direction
        gain = new
    return x
