"""Gains that follow rotary frequency and share nothing else are told from shared units."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_maps import PROFILES, TAILS, f1, planted, profiled

import gainlens as gl
from gainlens.analysis.map.frequency_profile import FrequencyProfile, log_gains
from gainlens.analysis.map.verdicts import STATUS

pytestmark = pytest.mark.one_env


def geometric(n, base=1e4):
    return base ** (-np.arange(n) / n)


def mapped(gains, seed=0, **more):
    return gl.coordinate_map(gains, heads=False, n_permutations=250, seed=seed, **more)


def says_shared(cmap):
    return bool(
        cmap.answer in ("universal", "partly shared")
        or cmap.universal_units
        or cmap.verdict().status == "holds"
        or cmap.verdict(0.1).status == "holds"
    )


def test_residuals_are_those_of_a_polynomial_fit():
    """numpy's own fit of a cubic in log frequency, layer by layer, each over its frequencies."""
    rng = np.random.default_rng(0)
    frequency = np.stack([geometric(16), rng.uniform(0.01, 1, 16)])
    logs = rng.standard_normal((2, 3, 16))
    found = FrequencyProfile.of(frequency, np.ones(16, dtype=bool)).residuals(logs)
    for layer, f in enumerate(frequency):
        for head in range(3):
            fit = np.polyfit(np.log(f), logs[layer, head], 3)
            expected = logs[layer, head] - np.polyval(fit, np.log(f))
            np.testing.assert_allclose(found[layer, head], expected, atol=1e-6)


def test_units_without_a_frequency_have_a_level_and_unused_ones_nothing():
    frequency = np.concatenate([geometric(12), np.zeros(4)])[None].repeat(2, 0)
    used = np.ones(16, dtype=bool)
    used[3] = False
    logs = np.random.default_rng(0).standard_normal((2, 16))
    profile = FrequencyProfile.of(frequency, used)
    found = profile.residuals(logs)
    np.testing.assert_allclose(found[:, 12:], logs[:, 12:] - logs[:, 12:].mean(1, keepdims=True))
    assert (found[:, 3] == 0).all()
    assert profile.freedom == 11 - 4 + 4 - 1
    nothing = FrequencyProfile.of(np.zeros((2, 16)), np.ones(16, dtype=bool))
    np.testing.assert_allclose(nothing.residuals(logs), logs - logs.mean(1, keepdims=True))
    assert not nothing.rotates


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("slopes", PROFILES)
def test_a_profile_over_frequency_is_no_sharing(slopes, tails):
    """A small version of ``benchmarks/map_null_simulation.py``, which has the rates."""
    shared = sum(
        says_shared(
            mapped(profiled(seed, slopes, tails, shape=(8, 2, 16)), seed, frequency=geometric(16))
        )
        for seed in range(20)
    )
    assert shared <= 2  # 0.5 expected at 2.5%


def test_the_plain_null_would_call_the_profile_universal():
    """What the frequency null is for: the same gains without their frequencies."""
    gains = profiled(0, "common", "normal", shape=(12, 4, 32), noise=0.1)
    assert mapped(gains).answer == "universal"
    assert mapped(gains, frequency=geometric(32)).answer == "not shared"


@pytest.mark.parametrize("noise", [0.1, 0.3])
@pytest.mark.parametrize(("shared", "private"), [(16, 0), (8, 8), (8, 0), (2, 6), (1, 7)])
def test_planted_units_are_found_on_top_of_a_profile(shared, private, noise):
    shape = (24, 4, 32)
    scores = []
    for seed in range(3):
        gains, truth = planted(seed, shared, private, noise=noise, shape=shape)
        curve = profiled(seed, "uniform", "normal", shape=shape, noise=0)
        cmap = mapped(gains * curve, seed, frequency=geometric(32))
        scores.append(f1(cmap.universal_units, truth))
    assert np.mean(scores) >= 0.95


def test_layers_and_heads_are_told_apart():
    """One loud head in every layer: its layer shares, its neighbours do not."""
    rng = np.random.default_rng(0)
    gains = np.exp(0.3 * rng.standard_normal((16, 8, 32)))
    gains[:, 0, :8] *= 40
    cmap = mapped(gains, frequency=geometric(32)[rng.permutation(32)])
    assert cmap.answer == "universal"
    assert set(range(8)) == set(cmap.universal_units)
    assert cmap.answer_by_head != "universal"
    assert cmap.universal_units_by_head == ()
    assert cmap.verdict(0.5).status == "holds"
    assert cmap.verdict(0.5, "shared by heads").status == "fails"


