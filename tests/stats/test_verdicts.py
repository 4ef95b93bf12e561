"""The one rule behind "holds", where a verdict may be quoted, and several claims on one text."""

from __future__ import annotations

import numpy as np
import pytest
from simulation import load_simulation

import gainlens as gl
from gainlens.stats.intervals import bootstrap_interval
from gainlens.stats.several_claims import judge_together
from gainlens.stats.stopping import StoppingRule
from gainlens.stats.verdicts import HOLDS_BUT_RARE, Context, Verdict, judge, worst

pytestmark = pytest.mark.one_env


def flat(n, seed=0):
    return np.random.default_rng(seed).normal(0.0, 0.01, n)


@pytest.mark.parametrize(
    ("n", "status"),
    [(2, "undecided"), (35, "undecided"), (36, HOLDS_BUT_RARE), (71, HOLDS_BUT_RARE),
     (72, "holds"), (200, "holds")],
)  # fmt: skip
def test_how_many_documents_hold(n, status):
    verdict = judge("it is flat", flat(n), 0.5)
    assert verdict.interval == bootstrap_interval(flat(n), 0.99)
    assert verdict.status == status
    assert (verdict.status == "holds") == (n >= 72)
    assert verdict.more_documents == max(0, 72 - n)
    if n < 72:
        assert verdict.note.endswith(f"some {72 - n} more documents would decide it")


def test_a_few_documents_can_fail():
    assert judge("it is flat", flat(8) + 1.0, 0.5).status == "fails"
    assert judge("it is flat", flat(8) + 1.0, 0.5).more_documents == 0


@pytest.mark.parametrize("shift", [-1e-6, 1e-6])
def test_the_upper_end_decides(shift):
    values = np.random.default_rng(1).exponential(1.0, 100)
    margin = bootstrap_interval(values, 0.99)[1] + shift
    assert judge("it is flat", values, margin).status == ("holds" if shift > 0 else "undecided")


def test_windows_of_one_text_count_as_one_document():
    texts = np.repeat(np.arange(40), 4)
    assert judge("it is flat", flat(160), 0.5).status == "holds"
    verdict = judge("it is flat", flat(160), 0.5, groups=texts)
    assert verdict.n_documents == 40
    assert verdict.status == HOLDS_BUT_RARE


def test_undecided_by_the_interval_says_how_many_more():
    values = np.random.default_rng(2).normal(0.0, 1.0, 100)
    verdict = judge("it is flat", values, float(values.mean()) + 0.1)
    assert verdict.status == "undecided"
    high = verdict.interval[1] - verdict.estimate
    assert verdict.more_documents == pytest.approx(100 * (high / 0.1) ** 2 - 100, abs=1)
    assert judge("it is flat", values + 1, 1 + 1e-9 + values.mean()).more_documents is None


@pytest.mark.parametrize("margin", [0, -1, float("nan"), float("inf")])
def test_margins_that_are_none(margin):
    with pytest.raises(gl.errors.InputError, match="margin"):
        judge("it is flat", flat(80), margin)


# --- where it may be quoted


def test_a_verdict_says_where_it_was_judged_and_goes_no_further():
    where = Context.of([256, 1024])
    assert where == Context((0, 1023), (0, 1023))
    verdict = judge("it is flat", flat(80), 0.5, domain=("sotu", "stdlib"), context=where)
    assert "80 documents of sotu, stdlib, positions 0–1023, distances 0–1023" in repr(verdict)
    assert verdict.at(context=1024, domain="sotu") is verdict
    assert verdict.covers(context=100)
    assert not verdict.covers(context=1025)
    assert not verdict.covers(domain="pydoc")
    with pytest.raises(gl.errors.InputError, match="context=4096 is outside the 1 to 1024 tokens"):
        verdict.at(context=4096)
    with pytest.raises(
        gl.errors.InputError, match=r"domain='pydoc' is not what was judged \('sotu', "
    ):
        verdict.at(domain="pydoc")
    near = Verdict("holds", "x", 0, (0, 0), 1, 80, context=Context((0, 4095), (0, 63)))
    assert near.covers(context=64)
    assert not near.covers(context=65)
    plain = verdict.to_json()
    assert plain["domain"] == ["sotu", "stdlib"]
    assert plain["context"] == {"positions": (0, 1023), "distances": (0, 1023)}


