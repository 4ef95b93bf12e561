"""Measures, exact moments and permutation tests against brute force."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import gainlens as gl
from gainlens.analysis.map.nulls import pair_test, shuffle, shuffled_orders
from gainlens.analysis.map.similarity import (
    centred_rows,
    loudest,
    overlap_matrix,
    rank_rows,
    shuffle_moments,
    unit_length,
)
from gainlens.analysis.map.sinks import frequency_bands
from gainlens.analysis.map.verdicts import jackknife

pytestmark = pytest.mark.one_env


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_measures_agree_with_scipy_and_sets(seed):
    x = np.random.default_rng(seed).exponential(size=(3, 12))
    a, b = x[0], x[2]
    assert (unit_length(x) @ unit_length(x).T)[0, 2] == pytest.approx(
        a @ b / np.sqrt((a @ a) * (b @ b))
    )
    assert (centred_rows(x) @ centred_rows(x).T)[0, 2] == pytest.approx(stats.pearsonr(a, b)[0])
    ranked = centred_rows(rank_rows(x))
    assert (ranked @ ranked.T)[0, 2] == pytest.approx(stats.spearmanr(a, b)[0])
    top = [set(np.argsort(-row)[:5]) for row in x]
    jaccard = len(top[0] & top[2]) / len(top[0] | top[2])
    assert overlap_matrix(loudest(x, 5))[0, 2] == pytest.approx(jaccard)


def test_ties_share_their_places():
    x = np.array([[3.0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    marks = loudest(x, 2)
    np.testing.assert_allclose(marks[0], [1, 1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(marks[1], 0.4)
    np.testing.assert_allclose(marks[2], 0)


def test_moments_are_those_of_all_shuffles():
    rng = np.random.default_rng(0)
    a, b = rng.exponential(size=(2, 5))
    values = [a @ b[list(p)] for p in permutations(range(5))]
    mean, spread = shuffle_moments(np.stack([a, b]))
    assert mean[0, 1] == pytest.approx(np.mean(values))
    assert spread[0, 1] == pytest.approx(np.std(values))


def test_orders_stay_within_the_groups_of_their_layer():
    groups = np.array([[0, 1, 0, 2, 1, 2, 2, 0], [0] * 8, [2, 2, 2, 2, 0, 0, 1, 1]])
    orders = shuffled_orders(50, groups, seed=0)
    np.testing.assert_array_equal(np.sort(orders, -1), np.broadcast_to(np.arange(8), orders.shape))
    for layer, group in enumerate(groups):
        moved = group[orders[:, layer]]
        np.testing.assert_array_equal(moved, np.broadcast_to(group, moved.shape))
    assert len(np.unique(orders.reshape(-1, 8), axis=0)) > 20


def test_p_values_agree_with_a_loop():
    rng = np.random.default_rng(1)
    x = rng.exponential(size=(3, 8))
    x[1] += 0.5 * x[0]
    rows = unit_length(x)
    orders = shuffled_orders(400, np.zeros((3, 8), dtype=int), seed=0)
    test = pair_test(rows, [shuffle(rows, orders)], np.arange(3), shuffle_moments(rows))
    r = stats.pearsonr(x[0], x[1])[0]
    hits, largest = 0, 0
    for order in orders:
        moved = [row[o] for row, o in zip(x, order, strict=True)]
        null = [stats.pearsonr(moved[i], moved[j])[0] for i, j in ((0, 1), (0, 2), (1, 2))]
        hits += null[0] >= r
        largest += max(null) >= r
    assert test.p_raw[0, 1] == pytest.approx((1 + hits) / 401)
    assert test.p_corrected[0, 1] == pytest.approx((1 + largest) / 401)


def test_corrected_p_values_keep_the_family_wise_error():
    hits = 0
    for seed in range(100):
        x = np.random.default_rng(seed).exponential(size=(8, 2, 24))
        cmap = gl.coordinate_map(x, n_permutations=99, seed=seed, heads=False)
        above = np.triu_indices(8, 1)
        hits += bool((cmap.p_values[above] <= 0.05).any())
    assert hits <= 12  # 5 expected, standard deviation 2.2


def test_flat_gains_give_no_evidence_either_way():
    cmap = gl.coordinate_map(np.ones((4, 2, 16)), n_permutations=99)
    assert cmap.summary()["cosine"] == pytest.approx(1)
    assert cmap.summary()["null_cosine"] == pytest.approx(1)
    assert cmap.effect == 0
    assert (cmap.p_values == 1).all()
    assert (cmap.answer, cmap.universal_units) == ("not shared", ())
    assert cmap.verdict().status == "fails"


def test_jackknife_covers_the_truth():
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        common = np.random.default_rng(12345).standard_normal(400)
        x = common + rng.standard_normal((12, 400)) * rng.uniform(0.5, 1.5, (12, 1))
        rows = centred_rows(x)
        low, high = jackknife(rows @ rows.T)
        # E over layers of the product of loadings, for spreads uniform on 0.5 … 1.5
        loading = np.mean(1 / np.sqrt(1 + np.linspace(0.5, 1.5, 2001) ** 2))
        inside += low <= loading**2 <= high
    assert 175 <= inside <= 200


@pytest.mark.parametrize(("n", "per"), [(32, 1), (32, 2), (7, 1), (3, 2)])
def test_bands_hold_neighbouring_frequencies(n, per):
    f = np.tile(1e4 ** (-np.arange(n) / n), per)
    bands = frequency_bands(np.concatenate([f, np.zeros(3)]))
    assert (bands[-3:] == bands[:-3].max() + 1).all()
    order = np.argsort(-f, kind="stable")
    assert (np.diff(bands[:-3][order]) >= 0).all()
    for copy in range(1, per):
        np.testing.assert_array_equal(bands[:n], bands[copy * n : (copy + 1) * n])
    assert min(np.bincount(bands[:-3])) >= min(4, n) * per
    assert (frequency_bands(np.zeros(8)) == frequency_bands(np.zeros(8))[0]).all()