def test_heads_with_slopes_of_their_own_share_nothing():
    """Slopes that differ within a layer leave no units at the ends of the frequencies."""
    z = np.linspace(-1, 1, 32)
    hits = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        slopes = rng.normal(0, 1.5, (12, 4, 1))
        gains = np.exp(slopes * z + 0.3 * rng.standard_normal((12, 4, 32)))
        cmap = mapped(gains, seed, frequency=geometric(32))
        hits += cmap.answer_by_head != "not shared" or bool(cmap.universal_units_by_head)
    assert hits <= 2


def test_two_rotary_bases_are_taken_off_layer_by_layer():
    """Layers of a short and a stretched grid, each following its own frequencies."""
    short, long = geometric(32), geometric(32, 1e6)
    long = np.where(long < 1e-2, long / 8, long)  # as context extension does
    frequency = np.stack([long if layer % 2 else short for layer in range(12)])
    curve = np.exp(-0.3 * np.log(frequency))[:, None]
    rng = np.random.default_rng(1)
    gains = curve * np.exp(0.05 * rng.standard_normal((12, 2, 32)))
    own = mapped(gains, frequency=frequency)
    assert own.answer == "not shared"
    assert mapped(gains, frequency=short).answer != "not shared"
    assert own.units.wavelength[0] is not None
    assert own.units.wavelength[20] is None
    with pytest.raises(gl.errors.InputError, match="rows of them"):
        mapped(gains, frequency=frequency[:5])


def test_gains_of_a_model_carry_the_frequencies_of_each_layer(tiny_gains):
    from dataclasses import replace

    frequencies = tiny_gains.frequencies.clone()
    frequencies[1] /= 3
    cmap = gl.coordinate_map(
        replace(tiny_gains, frequencies=frequencies), n_permutations=19, heads=False
    )
    np.testing.assert_allclose(cmap.units.layer_frequency, frequencies.numpy(), rtol=1e-6)


def test_units_that_no_layer_uses_take_no_part():
    """Silence everywhere is not a shared unit, and changes nothing for the others."""
    gains = profiled(3, "uniform", "normal", shape=(10, 2, 40))
    gains[..., 30:34] = 0
    frequency = geometric(40)
    found = mapped(gains, frequency=frequency)
    assert found.answer == "not shared"
    assert (found.residuals[:, 30:34] == 0).all()
    assert (found.universal.p_values[30:34] == 1).all()
    without = mapped(
        np.delete(gains, np.s_[30:34], -1), frequency=np.delete(frequency, np.s_[30:34])
    )
    assert found.effect == pytest.approx(without.effect)


def test_a_silent_unit_counts_as_quiet_and_not_as_minus_infinity():
    x = np.array([[1.0, 1.0, 0.0, 2.0]])
    np.testing.assert_allclose(log_gains(x)[0], np.log([1, 1, 0.01, 2]))
    assert (log_gains(np.zeros((1, 4))) == 0).all()


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(2, 7),
    heads=st.integers(1, 3),
    n=st.sampled_from([3, 6, 9, 16]),
    kind=st.sampled_from(["flat", "exponential", "profile", "planted", "one"]),
    rotates=st.booleans(),
    dead=st.booleans(),
    threshold=st.floats(0.01, 0.99),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:gains of layers")
def test_verdicts_and_answers_never_disagree(
    seed, layers, heads, n, kind, rotates, dead, threshold
):
    rng = np.random.default_rng(seed)
    shape = (layers, heads, n)
    gains = {
        "flat": lambda: np.ones(shape),
        "exponential": lambda: rng.exponential(size=shape),
        "profile": lambda: np.exp(rng.uniform(0, 2) * np.linspace(0, 1, n)) * np.ones(shape)
        * np.exp(0.2 * rng.standard_normal(shape)),
        "planted": lambda: planted(seed, n // 2, n // 4, ratio=4, shape=shape)[0],
        "one": lambda: planted(seed, 1, n // 4, ratio=4, shape=shape)[0],
    }[kind]()  # fmt: skip
    if dead and layers > 2:
        gains[rng.integers(layers)] = 0
    cmap = gl.coordinate_map(
        gains, n_permutations=99, heads=False, frequency=geometric(n) if rotates else None
    )
    for claim, given_answer in (
        ("shared", cmap.answer),
        ("shared by heads", cmap.answer_by_head),
    ):
        verdict = cmap.verdict(claim=claim)
        assert verdict.status == STATUS.get(given_answer, "undecided")
        assert given_answer in verdict.note
        bounded = cmap.verdict(threshold, claim).status
        if bounded == "holds":
            assert verdict.status == "holds"
        if verdict.status == "undecided":
            assert bounded == "undecided"
        if given_answer == "universal":
            assert cmap.verdict(0.5, claim).status == "holds"
    shared = cmap.answer in ("universal", "partly shared")
    assert shared or cmap.universal_units == ()
    assert cmap.verdict(threshold, "cosine").status != "holds" or cmap.answer == "universal"