def test_what_nobody_said_covers_nothing():
    verdict = Verdict("holds", "it is flat", 0.0, (0.0, 0.1), 0.5, 80)
    assert not verdict.covers(context=2)
    with pytest.raises(gl.errors.InputError, match="no named text"):
        verdict.at(domain="sotu")


def test_the_worst_text_decides():
    verdicts = {
        "sotu": judge("it is flat", flat(80), 0.5, domain=("sotu",)),
        "stdlib": judge("it is flat", flat(80) + 1, 0.5, domain=("stdlib",)),
        "pydoc": judge("it is flat", flat(40), 0.5, domain=("pydoc",)),
    }
    over_all = worst(verdicts)
    assert over_all.status == "fails"
    assert over_all.domain == ("sotu", "stdlib", "pydoc")
    assert over_all.note.startswith("decided by stdlib; sotu: holds; stdlib: fails; pydoc: holds,")
    del verdicts["stdlib"]
    assert worst(verdicts).status == HOLDS_BUT_RARE
    with pytest.raises(gl.errors.InputError, match="verdicts is empty"):
        worst({})


# --- several claims


def test_holm_by_hand():
    """A claim clear at 99% but not at 99.67% falls when it is one of three."""
    values = np.random.default_rng(3).exponential(1.0, 100)
    first, second = (bootstrap_interval(values, level)[1] for level in (0.99, 1 - 0.01 / 3))
    between = (first + second) / 2
    claims = [
        {"claim": name, "differences": values, "margin": margin}
        for name, margin in (("close", between), ("open", 1.0), ("also open", 1.01))
    ]
    assert judge(**claims[0]).status == "holds"
    close, *others = judge_together(claims)
    assert close.status == "undecided"
    assert close.interval == pytest.approx(bootstrap_interval(values, 1 - 0.01 / 3), rel=0.05)
    assert all("corrected for 3 claims" in verdict.note for verdict in (close, *others))
    # Beside two clear claims it is held to the level of a single one (step-down).
    claims[1]["margin"], claims[2]["margin"] = 50.0, 0.1
    assert [v.status for v in judge_together(claims)] == ["holds", "holds", "fails"]
    assert judge_together(claims[:1]) == [judge(**claims[0])]
    with pytest.raises(gl.errors.InputError, match="claims is empty"):
        judge_together([])


def test_many_null_claims_are_rarely_called_anything():
    """Of 60 texts with 10 claims each, all true damages at the margin, one in a hundred may err."""
    rng, wrong, alone = np.random.default_rng(4), 0, 0

    def clear(interval):
        return interval[1] < 1.0 or interval[0] > 1.0

    for _ in range(60):
        drawn = rng.normal(1.0, 1.0, (10, 20))
        claims = [{"claim": "x", "differences": values, "margin": 1.0} for values in drawn]
        wrong += any(clear(verdict.interval) for verdict in judge_together(claims))
        alone += any(clear(bootstrap_interval(values, 0.99)) for values in drawn)
    assert wrong <= 3
    assert alone > 3


# --- the recorded simulation


def test_the_simulation_decides_as_the_rule_does():
    made = load_simulation()
    rule = StoppingRule(1.0, tuple(range(8, 145, 8)))
    rng = np.random.default_rng(5)
    values = np.concatenate([made.SHAPES[name](rng, (8, 144)) for name in ("lognormal", "normal")])
    values += np.array([-1.0, -0.3, 0.0, 0.3] * 4)[:, None] + 1.0
    status, used = made.decisions(
        rule, list(made.ends_at_looks(rule, values, np.ones(144))), rule.margin
    )
    names = {1: "holds", 0: "undecided", -1: "fails"}
    for row, got, n in zip(values, status, used, strict=True):
        wanted = next(
            ((s, n) for n in rule.looks if (s := rule.status(row[:n])) != "undecided"),
            ("undecided", 144),
        )
        assert (names[got], n) == wanted
    assert {names[s] for s in status} == {"holds", "undecided", "fails"}


@pytest.mark.parametrize("shape", ["exponential", "one in twenty", "clusters of four"])
def test_shapes_of_the_simulation_have_the_mean_and_spread_they_say(shape):
    made = load_simulation()
    drawn = made.SHAPES[shape](np.random.default_rng(6), (400, 500))
    scale = made.CLUSTER if shape == "clusters of four" else 1
    assert abs(drawn.mean()) < 0.02 * scale
    wanted = np.sqrt(0.8 * 16 + 0.2 * 4) if shape == "clusters of four" else 1.0
    assert drawn.std() == pytest.approx(wanted, rel=0.02)
