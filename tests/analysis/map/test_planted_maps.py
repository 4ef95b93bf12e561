"""Generated models with known truth: the map finds what is shared, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from planted_maps import f1, flat, planted

import gainlens as gl

pytestmark = pytest.mark.one_env

SHAPE = (24, 4, 32)


def mapped(gains, seed=0, **more):
    return gl.coordinate_map(gains, heads=False, n_permutations=250, seed=seed, **more)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize(
    ("shared", "private"), [(16, 0), (12, 4), (8, 8), (4, 12), (8, 0), (4, 4), (0, 8)]
)
def test_shared_units_are_recovered(shared, private, per):
    scores = []
    for seed in range(3):
        gains, truth = planted(seed, shared, private, shape=SHAPE, per=per)
        scores.append(f1(mapped(gains, seed).universal_units, truth))
    assert np.mean(scores) >= 0.95


def test_the_answer_follows_the_planted_sharing():
    full, partly, none = (
        mapped(planted(0, shared, 16 - shared, shape=SHAPE)[0]).answer for shared in (16, 6, 0)
    )
    assert (full, partly, none) == ("universal", "partly shared", "not shared")


def test_nearly_flat_gains_are_not_called_shared():
    maps = [mapped(flat(seed), seed) for seed in range(40)]
    assert min(m.summary()["cosine"] for m in maps) > 0.98
    assert sum(m.answer == "not shared" for m in maps) >= 38
    assert sum(not m.universal_units for m in maps) >= 38
    assert not any(m.verdict(0.98, "cosine").status == "holds" for m in maps)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_private_units_are_not_called_shared(per):
    maps = [mapped(planted(seed, 0, 8, shape=(12, 2, 32), per=per)[0], seed) for seed in range(40)]
    assert sum(m.answer == "not shared" for m in maps) >= 38
    assert sum(not m.universal_units for m in maps) >= 38


def test_a_high_cosine_of_flat_gains_fails_the_claim_with_its_reason():
    verdict = mapped(flat(0, cv=0.05, shape=SHAPE)).verdict(claim="cosine")
    assert verdict.estimate > 0.99
    assert verdict.status == "fails"
    for word in ("CV", "null", "centred"):
        assert word in verdict.note


def test_one_coordinate_system_holds_where_it_is_planted():
    gains, _ = planted(0, 8, 0, noise=0.02, shape=SHAPE)
    cmap = mapped(gains)
    for claim in ("shared", "shared by heads", "cosine"):
        assert cmap.verdict(claim=claim).status == "holds"


def test_heads_of_a_layer_that_agree_are_not_layers_that_agree():
    """Eight identical heads per layer, independent layers: a null per head would be fooled."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(40):
        layer = rng.exponential(size=(6, 1, 16))
        gains = np.repeat(layer, 8, axis=1) * np.exp(0.01 * rng.standard_normal((6, 8, 16)))
        hits += bool(mapped(gains).universal.units)
    assert hits <= 6


def test_shared_by_a_little_is_beyond_chance_but_not_universal():
    """Units that are loud in 40% of layers where chance gives 12.5%."""
    rng = np.random.default_rng(0)
    gains = np.exp(0.1 * rng.standard_normal((60, 2, 32)))
    for layer in gains:
        layer[:, np.concatenate([rng.permutation(5)[:2], 5 + rng.permutation(27)[:2]])] *= 3
    for universal in (mapped(gains).universal, mapped(gains).universal_by_head):
        assert set(range(5)) <= set(universal.beyond_chance)
        assert universal.units == ()
