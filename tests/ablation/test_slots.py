"""Rotary slots: the choice against brute force, the cut against plain hooks and the refit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from families import FAMILIES, bridge, family_tokens

import gainlens as gl
from gainlens.ablation import SlotCut, fit_slots
from gainlens.ablation.slot_choice import (
    assign,
    choose_slots,
    frequency_grid,
    narrower_grid,
    overlaps,
    share_out,
)
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.files import save_tensors
from gainlens.model.hooks import attached


def test_overlap_is_what_the_best_turn_and_scale_leave():
    own, slot = 0.7, 0.55
    weights = np.random.default_rng(0).random(12)
    signal, base = (np.exp(1j * f * np.arange(12)) for f in (own, slot))
    (factor,), *_ = np.linalg.lstsq(
        (np.sqrt(weights) * base)[:, None], np.sqrt(weights) * signal, rcond=None
    )
    left = (weights * abs(signal - factor * base) ** 2).sum() / weights.sum()
    found = overlaps(np.array([own]), np.array([slot]), weights)[0, 0]
    assert found == pytest.approx(factor)
    assert abs(found) ** 2 == pytest.approx(1 - left)


def test_choice_is_near_the_best_of_all_sets():
    generator = np.random.default_rng(1)
    values = [generator.random((4, 7)) for _ in range(3)]

    def worth(slots):
        return sum(
            max(
                sum(v[p, s] for p, s in zip(order, slots, strict=True))
                for order in itertools.permutations(range(4), 3)
            )
            for v in values
        )

    best = max(worth(s) for s in itertools.combinations_with_replacement(range(7), 3))
    assert worth(choose_slots(values, 3)) >= 0.98 * best
    assert assign(values[0][:, :3])[0] == pytest.approx(
        max(
            sum(values[0][p, s] for s, p in enumerate(order))
            for order in itertools.permutations(range(4), 3)
        )
    )


def test_heads_that_need_the_same_frequency_get_it_as_often_as_they_need_it():
    """Planted: only two neighbouring pairs matter, in every head."""
    own = 100.0 ** (-np.arange(8) / 8)
    grid = frequency_grid(own)
    importance = np.zeros(8)
    importance[[3, 4]] = 1.0
    value = importance[:, None] * abs(overlaps(own, grid, np.ones(64))) ** 2
    chosen = grid[choose_slots([value] * 5, 2)]
    assert sorted(chosen) == pytest.approx(sorted(own[[3, 4]]))


def test_grids():
    own = 1e5 ** (-np.arange(32) / 32)
    assert set(np.round(own, 12)) <= set(np.round(frequency_grid(own), 12))
    assert narrower_grid(own, 16) == pytest.approx(1e5 ** (-np.arange(16) / 16))


def hand_made(sites, seed=0, n_slots=None):
    """Random maps into the first pairs, random frequencies."""
    generator = torch.Generator().manual_seed(seed)
    n_pairs = sites.frequencies.shape[1]
    units = torch.arange(sites.d_head)
    lower = units[sites.partner > units][: n_slots or n_pairs // 2]
    keep = torch.zeros(sites.shape, dtype=torch.bool)
    keep[..., torch.cat([lower, sites.partner[lower]])] = True
    d = sites.d_head
    q = torch.randn(sites.n_layers, sites.n_heads, d, d, generator=generator) * 0.3
    k = torch.randn(sites.n_layers, sites.n_kv_heads, d, d, generator=generator) * 0.3
    q *= keep.repeat_interleave(sites.group_size, 1)[..., None]
    k *= keep[..., None]
    f = torch.rand(*sites.shape[:2], n_pairs, generator=generator, dtype=torch.float64)
    return SlotCut(gl.KeyMask(keep), q, k, f, sites.frequencies)


def complex_pairs(x, partner):
    lower = torch.arange(len(partner))[partner > torch.arange(len(partner))]
    return torch.complex(x[..., lower].double(), x[..., partner[lower]].double())


ROTATING = [
    name
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM", "CohereForCausalLM")
    if name in FAMILIES
]
"""Half-split, normed, silent after the rotation, adjacent."""


@pytest.mark.parametrize("name", ROTATING)
def test_edit_is_maps_and_then_the_slots_rotation(name):
    """In complex numbers, where turning pair s at position p is a product with exp(i·f·p)."""
    model = bridge(name)
    sites = gl.model.key_sites(model)
    cut = hand_made(sites)
    generator = torch.Generator().manual_seed(2)
    plain = torch.randn(2, 5, sites.n_heads, sites.d_head, generator=generator)
    position = torch.arange(5, dtype=torch.float64)[:, None, None]
    units = torch.arange(sites.d_head)
    lower = units[sites.partner > units]

    def spun(x, frequencies):
        z = complex_pairs(x, sites.partner) * torch.exp(1j * position * frequencies)
        out = torch.empty(x.shape, dtype=torch.float64)
        out[..., lower], out[..., sites.partner[lower]] = z.real, z.imag
        return out

    own, slots = sites.frequencies[1], cut.frequencies[1]
    wide = slots.repeat_interleave(sites.group_size, 0)
    wanted_q = spun(torch.einsum("bphi,hri->bphr", plain, cut.query_maps[1]), wide)
    keys = plain[:, :, : sites.n_kv_heads]
    wanted_k = spun(torch.einsum("bphi,hri->bphr", keys, cut.key_maps[1]), slots)
    edit = cut.edit(model, torch.zeros(2, 5, dtype=torch.long))
    q, k = edit(spun(plain, own).float(), spun(keys, own).float(), 1)
    assert torch.allclose(q.double(), wanted_q, atol=1e-4)
    assert torch.allclose(k.double(), wanted_k, atol=1e-4)


@pytest.mark.parametrize("name", ROTATING)
def test_hooks_follow_a_cache(name):
    """Slots turn at the positions of the pass, also where the model rotates after the hook."""
    model = bridge(name)
    cut = hand_made(gl.model.key_sites(model))
    tokens = family_tokens(2, 10)
    with torch.inference_mode(), attached(model, cut.hooks(model)):
        whole = model.original_model(tokens).logits
        first = model.original_model(tokens[:, :7], use_cache=True)
        rest = model.original_model(tokens[:, 7:], past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 7:], atol=1e-4 * float(whole.abs().max()))


def test_files_with_a_field_that_is_no_slots(tiny_slots, tmp_path):
    tensors, path = tiny_slots.tensors(), tmp_path / "cut.safetensors"
    for name, bad, words in (
        ("assigned", tensors["assigned"] + 99, "assigned names a pair outside"),
        ("own", tensors["own"].float(), "own is torch.float32"),
        ("frequencies", tensors["frequencies"][:, :, :-1].contiguous(), "frequencies is"),
    ):
        save_tensors(path, "slots", {**tensors, name: bad}, tiny_slots.all_facts)
        with pytest.raises(gl.errors.FileFormatError, match=words):
            gl.load_cut(path)
    del tensors["assigned"]
    save_tensors(path, "slots", tensors, tiny_slots.all_facts)
    with pytest.raises(gl.errors.FileFormatError, match="lack 'assigned'"):
        gl.load_cut(path)


@pytest.mark.parametrize("name", ROTATING)
def test_hooks_and_edit_agree(name):
    model, tokens = bridge(name), family_tokens()
    cut = hand_made(gl.model.key_sites(model))
    fast, slow = (Evaluator(model, fast=f).tokens(tokens, cut) for f in (True, False))
    assert torch.allclose(fast, slow, atol=1e-4)
    assert (fast - Evaluator(model).tokens(tokens)).abs().max() > 1e-3


def test_slots_at_the_kept_pairs_own_frequencies_are_the_refit(tiny, tiny_calibration, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    cut = gl.ablation.refit(
        tiny, tiny_calibration[:2], mask, rounds=1, iterations=2, progress=False
    )
    own = gl.model.key_sites(tiny).frequencies
    same = own[:, None].expand(-1, mask.shape[1], -1)
    slots = SlotCut(mask, cut.query_maps, cut.key_maps, same, own)
    evaluator = Evaluator(tiny)
    got, wanted = (evaluator.tokens(tiny_calibration[3:4], c) for c in (slots, cut))
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def tiny_slots(tiny, tiny_calibration, tiny_gains):
    settings = {"score": "qk", "rounds": 1, "iterations": 4, "progress": False}
    return fit_slots(tiny, tiny_calibration, tiny_gains, 0.5, "universal", **settings)


def test_fitted_slots(tiny, tiny_slots, tiny_calibration, tiny_gains, tmp_path):
    cut = tiny_slots
    assert cut.fraction_kept == 0.5
    assert bool((cut.keep == cut.keep[:1, :1]).all())
    used = cut.frequencies[..., :8]
    assert torch.equal(used, used[:1, :1].expand(used.shape))
    assert all(
        len(set(row.tolist())) == 8 for row in cut.assigned[..., :8].flatten(0, 1)
    )  # no pair twice
    assert cut.facts["misfit_after"] < cut.facts["misfit_before"]
    cut.save(tmp_path / "cut.safetensors")
    again = gl.load_cut(tmp_path / "cut.safetensors")
    assert isinstance(again, SlotCut)
    assert again.digest() == cut.digest()
    assert again.all_facts == cut.all_facts
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_calibration, tiny_gains, (), cuts={"x": cut}, progress=False)


def test_start_is_the_assignment(tiny, tiny_calibration, tiny_gains):
    """Keeping all pairs at their own frequencies must start, and stay, at the intact model."""
    sites = gl.model.key_sites(tiny)
    from gainlens.ablation.slot_fit import start_maps

    n = sites.frequencies.shape[1]
    m_q, m_k = start_maps(sites, torch.arange(n), torch.ones(n, dtype=torch.complex128))
    assert torch.equal(m_k, torch.eye(sites.d_head))
    assert torch.equal(m_q[0], torch.eye(sites.d_head))
    _, turned = start_maps(sites, torch.arange(n), torch.full((n,), 1j, dtype=torch.complex128))
    assert torch.equal(turned, torch.eye(sites.d_head))


def test_only_touches_one_head(tiny, tiny_slots, tiny_validation):
    one = tiny_slots.only(1, 0)
    assert bool(one.keep[0].all())
    assert bool(one.keep[1, 1].all())
    assert torch.equal(one.keep[1, 0], tiny_slots.keep[1, 0])
    q = torch.randn(1, 6, 4, 32)
    k = torch.randn(1, 6, 2, 32)
    part, whole = (c.edit(tiny, tiny_validation[:1, :6]) for c in (one, tiny_slots))
    assert torch.allclose(part(q, k, 0)[1], k, atol=1e-5)
    got, wanted = part(q, k, 1), whole(q, k, 1)
    assert torch.allclose(got[1][:, :, 0], wanted[1][:, :, 0], atol=1e-5)
    assert torch.allclose(got[1][:, :, 1], k[:, :, 1], atol=1e-5)
    assert torch.allclose(got[0][:, :, :2], wanted[0][:, :, :2], atol=1e-5)
    assert torch.allclose(got[0][:, :, 2:], q[:, :, 2:], atol=1e-5)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_scopes_and_grid(tiny, tiny_calibration, tiny_gains, scope):
    settings = {"score": "qk", "rounds": 1, "iterations": 1, "progress": False, "stride": 8}
    cut = fit_slots(tiny, tiny_calibration, tiny_gains, 0.75, scope, **settings)
    used = cut.frequencies[..., :4]
    assert cut.facts["explained"] > 0
    assert not torch.equal(used[0], used[1])
    assert torch.equal(used[0, 0], used[0, 1]) == (scope == "layer")
    grid = fit_slots(tiny, tiny_calibration, tiny_gains, 0.75, grid=True, **settings)
    own = gl.model.key_sites(tiny).frequencies[0]
    assert torch.allclose(grid.frequencies[0, 0, :4], own[::4], rtol=1e-4)
    assert grid.facts["explained"] < cut.facts["explained"]


def test_budgets_are_the_best_of_all_with_the_same_total():
    generator = np.random.default_rng(0)
    added = [np.sort(generator.random(5))[::-1] * size for size in (1.0, 0.3, 2.0)]
    counts = share_out(added, 7)
    assert sum(counts) == 7
    every = [c for c in itertools.product(range(1, 6), repeat=3) if sum(c) == 7]
    worth = {c: sum(float(one[:n].sum()) for one, n in zip(added, c, strict=True)) for c in every}
    assert worth[tuple(counts)] == pytest.approx(max(worth.values()))
    assert share_out([np.ones(2), np.ones(2)], 9) == [2, 2], "no more slots than pairs"


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_uneven_budgets_keep_the_total_and_can_be_made_slim(
    tiny, tiny_calibration, tiny_gains, scope
):
    settings = {"score": "qk", "rounds": 1, "iterations": 2, "progress": False, "stride": 8}
    even = fit_slots(tiny, tiny_calibration, tiny_gains, 0.5, scope, **settings)
    uneven = fit_slots(tiny, tiny_calibration, tiny_gains, 0.5, scope, budget="damage", **settings)
    assert int(uneven.keep.sum()) == int(even.keep.sum())
    widths = uneven.keep.sum(-1)
    assert len(widths.unique()) > 1
    assert (widths == widths[:, :1]).all() == (scope == "layer")
    assert uneven.facts["explained"] > even.facts["explained"]
    thin = gl.slim(tiny, uneven)  # raises unless its logits are those of the cut
    assert thin.gainlens_parity.difference < 1e-4


def test_the_recipe_takes_slots_where_one_set_serves_all(tiny, tiny_calibration):
    settings = {"rounds": 1, "score": "qk", "progress": False}
    cut = gl.best_cut(tiny, tiny_calibration, 0.5, "universal", **settings)
    assert cut.kind == "slots"
    assert cut.facts["scope"] == "universal"
    still = gl.best_cut(bridge("GPT2LMHeadModel"), family_tokens(6), 0.5, "universal", **settings)
    assert still.kind == "refit"


def test_the_ranking_text_has_every_domain():
    from gainlens.ablation.recipe import ranking

    documents = [torch.full((600,), n) for n in range(40)]
    some = ranking(documents)
    assert len(some) <= 12
    assert all(len(d) == 512 for d in some)
    assert int(some[-1][0]) >= 36


def test_bad_input(tiny, tiny_calibration, tiny_gains, tiny_slots):
    for bad, words in (
        ({"fraction": 1.0}, "fraction"),
        ({"scope": "model"}, "scope"),
        ({"budget": "half"}, "budget='half'"),
        ({"budget": "damage"}, "scope='universal' all heads have as many"),
        ({"context": 65}, "context=65: .* 64 tokens"),
        ({"context": 1}, "context=1"),
    ):
        with pytest.raises(gl.errors.InputError, match=words):
            fit_slots(tiny, tiny_calibration, tiny_gains, **{"score": "qk", **bad})
    parts = (tiny_slots.mask, tiny_slots.query_maps, tiny_slots.key_maps)
    own, f = tiny_slots.own, tiny_slots.frequencies
    for wrong in (-f, f * float("nan"), f * float("inf")):
        with pytest.raises(gl.errors.InputError, match=r"frequencies hold .* 0 or above"):
            SlotCut(*parts, wrong, own)
    more = torch.ones(*f.shape[:2], 17, dtype=torch.float64)
    with pytest.raises(gl.errors.InputError, match="at most 16 pairs"):
        SlotCut(*parts, more, torch.ones(len(own), 17, dtype=torch.float64))
    with pytest.raises(gl.errors.InputError, match="which the mask cuts"):
        SlotCut(parts[0], torch.ones_like(parts[1]), parts[2], f, own)
    other = SlotCut(*parts, f, own * 1.5)
    with pytest.raises(gl.errors.InputError, match=r"radians per token .* same model"):
        other.hooks(tiny)
    with pytest.raises(gl.errors.InputError, match="shape"):
        tiny_slots.hooks(bridge("LlamaForCausalLM"))
    neox = bridge("GPTNeoXForCausalLM")
    gains = gl.probe_gains(neox, family_tokens(), progress=False)
    if gl.model.key_sites(neox).rotary_dim < gl.model.key_sites(neox).d_head:
        with pytest.raises(gl.errors.UnsupportedModelError, match="slots need all"):
            fit_slots(neox, family_tokens(), gains, score="qk")
