"""One claim on several texts: each is judged on its own documents, the worst decides."""

from __future__ import annotations

import numpy as np
import pytest

from gainlens.errors import InputError
from gainlens.stats.by_domain import judge_by_domain, judge_claims, judged
from gainlens.stats.verdicts import HOLDS_BUT_RARE, judge

RNG = np.random.default_rng(0)
CALM, HARMED = RNG.normal(0, 0.01, 80), RNG.normal(0.3, 0.01, 80)
MIXED = np.ravel([CALM, HARMED], order="F")
NAMES = ["speeches", "code"] * 80


def test_harm_in_one_text_is_not_averaged_away():
    found = judge_by_domain("x", MIXED, 0.2, domains=NAMES)
    assert judge("x", MIXED, 0.2).status == "holds", "the mean over both is below the margin"
    assert {n: v.status for n, v in found.items()} == {"speeches": "holds", "code": "fails"}
    for name, own in (("speeches", CALM), ("code", HARMED)):
        alone = judge("x", own, 0.2)
        assert (found[name].estimate, found[name].interval) == (alone.estimate, alone.interval)
    over = judged("x", MIXED, 0.2, domains=NAMES)
    assert over.status == "fails" and over.domain == ("speeches", "code")


def test_each_text_has_its_own_context():
    lengths = [4096, 256] * 80
    found = judge_by_domain("x", MIXED, 0.2, domains=NAMES, lengths=lengths)
    assert found["speeches"].covers(context=4096) and not found["code"].covers(context=257)
    over = judged("x", MIXED, 0.2, domains=NAMES, lengths=lengths)
    assert over.covers(context=256, domain="speeches") and not over.covers(context=257)
    unknown = judged("x", MIXED, 0.2, domains=NAMES)
    assert unknown.context is None


def test_windows_of_one_text_count_once():
    labels = [i // 2 for i in range(80)]
    found = judged("x", CALM, 0.2, groups=labels)
    assert found.n_documents == 40 and found.status == HOLDS_BUT_RARE
    assert judged("x", CALM, 0.2).status == "holds"
    assert found.interval == judge("x", CALM, 0.2, groups=labels).interval


def test_one_text_without_a_name():
    found = judge_by_domain("x", CALM, 0.2)
    assert list(found) == [""] and found[""] == judge("x", CALM, 0.2)


@pytest.mark.parametrize("given", [{"domains": ["a"]}, {"lengths": [9]}, {"groups": [1]}])
def test_not_one_of_each_per_document(given):
    with pytest.raises(InputError, match=next(iter(given))):
        judged("x", CALM, 0.2, **given)


def test_several_claims_on_one_text_are_corrected():
    """Each text by itself: the level of a step is that of Holm for the claims on that text."""
    near = CALM + 0.0975
    claims = [
        {"claim": "one", "differences": np.ravel([near, near], order="F"), "margin": 0.1},
        {"claim": "two", "differences": np.ravel([near, near], order="F"), "margin": 0.1},
    ]
    together = judge_claims(claims, domains=NAMES)
    assert len(together) == 2 and list(together[0]) == ["speeches", "code"]
    for found in together:
        for verdict in found.values():
            assert "corrected for 2 claims on this text (Holm)" in verdict.note
            assert verdict.interval == judge("", near, 0.1, level=0.995).interval
    alone = judge_by_domain("one", np.ravel([near, near], order="F"), 0.1, domains=NAMES)
    assert alone["code"].interval == judge("", near, 0.1).interval
    assert "Holm" not in alone["code"].note
