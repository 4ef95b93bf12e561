"""Generated models with known truth: the map finds what is shared, and nothing where nothing is."""

from __future__ import annotations

import numpy as np
import pytest
from planted_maps import f1, flat, planted

import gainlens as gl

pytestmark = pytest.mark.one_env

SHAPE = (24, 4, 32)


def mapped(gains, seed=0, **more):
    return gl.coordinate_map(gains, heads=False, n_permutations=150, seed=seed, **more)


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize(
    ("shared", "private"), [(16, 0), (12, 4), (8, 8), (4, 12), (8, 0), (4, 4), (0, 8)]
)
def test_shared_units_are_recovered(shared, private, per):
    scores = []
    for seed in range(5):
        gains, truth = planted(seed, shared, private, shape=SHAPE, per=per)
        scores.append(f1(mapped(gains, seed).universal_units, truth))
    assert np.mean(scores) >= 0.95


def test_the_answer_follows_the_planted_sharing():
    full, partly, none = (
        mapped(planted(0, shared, 16 - shared, shape=SHAPE)[0]).answer for shared in (16, 6, 0)
    )
    assert (full, partly, none) == ("universal", "partly shared", "not shared")


def test_nearly_flat_gains_are_not_called_shared():
    maps = [mapped(flat(seed), seed) for seed in range(100)]
    assert min(m.summary()["cosine"] for m in maps) > 0.98
    assert sum(m.answer == "not shared" for m in maps) >= 95
    assert sum(not m.universal_units for m in maps) >= 95
    assert not any(m.verdict(0.98).status == "holds" for m in maps)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_private_units_are_not_called_shared(per):
    maps = [mapped(planted(seed, 0, 8, shape=SHAPE, per=per)[0], seed) for seed in range(100)]
    assert sum(m.answer == "not shared" for m in maps) >= 95
    assert sum(not m.universal_units for m in maps) >= 95


def test_a_high_cosine_of_flat_gains_fails_the_claim_with_its_reason():
    verdict = mapped(flat(0, cv=0.05, shape=SHAPE)).verdict()
    assert verdict.estimate > 0.99
    assert verdict.status == "fails"
    for word in ("CV", "null", "centred"):
        assert word in verdict.note


def test_one_coordinate_system_holds_where_it_is_planted():
    gains, _ = planted(0, 8, 0, noise=0.02, shape=SHAPE)
    cmap = mapped(gains)
    assert cmap.verdict().status == "holds"
    assert cmap.verdict(claim="shared").status == "holds"


def test_a_frequency_profile_is_told_from_shared_units():
    frequency = 1e4 ** (-np.arange(32) / 32)
    rng = np.random.default_rng(0)
    slow = np.linspace(1, 3, 32) * np.exp(0.1 * rng.standard_normal(SHAPE))
    by_frequency = mapped(slow, frequency=frequency)
    assert by_frequency.tests["plain"]["centred"].p_mean < 0.01
    assert by_frequency.universal_units
    scattered, truth = planted(0, 8, 0, shape=SHAPE)
    by_unit = mapped(scattered, frequency=frequency)
    found = by_unit.universal.units_beyond_frequency
    assert by_unit.tests["band"]["centred"].p_mean < 0.01
    # Units whose whole band is shared can't be told from their band.
    bands = by_unit.units.bands
    mixed = [u for u in np.flatnonzero(truth) if not truth[bands == bands[u]].all()]
    assert set(mixed) <= set(found)


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
    universal = mapped(gains).universal
    assert set(range(5)) <= set(universal.beyond_chance)
    assert universal.units == ()
