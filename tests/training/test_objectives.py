"""Objectives beside what is written out in float64 or done by torch's own loss."""

from __future__ import annotations

import math

import pytest
import torch

import gainlens as gl
from gainlens.training.objectives import (
    OBJECTIVES,
    attention_divergence,
    divergence,
    get_objective,
    next_token,
)

pytestmark = pytest.mark.one_env


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_is_torchs_own():
    student, teacher = random(5, 11), random(5, 11, seed=1)
    targets = torch.zeros(5, dtype=torch.long)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher),
        torch.distributions.Categorical(logits=student),
    ).sum()
    assert float(divergence(student, teacher, targets)) == pytest.approx(float(wanted), rel=1e-12)
    assert float(divergence(teacher, teacher, targets)) == 0


def test_divergence_has_its_gradient():
    """Of the student's logits: its probabilities less the teacher's."""
    student, teacher = random(4, 7).requires_grad_(), random(4, 7, seed=1)
    divergence(student, teacher, torch.zeros(4, dtype=torch.long)).backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_divergence_scales_and_reads_nothing_twice():
    """The gradient of a weighted sum, in float32, beside torch's own; its inputs stay."""
    student, teacher = random(6, 9).float().requires_grad_(), random(6, 9, seed=1).float()
    kept = student.detach().clone(), teacher.clone()
    (divergence(student, teacher, torch.zeros(6, dtype=torch.long)) / 7).backward()
    own = student.detach().clone().requires_grad_()
    (torch.nn.functional.kl_div(
        own.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    ) / 7).backward()  # fmt: skip
    torch.testing.assert_close(student.grad, own.grad)
    assert torch.equal(student.detach(), kept[0]) and torch.equal(teacher, kept[1])


def test_next_token_is_minus_the_log_probability():
    logits, targets = random(3, 6), torch.tensor([5, 0, 2])
    wanted = -sum(
        math.log(float(row.softmax(-1)[t])) for row, t in zip(logits, targets, strict=False)
    )
    assert float(next_token(logits, None, targets)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_divergence_position_by_position(window):
    batch, pos, heads, kv_heads, width, scale = 2, 5, 4, 2, 6, 0.3
    made = [
        [(random(batch, pos, heads, width, seed=s), random(batch, pos, kv_heads, width, seed=s + 9))
         for s in (base, base + 1)]
        for base in (0, 40)
    ]  # fmt: skip
    student, teacher = made
    total, count = 0.0, 0
    for (q, k), (wanted_q, wanted_k) in zip(student, teacher, strict=False):
        for b in range(batch):
            for h in range(heads):
                for i in range(pos):
                    sight = slice(0 if window is None else max(0, i + 1 - window), i + 1)
                    got = (scale * k[b, sight, h // 2] @ q[b, i, h]).softmax(-1)
                    wanted = (scale * wanted_k[b, sight, h // 2] @ wanted_q[b, i, h]).softmax(-1)
                    total += float((wanted * (wanted / got).log()).sum())
                    count += 1
    found = attention_divergence(student, teacher, [scale, scale], [window, window])
    assert float(found) == pytest.approx(total / count, rel=1e-6)  # held in float32 and wider
    assert float(attention_divergence(teacher, teacher, [scale, scale])) == 0


def test_future_positions_give_no_nan_in_the_gradient():
    q, k = random(1, 4, 2, 4).requires_grad_(), random(1, 4, 1, 4).requires_grad_()
    teacher = [(random(1, 4, 2, 4, seed=5), random(1, 4, 1, 4, seed=6))]
    attention_divergence([(q, k)], teacher, [1.0]).backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all() and q.grad.any()


def test_an_unknown_objective_is_told():
    with pytest.raises(
        gl.errors.InputError, match="'likelihood' is not one of divergence, next_token"
    ):
        get_objective("likelihood")
    assert set(OBJECTIVES) == {"divergence", "next_token"}
