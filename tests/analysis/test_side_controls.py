"""Controls of a cut are what plain hooks on the other side, and on the complement, give."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.analysis.side_controls import side_controls
from gainlens.report.sections_controls import controls_section


def losses(model, tokens, hooks=()):
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type="logits")
    found = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    return found.reshape(len(tokens), -1).mean(1).numpy()


def zeroed(name, cut):
    return [
        (name.format(layer), lambda x, hook, c=cut[layer]: x.masked_fill(c, 0))
        for layer in range(len(cut))
    ]


@pytest.fixture(scope="module")
def mask(tiny_gains):
    return gl.KeyMask.quietest(tiny_gains, 0.5, "qk", "head", "pair")


def test_every_run_is_that_of_plain_hooks(any_tiny, tiny_gains, tiny_validation, mask):
    found = side_controls(any_tiny, tiny_validation, tiny_gains, mask, seeds=(3,), progress=False)
    intact = losses(any_tiny, tiny_validation)
    np.testing.assert_allclose(found.intact, intact, atol=1e-4)
    cut = ~mask.keep
    rows = {(r["side"], r["units"]): rise for r, rise in zip(found.rows, found.rises, strict=True)}
    attention = "blocks.{}.attn."
    expected = {
        ("key", "given"): zeroed(attention + "hook_rot_k", cut),
        ("query", "given"): zeroed(attention + "hook_rot_q", cut.repeat_interleave(2, 1)),
        ("key", "complement"): zeroed(attention + "hook_rot_k", ~cut),
        ("value", "given"): zeroed(attention + "hook_v", cut),
    }
    for run, hooks in expected.items():
        wanted = losses(any_tiny, tiny_validation, hooks) - intact
        np.testing.assert_allclose(rows[run], wanted, atol=1e-4, err_msg=str(run))
    np.testing.assert_allclose(rows["query", "given"], rows["key", "given"], atol=1e-4)
    assert rows["key", "complement"].mean() > rows["key", "given"].mean()
    mean, (low, high) = found.difference(("key", "complement"), ("key", "given"))
    assert mean == pytest.approx((rows["key", "complement"] - rows["key", "given"]).mean())
    difference = rows["key", "complement"] - rows["key", "given"]
    ends = scipy.stats.t.interval(
        0.95, len(difference) - 1, difference.mean(), scipy.stats.sem(difference)
    )
    assert (low, high) == pytest.approx(ends)
    with pytest.raises(gl.errors.InputError, match="does not exist"):
        found.difference(("key", "loudest"), ("key", "given"))


def test_drawn_units_are_as_many_whole_pairs(tiny, tiny_gains, mask):
    from gainlens.analysis.side_controls import _runs
    from gainlens.model.finding_sites import key_sites

    sites = key_sites(tiny)
    cuts = {}
    for facts, cut in _runs(sites, tiny_gains, ~mask.keep, (0, 1), values=True):
        cuts[facts["side"], facts["units"], facts["seed"]] = cut
        assert (cut.sum(-1) == 16).all()
        assert torch.equal(cut, cut[..., sites.partner])
    assert not torch.equal(cuts["key", "random", 0], cuts["key", "random", 1])
    energy = tiny_gains.sums["q_sq.rotated"]
    pairs = energy[..., :16] + energy[..., 16:]
    chosen = cuts["query", "quietest queries", None][..., :16]
    assert (
        pairs[chosen].reshape(4, 2, 8).amax(-1) <= pairs[~chosen].reshape(4, 2, 8).amin(-1)
    ).all()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_its_controls(name):
    model, tokens = bridge(name), family_tokens()
    gains = gl.probe_gains(model, tokens, progress=False)
    keep = torch.ones(gains.shape, dtype=torch.bool)
    keep[..., ::3] = False  # splits pairs
    found = side_controls(
        model, family_tokens(seed=2), gains, gl.KeyMask(keep), seeds=(0,), progress=False
    )
    rises = {(r["side"], r["units"]): rise for r, rise in zip(found.rows, found.rises, strict=True)}
    np.testing.assert_allclose(rises["query", "given"], rises["key", "given"], atol=2e-4)
    with torch.inference_mode(), gl.ablate(model, gl.KeyMask(~keep)):
        wanted = losses(model, family_tokens(seed=2)) - found.intact
    np.testing.assert_allclose(rises["key", "complement"], wanted, atol=2e-4)
    assert found.without or ("value", "given") in rises


def test_bad_cuts_are_refused(tiny, tiny_gains, tiny_calibration, tiny_validation, mask):
    with pytest.raises(gl.errors.InputError, match="cuts something"):
        side_controls(tiny, tiny_validation, tiny_gains, gl.KeyMask(torch.ones_like(mask.keep)))
    with pytest.raises(gl.errors.InputError, match="shapes"):
        side_controls(tiny, tiny_validation, tiny_gains, gl.KeyMask(torch.zeros(4, 2, 8) > 0))
    with pytest.raises(gl.errors.InputError, match="can't judge"):
        side_controls(tiny, tiny_calibration, tiny_gains, mask)


def test_the_section_has_every_run(tiny, tiny_gains, tiny_validation, mask):
    from gainlens.analysis.effective_rank import effective_rank

    found = side_controls(tiny, tiny_validation[:3], tiny_gains, mask, seeds=(0,), progress=False)
    ranks = effective_rank(tiny, tiny_validation[:3], progress=False)
    section = controls_section(found, ranks)
    assert [len(table.rows) for table in section.tables] == [len(found.table()), 4]
    for table in section.tables:
        assert {len(row) for row in table.rows} == {len(table.head)}
    assert f"{found.rises[0].mean():+.4f}" in section.tables[0].rows[0]
    assert controls_section().tables == []
