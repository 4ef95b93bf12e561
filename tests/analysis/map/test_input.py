"""Bad input, corner cases with a defined answer, invariances, files, comparison of maps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted_maps import planted

import gainlens as gl
from gainlens.analysis.map.across_texts import map_stability
from gainlens.analysis.map.comparison import compare_maps

pytestmark = pytest.mark.one_env


@pytest.fixture(scope="module")
def gains():
    return planted(0, 6, 4, shape=(8, 3, 16))[0]


@pytest.fixture(scope="module")
def cmap(gains):
    return gl.coordinate_map(gains, frequency=1e4 ** (-np.arange(16) / 16), n_permutations=99)


def broken(gains, where, value):
    found = gains.copy()
    found[where] = value
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g[:1], "one layer"),
        (lambda g: g[0], "shape"),
        (lambda g: g[..., :1], "one unit"),
        (lambda g: broken(g, (2, 1, 3), np.nan), "NaN or infinity, first in layer 2"),
        (lambda g: broken(g, (0, 0, 0), np.inf), "NaN or infinity"),
        (lambda g: broken(g, (0, 0, 0), -1.0), "negative"),
        (lambda g: broken(g, slice(1, None), 0.0), "all zero in layers"),
    ],
)
def test_bad_gains_are_refused_in_one_line(gains, change, words):
    with pytest.raises(gl.errors.InputError, match=words) as caught:
        gl.coordinate_map(change(gains), n_permutations=9)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_permutations": 0},
        {"fdr": 0.0},
        {"min_presence": 1.0},
        {"unit": "head"},
        {"frequency": [1.0, 2.0]},
        {"frequency": [-1.0] * 16},
    ],
)
def test_bad_settings_are_refused(gains, settings):
    with pytest.raises(gl.errors.InputError):
        gl.coordinate_map(gains, **{"n_permutations": 9, **settings})


def test_an_all_zero_layer_enters_no_mean(gains):
    dead = np.insert(gains, 3, 0.0, axis=0)
    with pytest.warns(UserWarning, match=r"layers \[3\] are all zero"):
        found = gl.coordinate_map(dead, n_permutations=99)
    whole = gl.coordinate_map(gains, n_permutations=99)
    assert found.facts["dead_layers"] == [3]
    for name in ("residual_correlation", "cosine", "centred_cosine", "cv", "null_cosine"):
        assert found.summary()[name] == pytest.approx(whole.summary()[name])
    assert (found.cosine[3, :3] == 0).all()
    assert (found.p_values[3, :3] == 1).all()
    assert found.universal_units == whole.universal_units
    assert found.universal.n_places == whole.universal.n_places


def test_a_dead_head_counts_for_nothing(gains):
    found = gl.coordinate_map(broken(gains, (2, 1), 0.0), n_permutations=99)
    assert found.facts["dead_layers"] == []
    assert found.universal.n_places == 8
    assert found.universal_by_head.n_places == 8 * 3 - 1


def test_one_head_per_layer_has_nothing_to_match(gains):
    found = gl.coordinate_map(gains[:, :1], n_permutations=99)
    np.testing.assert_allclose(found.heads.matched, found.residual_correlation, atol=1e-6)
    np.testing.assert_allclose(found.head_correlation, found.residual_correlation, atol=1e-6)
    assert found.answer == found.answer_by_head
    assert (found.heads.order == 0).all()


@pytest.mark.parametrize("layers", [2, 3])
def test_two_or_three_layers_are_too_few_to_say(layers):
    gains, _ = planted(0, 8, 0, noise=0.01, shape=(layers, 3, 32))
    found = gl.coordinate_map(gains, n_permutations=99)
    assert found.effect > 0.9
    assert found.answer == found.answer_by_head == "too few layers to say"
    assert found.universal_units == ()
    for claim in ("shared", "shared by heads", "cosine"):
        assert found.verdict(claim=claim).status == "undecided"
        assert found.verdict(0.1, claim).status == "undecided"


def test_six_pairs_are_too_few_to_say_beside_a_cubic():
    gains, _ = planted(0, 2, 0, noise=0.01, shape=(12, 3, 6))
    frequency = 1e4 ** (-np.arange(6) / 6)
    assert gl.coordinate_map(gains, frequency=frequency).answer == "too few units to say"
    assert gl.coordinate_map(gains).answer == "universal"


def test_claims_without_evidence_say_what_is_missing(cmap):
    assert cmap.sinks is None
    assert cmap.red_line is None
    assert "with_evidence" in repr(cmap)
    for claim in ("sinks", "sharing cost"):
        with pytest.raises(gl.errors.InputError, match="with_evidence"):
            cmap.verdict(claim=claim)
    with pytest.raises(gl.errors.InputError, match="claim="):
        cmap.verdict(claim="beauty")


@pytest.mark.parametrize("claim", ["shared", "shared by heads", "cosine"])
@pytest.mark.parametrize("threshold", [0, 0.0, -0.1, 1, 1.5, float("nan")])
def test_a_threshold_of_nothing_or_of_more_than_all_is_refused(cmap, claim, threshold):
    with pytest.raises(gl.errors.InputError, match="threshold="):
        cmap.verdict(threshold, claim)


def test_the_order_and_scale_of_heads_change_nothing(gains, cmap):
    rng = np.random.default_rng(0)
    moved = np.stack([layer[rng.permutation(3)] for layer in gains])
    moved *= rng.uniform(0.1, 10, (8, 3, 1))
    found = gl.coordinate_map(moved, frequency=1e4 ** (-np.arange(16) / 16), n_permutations=99)
    for name, value in cmap.summary().items():
        assert found.summary()[name] == pytest.approx(value, abs=1e-9), name
    assert found.universal_units == cmap.universal_units
    np.testing.assert_allclose(found.universal.presence, cmap.universal.presence)
    np.testing.assert_allclose(found.universal.p_values, cmap.universal.p_values)
    np.testing.assert_allclose(found.universal_by_head.presence, cmap.universal_by_head.presence)
    for name, value in cmap.heads.summary().items():
        assert found.heads.summary()[name] == pytest.approx(value, abs=1e-5), name


def test_matching_finds_heads_that_were_shuffled():
    rng = np.random.default_rng(0)
    prototypes = rng.exponential(size=(6, 64))
    orders = [rng.permutation(6) for _ in range(5)]
    gains = np.stack([prototypes[o] for o in orders]) * np.exp(
        0.05 * rng.standard_normal((5, 6, 64))
    )
    heads = gl.coordinate_map(gains, n_permutations=99).heads
    reference = orders[heads.reference]
    for order, found in zip(orders, heads.order, strict=True):
        np.testing.assert_array_equal(order[found], reference)
    assert heads.matched.min() > 0.9
    assert heads.matched_p <= 0.02


def test_matching_by_chance_is_not_called_alike():
    rng = np.random.default_rng(0)
    p = [
        gl.coordinate_map(rng.exponential(size=(3, 6, 16)), n_permutations=99).heads.matched_p
        for _ in range(15)
    ]
    assert sum(value <= 0.05 for value in p) <= 3


def test_head_p_values_agree_with_a_loop():
    from gainlens.analysis.map.nulls import shuffled_orders

    x = np.random.default_rng(0).exponential(size=(3, 2, 8))
    x[1, 0] += x[0, 1]
    found = gl.coordinate_map(x, n_permutations=200).heads
    orders = shuffled_orders(200, np.zeros((3, 8), dtype=int), seed=0)
    a, b = np.log(np.maximum(x / x.mean(-1, keepdims=True), 0.01))[[0, 1], [1, 0]]
    seen = np.corrcoef(a, b)[0, 1]
    hits = sum(np.corrcoef(a[o[0]], b[o[1]])[0, 1] >= seen - 1e-6 for o in orders)
    assert found.p_raw[1, 2] == pytest.approx((1 + hits) / 201, abs=1e-6)
    assert found.p_raw[2, 1] == found.p_raw[1, 2]
    assert found.p_raw[0, 1] == 1
    assert found.centred[1, 2] == pytest.approx(seen, abs=1e-6)


def test_a_map_survives_its_file(cmap, tmp_path):
    path = tmp_path / "a.map"
    cmap.save(path)
    found = gl.CoordinateMap.load(path)
    assert json.dumps(found.to_json()) == json.dumps(cmap.to_json())
    np.testing.assert_array_equal(found.heads.p_raw, cmap.heads.p_raw)
    assert found.overlap.keys() == cmap.overlap.keys()
    cut = path.read_bytes()[:-100]
    path.write_bytes(cut)
    with pytest.raises(gl.errors.FileFormatError):
        gl.CoordinateMap.load(path)


def test_other_files_are_no_maps(tmp_path):
    gl.KeyMask(torch.ones(2, 1, 4)).save(tmp_path / "mask")
    with pytest.raises(gl.errors.FileFormatError, match="kind"):
        gl.CoordinateMap.load(tmp_path / "mask")
    with pytest.raises(gl.errors.FileFormatError):
        gl.CoordinateMap.load(tmp_path / "none")


def test_a_map_file_builds_nothing_but_its_parts(cmap, tmp_path):
    from gainlens.files import save_tensors

    tree = {"$class": "Popen", "fields": {"args": "true"}}
    save_tensors(tmp_path / "bad", "map", {}, {"map": tree})
    with pytest.raises(gl.errors.FileFormatError, match="holds no map: it lacks 'Popen'"):
        gl.CoordinateMap.load(tmp_path / "bad")


def test_a_map_with_itself_and_with_a_stranger(gains, cmap):
    same = compare_maps(cmap, cmap, n_permutations=99)
    np.testing.assert_allclose(same.same_depth, 1)
    assert (same.gained, same.lost) == ((), ())
    assert same.common == cmap.universal_units
    assert same.p_value == pytest.approx(0.01)
    other = gl.coordinate_map(planted(9, 0, 4, shape=(5, 2, 16))[0], heads=False, n_permutations=99)
    strange = compare_maps(cmap, other, n_permutations=99)
    assert strange.centred.shape == (8, 5)
    assert not strange.same_frequencies
    assert set(strange.lost) == set(cmap.universal_units)
    assert strange.p_value > 0.01
    json.dumps(strange.to_json(), allow_nan=False)


def test_maps_of_other_widths_are_refused(gains, cmap):
    with pytest.raises(gl.errors.InputError, match="16 dims per head, b has 8"):
        compare_maps(cmap, gl.coordinate_map(gains[..., :8], n_permutations=9))


def test_stability_over_texts(gains):
    noisy = gains * np.exp(0.02 * np.random.default_rng(1).standard_normal(gains.shape))
    found = map_stability({"a": gains, "b": noisy}, seeds=(0, 1), n_permutations=99)
    assert len(found.texts) == 3
    assert found.core == found.ever
    assert all(row["same_layer_correlation"] > 0.95 for row in found.pairs)
    with pytest.raises(gl.errors.InputError, match="two or more"):
        map_stability({"a": gains})
    with pytest.raises(gl.errors.InputError, match="different shapes"):
        map_stability({"a": gains, "b": gains[:4]})


def test_figures_draw_on_the_axes_given(cmap):
    import matplotlib.pyplot as plt

    axes = plt.subplots(2, 2)[1]
    drawn = cmap.plot(axes)
    assert list(drawn) == list(axes.ravel())
    assert drawn[0].images
    compare_maps(cmap, cmap, n_permutations=9).plot()
    plt.close("all")
