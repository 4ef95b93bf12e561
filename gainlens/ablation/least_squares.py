"""Refit a head's kept query and key dimensions to the attention logits of the intact head.

A cut head still sees all of its projected queries and keys, so the kept dimensions may carry any
linear map of them: q' = M_q q, k' = M_k k, both rotated by the kept pairs' own frequencies. The
maps are the least-squares fit of the logits on calibration text,

    min Σ_ij w_ij (scale · q'_i·k'_j - L_ij - c_i)²,

w_ij the intact attention (mixed with a little uniform weight) and c_i free, since the softmax
ignores it: this is, to second order, the Kullback-Leibler divergence of the attention patterns.
It is a linear problem in M_q with M_k held and the other way round; the two are solved in turns
by conjugate gradients. Folded into W_Q and W_K the maps cost nothing, and no gradient of the
model's loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from gainlens.model.rotation import Turn


@dataclass(frozen=True)
class Problem:
    """One key head of one layer on calibration text.

    Attributes:
        queries, keys: projected (before the rotation), as the cut model sees them.
        logits: of the intact head, scaled; ``weights``: their causal softmax.
        query_turn, key_turn: the rotation of the whole head at the positions of each; queries
            may be at some of the positions only.
        scale: of the logits, 1/sqrt(d_head) on most models.
    """

    queries: Float[torch.Tensor, "group doc pos d_head"]
    keys: Float[torch.Tensor, "doc key_pos d_head"]
    logits: Float[torch.Tensor, "group doc pos key_pos"]
    weights: Float[torch.Tensor, "group doc pos key_pos"]
    query_turn: Turn
    key_turn: Turn
    scale: float


def fit_maps(
    problem: Problem,
    kept: Int[torch.Tensor, " kept"],
    *,
    rounds: int = 3,
    iterations: int = 12,
    ridge: float = 1e-3,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[Float[torch.Tensor, "group kept d_head"], Float[torch.Tensor, "kept d_head"]]:
    """The maps M_q (one per query head) and M_k of the kept dimensions.

    Args:
        problem: the head's calibration data.
        kept: dimensions that stay, whole pairs, sorted.
        rounds: how often the two linear problems are solved in turn.
        iterations: conjugate-gradient steps of each.
        ridge: pull towards the start, relative to the mean curvature.
        start: maps to begin with; by default plain selection of the kept dimensions.
    """
    d_head = problem.keys.shape[-1]
    group = len(problem.queries)
    select = torch.eye(d_head)[kept]
    m_q, m_k = start if start is not None else (select.expand(group, -1, -1).clone(), select)
    q_turn, k_turn = problem.query_turn.of(kept), problem.key_turn.of(kept)
    q_cov = _covariance(problem.queries.flatten(1, 2))
    k_cov = _covariance(problem.keys.flatten(0, 1))
    for _ in range(rounds):
        k_new = k_turn(problem.keys @ m_k.T)
        m_q = torch.stack(
            [
                _solve_queries(problem, g, k_new, q_turn, m_q[g], q_cov[g], iterations, ridge)
                for g in range(group)
            ]
        )
        q_new = q_turn(torch.einsum("gdpi,gri->gdpr", problem.queries, m_q))
        m_k = _solve_keys(problem, q_new, q_turn, k_turn, m_k, k_cov, iterations, ridge)
    return m_q, m_k


def misfit(
    problem: Problem,
    kept: Int[torch.Tensor, " kept"],
    m_q: Float[torch.Tensor, "group kept d_head"],
    m_k: Float[torch.Tensor, "kept d_head"],
) -> float:
    """Half the weighted mean square error of the logits: about the KL divergence in nats."""
    q = problem.query_turn.of(kept)(torch.einsum("gdpi,gri->gdpr", problem.queries, m_q))
    k = problem.key_turn.of(kept)(problem.keys @ m_k.T)
    error = problem.scale * q @ k.transpose(-1, -2) - problem.logits
    centred = error - (problem.weights * error).sum(-1, keepdim=True)
    return float(0.5 * (problem.weights * centred.square()).sum(-1).mean())


def _covariance(x: torch.Tensor) -> torch.Tensor:
    moment: torch.Tensor = x.transpose(-1, -2) @ x / x.shape[-2]
    return moment


def _solve_queries(
    problem: Problem,
    g: int,
    keys: Float[torch.Tensor, "doc key_pos kept"],
    turn: Turn,
    start: Float[torch.Tensor, "kept d_head"],
    covariance: Float[torch.Tensor, "d_head d_head"],
    iterations: int,
    ridge: float,
) -> Float[torch.Tensor, "kept d_head"]:
    queries, weights = problem.queries[g], problem.weights[g]
    (n_doc, n_pos, _), kept = queries.shape, keys.shape[-1]
    scale = problem.scale
    curvature = torch.empty(n_doc, n_pos, kept, kept)
    target = torch.empty(n_doc, n_pos, kept)
    for doc in range(n_doc):
        k, w = keys[doc], weights[doc]
        mean = w @ k
        outer = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(1)
        second = (w @ outer).view(n_pos, kept, kept)
        curvature[doc] = scale**2 * (second - mean.unsqueeze(-1) * mean.unsqueeze(-2))
        wl = w * problem.logits[g, doc]
        target[doc] = scale * (wl @ k - mean * wl.sum(-1, keepdim=True))

    def normal(m: torch.Tensor) -> torch.Tensor:
        field = turn(queries @ m.T)
        bent = torch.einsum("dprs,dps->dpr", curvature, field)
        return turn.adjoint(bent).flatten(0, 1).T @ queries.flatten(0, 1)

    right = turn.adjoint(target).flatten(0, 1).T @ queries.flatten(0, 1)
    left = turn_back_mean(curvature, turn)
    return _conjugate_gradients(normal, right, start, left, covariance, iterations, ridge)


def turn_back_mean(
    curvature: Float[torch.Tensor, "doc pos kept kept"], turn: Turn
) -> Float[torch.Tensor, "kept kept"]:
    """Sum over positions of the curvature in the frame before the rotation."""
    half = turn.adjoint(curvature.transpose(-1, -2).permute(2, 0, 1, 3))
    both: torch.Tensor = turn.adjoint(half.permute(3, 1, 2, 0)).sum((1, 2))
    return both


def _solve_keys(
    problem: Problem,
    queries: Float[torch.Tensor, "group doc pos kept"],
    query_turn: Turn,
    turn: Turn,
    start: Float[torch.Tensor, "kept d_head"],
    covariance: Float[torch.Tensor, "d_head d_head"],
    iterations: int,
    ridge: float,
) -> Float[torch.Tensor, "kept d_head"]:
    keys, weights, scale = problem.keys, problem.weights, problem.scale

    def pulled_back(logits: torch.Tensor) -> torch.Tensor:
        centred = weights * (logits - (weights * logits).sum(-1, keepdim=True))
        field = scale * torch.einsum("gdij,gdir->djr", centred, queries)
        return turn.adjoint(field).flatten(0, 1).T @ keys.flatten(0, 1)

    def normal(m: torch.Tensor) -> torch.Tensor:
        field = turn(keys @ m.T)
        return pulled_back(scale * (queries @ field.transpose(-1, -2)))

    right = pulled_back(problem.logits)
    back = query_turn.adjoint(queries).flatten(0, 2)
    left = scale**2 * (back.T @ back)
    return _conjugate_gradients(normal, right, start, left, covariance, iterations, ridge)


def _conjugate_gradients(
    normal: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    start: torch.Tensor,
    left_scale: torch.Tensor,
    right_scale: torch.Tensor,
    iterations: int,
    ridge: float,
) -> torch.Tensor:
    """Solve normal(m) + λ(m - start)·Σ = right, preconditioned by (left ⊗ right)⁻¹."""
    n = len(left_scale)
    level = left_scale.diagonal().mean().clamp_min(1e-12)
    left_inverse = torch.linalg.inv(
        (left_scale + (ridge + 1e-4) * level * torch.eye(n)).double()
    ).float()
    spread = right_scale.diagonal().mean().clamp_min(1e-12)
    sigma = right_scale + 1e-4 * spread * torch.eye(len(right_scale))
    right_inverse = torch.linalg.inv(sigma.double()).float()

    def operator(m: torch.Tensor) -> torch.Tensor:
        return normal(m) + ridge * level * (m @ sigma)

    x = start
    residual = right + ridge * level * (start @ sigma) - operator(x)
    z = left_inverse @ residual @ right_inverse
    direction = z
    gain = (residual * z).sum()
    for _ in range(iterations):
        if not float(gain) > 0:
            break
        moved = operator(direction)
        step = gain / (direction * moved).sum().clamp_min(1e-30)
        x = x + step * direction
        residual = residual - step * moved
        z = left_inverse @ residual @ right_inverse
        new = (residual * z).sum()
        direction = z + (new / gain) * direction
        gain = new
    return x
