"""What a map asks of a model: sinks, red line, cost of sharing, canonical basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_maps import f1, planted_model

import gainlens as gl
from gainlens.analysis.map.canonical import canonical_basis, canonical_gains, head_weights
from gainlens.analysis.map.evidence import similarity_table, with_evidence
from gainlens.analysis.map.observation import observe_keys
from gainlens.analysis.map.red_line import find_red_line
from gainlens.analysis.map.sharing_cost import cost_of_sharing, shared_mask
from gainlens.analysis.map.sinks import find_sinks
from gainlens.analysis.map.units import unit_gains


@pytest.fixture(scope="module")
def units(tiny_gains):
    return unit_gains(tiny_gains, "rms", "rotated")[1]


@pytest.fixture(scope="module")
def seen(tiny, tiny_calibration, tiny_gains, units):
    return observe_keys(tiny, tiny_calibration, tiny_gains, units, progress=False)


@pytest.fixture(scope="module")
def cache(tiny, tiny_calibration):
    names = ("hook_rot_k", "hook_rot_q", "hook_pattern", "hook_attn_scores")
    with torch.inference_mode():
        found = tiny.run_with_cache(tiny_calibration, return_type=None)[1]
    return lambda layer, name: found[f"blocks.{layer}.attn.{name}"] if name in names else None


def test_units_are_the_rotary_pairs(units, tiny_gains):
    assert units.kind == "pair"
    assert units.dims[3] == (3, 19)
    np.testing.assert_allclose(units.frequency, tiny_gains.frequencies[0].numpy(), rtol=1e-6)
    assert units.wavelength[0] == pytest.approx(2 * np.pi, rel=1e-3)


def test_the_observation_agrees_with_a_full_cache(seen, cache, tiny_calibration):
    layer = 2
    pattern = cache(layer, "hook_pattern").double()
    mass = pattern[:, :, 1:, :4].mean((0, 2)).numpy()
    np.testing.assert_allclose(seen.mass[layer], mass, atol=1e-6)
    k = cache(layer, "hook_rot_k").double()
    pairs = torch.stack([k[..., :16], k[..., 16:]], -1)
    energy = pairs.square().mean(-1)
    np.testing.assert_allclose(seen.first_rms[layer], energy[:, 0].mean(0).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(seen.rms[layer, 3], energy[:, 4:8].mean((0, 1)).sqrt(), rtol=1e-5)
    assert seen.bins[:5].tolist() == [0, 1, 2, 4, 8]
    mean = pairs[:, 0].mean(0).square().mean(-1).sqrt()
    np.testing.assert_allclose(seen.first_mean[layer], mean, rtol=1e-4, atol=1e-6)
    assert seen.n_tokens == tiny_calibration.numel()


def test_advantages_add_up_to_the_logits(seen, cache):
    """Summed over units, the advantage is the logit of position 0 less the mean of the others."""
    layer = 1
    logits = cache(layer, "hook_attn_scores").double()
    rows = [
        logits[:, :, i, 0] - logits[:, :, i, 1 : i + 1].mean(-1) for i in range(1, logits.shape[2])
    ]
    by_head = torch.stack(rows).mean((0, 1))
    per_kv = by_head.reshape(2, -1).mean(1)
    np.testing.assert_allclose(seen.advantage[layer].sum(-1), per_kv, rtol=1e-4)


def test_tokens_of_a_unit_are_its_largest(seen, cache, tiny_calibration, tiny_gains):
    k = torch.stack([cache(layer, "hook_rot_k").double() for layer in range(4)])
    energy = (k[..., :16].square() + k[..., 16:].square()) / 2
    square = tiny_gains.score("rms", unit="pair")[..., :16].double().square()
    relative = (energy / square[:, None, None]).mean((0, 3))
    relative[:, 0] = 0
    for unit in (0, 9):
        best = relative[..., unit].flatten().topk(8)
        found = seen.tokens[unit]
        np.testing.assert_allclose([t["value"] for t in found], best.values, rtol=1e-5)
        for t in found:
            assert int(tiny_calibration[t["document"], t["position"]]) == t["token"]


def test_memory_of_the_observer_does_not_grow_with_the_text(
    tiny, tiny_calibration, tiny_gains, units, seen
):
    twice = observe_keys(
        tiny, [tiny_calibration, tiny_calibration], tiny_gains, units, progress=False
    )
    np.testing.assert_allclose(twice.advantage, seen.advantage, rtol=1e-6)
    assert twice.rms.shape == seen.rms.shape
    assert {len(t) for t in twice.tokens} == {len(t) for t in seen.tokens}


def planted_sinks(seen, units, layers, shared):
    """An observation whose sinks are known: unit 5 everywhere, or another unit in every layer."""
    from dataclasses import replace

    advantage = np.full((layers, 2, 16), -1.0)
    for layer in range(layers):
        advantage[layer, :, 5 if shared else (3 * layer) % 16] = 9.0
    mass = np.full((layers, 4, 4), 0.6)
    ones = np.ones((layers, 2, 16))
    return replace(
        seen, advantage=advantage, mass=mass, first_rms=ones, first_mean=ones,
        rms=np.ones((layers, 7, 2, 16)),
    )  # fmt: skip


def test_sinks_are_followed_through_depth(seen, units):
    from dataclasses import replace

    units = replace(units, layer_frequency=np.repeat(units.layer_frequency[:1], 10, axis=0))
    same = find_sinks(planted_sinks(seen, units, 10, True), units, n_permutations=200)
    assert same.sink_units == (5,)
    assert same.persistence() == 1
    assert same.verdict().status == "holds"
    assert same.through_depth()[0]["layers"] == list(range(10))
    assert same.nulls["plain"]["p"] < 0.01
    other = find_sinks(planted_sinks(seen, units, 10, False), units, n_permutations=200)
    assert other.verdict().status == "fails"
    assert other.nulls["plain"]["p"] > 0.05
    assert other.table()[0]["wavelength"] == pytest.approx(2 * np.pi, rel=1e-3)


def test_no_sink_head_is_no_verdict(seen, units):
    none = find_sinks(seen, units, min_mass=0.99)
    assert none.layers == ()
    assert none.verdict().status == "undecided"
    with pytest.raises(gl.errors.InputError, match="min_mass"):
        find_sinks(seen, units, min_mass=0.0)


def test_designs_of_sharing_cut_equally(tiny_gains, units):
    x = unit_gains(tiny_gains, "qk", "rotated")[0]
    for kept in (4, 11):
        masks = {s: shared_mask(x, units, 32, kept, s).keep for s in ("universal", "layer", "head")}
        for keep in masks.values():
            assert (keep.sum(-1) == 2 * kept).all()
            assert torch.equal(keep[..., :16], keep[..., 16:])
        assert (masks["universal"] == masks["universal"][:1, :1]).all()
        assert (masks["layer"] == masks["layer"][:, :1]).all()
    own = gl.KeyMask.quietest(tiny_gains, 0.25, "qk", "head", "pair").keep
    assert torch.equal(shared_mask(x, units, 32, 12, "head").keep, own)
    shared = gl.KeyMask.quietest(tiny_gains, 0.25, "qk", "universal", "pair").keep
    assert torch.equal(shared_mask(x, units, 32, 12, "universal").keep, shared)


def test_the_cost_is_that_of_plain_hooks(tiny, tiny_gains, tiny_validation, units):
    cost = cost_of_sharing(tiny, tiny_validation, tiny_gains, (0.5,), progress=False)
    x = unit_gains(tiny_gains, "qk", "rotated")[0]
    mask = shared_mask(x, units, 32, 8, "layer")
    with torch.inference_mode():
        intact = tiny(tiny_validation, return_type="loss").item()
        cut = tiny.run_with_hooks(
            tiny_validation, return_type="loss", fwd_hooks=gl.ablation_hooks(tiny, mask)
        ).item()
    row = next(r for r in cost.rows if r["scope"] == "layer")
    assert row["rise"] == pytest.approx(cut - intact, abs=1e-4)
    assert cost.verdict(margin=100.0).interval[1] < 100.0
    mean, _ = cost.difference(0.5, "universal", "layer")
    rises = {r["scope"]: r["rise"] for r in cost.rows if r["order"] == "quietest"}
    assert mean == pytest.approx(rises["universal"] - rises["layer"])
    with pytest.raises(gl.errors.InputError, match="can't judge"):
        cost_of_sharing(
            tiny, gl.load_tokens("sotu", tiny, n_docs=6, length=64), tiny_gains, progress=False
        )
    with pytest.raises(gl.errors.InputError, match="fraction="):
        cost_of_sharing(tiny, tiny_validation, tiny_gains, (0.99,), progress=False)


def test_a_text_that_does_not_judge_picks_the_ranking(
    tiny, tiny_gains, tiny_calibration, tiny_validation
):
    choose, judge = tiny_calibration[:2, :32], tiny_validation[:2, :32]
    both = cost_of_sharing(
        tiny, judge, tiny_gains, (0.75,), score=("qk", "std"), choose=choose, progress=False
    )
    x = {name: unit_gains(tiny_gains, name, "rotated") for name in ("qk", "std")}
    for tried in both.tried:
        row = next(r for r in both.rows if (r["scope"], r["order"]) == (tried["scope"], "quietest"))
        assert row["score"] == min(tried["rises"], key=tried["rises"].get)
        mask = shared_mask(*x[row["score"]], 32, 4, tried["scope"])
        with torch.inference_mode():
            cut = tiny.run_with_hooks(
                judge, return_type="loss", fwd_hooks=gl.ablation_hooks(tiny, mask)
            ).item()
            intact = tiny(judge, return_type="loss").item()
        assert row["rise"] == pytest.approx(cut - intact, abs=1e-4)
    with pytest.raises(gl.errors.InputError, match="choose="):
        cost_of_sharing(tiny, judge, tiny_gains, score=("qk", "std"))
    with pytest.raises(gl.errors.InputError, match="is to judge"):
        cost_of_sharing(tiny, judge, tiny_gains, score=("qk", "std"), choose=judge)
    line = find_red_line(
        tiny, choose, judge, tiny_gains, margin=0.02, score=("rms", "std"), progress=False
    )
    alone = {
        name: find_red_line(
            tiny, choose, judge, tiny_gains, margin=0.02, score=name, progress=False
        )
        for name in ("rms", "std")
    }
    for scope, score in line.scores.items():
        kept = {name: one.judged[scope]["kept"] for name, one in alone.items()}
        assert line.judged[scope]["kept"] == kept[score] == min(kept.values())


def plain_rise(model, tokens, mask):
    """Mean rise of the loss by TransformerLens' own loss, with nothing but hooks."""
    with torch.inference_mode():
        intact = model(tokens, return_type="loss")
        with gl.ablate(model, mask):
            return float(model(tokens, return_type="loss") - intact)


def test_the_red_line_is_the_edge_of_what_is_enough(
    tiny, tiny_gains, tiny_calibration, tiny_validation, seen, units
):
    """One unit less than it says is too few, by masks and losses that it did not make itself."""
    line = find_red_line(
        tiny, tiny_calibration, tiny_validation, tiny_gains, margin=0.02, score="rms",
        observation=seen, patch=tiny_validation[:1, :16], progress=False,
    )  # fmt: skip
    kept = len(line.universal)
    masks = {
        n: gl.KeyMask.quietest(tiny_gains, 1 - n / 16, score="rms", scope="universal")
        for n in (kept, kept - 1)
    }
    if kept < 16:
        assert plain_rise(tiny, tiny_calibration, masks[kept]) <= 0.02 + 1e-4
    assert plain_rise(tiny, tiny_calibration, masks[kept - 1]) > 0.02 - 1e-4
    found = plain_rise(tiny, tiny_validation, masks[kept]) if kept < 16 else 0.0
    assert line.judged["universal"]["rise"] == pytest.approx(found, abs=1e-4)
    assert line.judged["layer"]["kept"] == len(line.per_layer[0])
    assert len(line.details) == len(line.universal)
    row = line.table()[0]
    for key in ("wavelength", "gain_by_position", "used_by_heads", "tokens", "patched_rise"):
        assert key in row
    with pytest.raises(gl.errors.InputError, match="margin="):
        find_red_line(tiny, tiny_calibration, tiny_validation, tiny_gains, margin=0.0)
    with pytest.raises(gl.errors.InputError, match="is to judge"):
        find_red_line(tiny, tiny_validation, tiny_validation, tiny_gains)


def test_a_map_takes_its_evidence_along(
    tiny, tiny_gains, tiny_calibration, tiny_validation, tmp_path
):
    cmap = gl.coordinate_map(tiny_gains, n_permutations=99)
    full = with_evidence(
        tiny, tiny_calibration, tiny_validation, cmap, tiny_gains,
        parts=("sinks", "sharing_cost", "stability"), texts={"same": tiny_gains}, fractions=(0.5,),
        progress=False,
    )  # fmt: skip
    assert cmap.sinks is None
    assert full.red_line is None
    assert {v["claim"] for v in full.to_json()["verdicts"]} == {
        full.verdict(claim=c).claim
        for c in ("cosine", "shared", "shared by heads", "sinks", "sharing cost")
    }
    full.save(tmp_path / "map")
    found = gl.CoordinateMap.load(tmp_path / "map")
    assert found.verdict(claim="sharing cost") == full.verdict(claim="sharing cost")
    assert repr(found.sinks) == repr(full.sinks)
    with pytest.raises(gl.errors.InputError, match="parts contains"):
        with_evidence(tiny, tiny_calibration, tiny_validation, cmap, tiny_gains, parts=("taste",))
    array = gl.coordinate_map(tiny_gains.score("rms"), n_permutations=9)
    with pytest.raises(gl.errors.InputError, match="different models"):
        with_evidence(tiny, tiny_calibration, tiny_validation, array, tiny_gains)


def test_every_gain_stage_and_unit_has_its_row(tiny_gains):
    rows = similarity_table(tiny_gains, n_permutations=19)
    assert len(rows) == 12
    same = {r["stage"]: r["cosine"] for r in rows if (r["score"], r["unit"]) == ("rms", "pair")}
    # A pair keeps its norm through the rotation.
    assert same["projected"] == pytest.approx(same["rotated"], abs=1e-5)


def test_shards_merge_into_the_same_map(tiny, tiny_calibration, tiny_gains):
    shards = [gl.probe_gains(tiny, part, progress=False) for part in tiny_calibration.split(2)]
    merged = gl.coordinate_map(shards[0] + shards[1] + shards[2], "qk", n_permutations=99)
    whole = gl.coordinate_map(tiny_gains, "qk", n_permutations=99)
    for name, value in whole.summary().items():
        assert merged.summary()[name] == pytest.approx(value, abs=1e-6), name
    assert merged.universal_units == whole.universal_units


def test_a_gauge_rescaling_changes_no_gauge_invariant_map(tiny_gains):
    from dataclasses import replace

    scale = torch.ones(tiny_gains.shape, dtype=torch.float64)
    scale[1, :, 3] = scale[1, :, 19] = 50.0
    sums = {}
    for name, value in tiny_gains.sums.items():
        power = {"k_sum": 1, "k_sq": 2, "q_sq": -2}[name.split(".")[0]]
        sums[name] = value * scale**power
    moved = replace(tiny_gains, sums=sums)
    first, second = (gl.coordinate_map(g, "qk", n_permutations=99) for g in (tiny_gains, moved))
    np.testing.assert_allclose(first.cosine, second.cosine, atol=1e-6)
    assert first.universal_units == second.universal_units
    assert abs(gl.coordinate_map(moved, "rms", n_permutations=9).effect - first.effect) > 0.01


@pytest.mark.one_env
def test_the_canonical_basis_keeps_every_logit():
    rng = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(33, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    m_q, m_k, s = canonical_basis(w_q, w_k)
    product = w_q @ w_k.T
    torch.testing.assert_close((w_q @ m_q) @ (w_k @ m_k).T, product)
    u, values, vh = torch.linalg.svd(product)
    torch.testing.assert_close(s, values[:8])
    torch.testing.assert_close((w_q @ m_q).abs(), (u[:, :8] * values[:8].sqrt()).abs())
    torch.testing.assert_close((w_k @ m_k).abs(), (vh[:8].T * values[:8].sqrt()).abs())
    # Any map of the keys that is undone on the queries changes nothing.
    mix = torch.randn(8, 8, generator=rng, dtype=torch.float64)
    again = canonical_basis(w_q @ torch.linalg.inv(mix).T, w_k @ mix)
    torch.testing.assert_close((w_k @ mix @ again[1]).abs(), (w_k @ m_k).abs())


@pytest.mark.one_env
def test_directions_that_no_logit_sees_are_left_out():
    rng = torch.Generator().manual_seed(0)
    w_q, w_k = (torch.randn(20, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    w_k[:, 4] = w_k[:, 5]
    w_q[:, 4] = -w_q[:, 5]
    m_q, m_k, s = canonical_basis(w_q, w_k)
    assert (s == 0).sum() == 2
    torch.testing.assert_close((w_q @ m_q) @ (w_k @ m_k).T, w_q @ w_k.T)


@pytest.fixture(scope="module")
def gpt2_and_weights():
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=50, n_positions=32)
    hf = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias") or "ln" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "c_attn" in name:
                parameter.mul_(10)
    # A bridge rewires the model in place and renames its weights: copy them first.
    weights = {name: p.detach().double().clone() for name, p in hf.named_parameters()}
    return build_bridge_from_module(hf, "GPT2LMHeadModel", hf_config=config), weights


@pytest.fixture(scope="module")
def gpt2(gpt2_and_weights):
    return gpt2_and_weights[0]


def test_canonical_gains_of_a_model_without_rotation(gpt2):
    tokens = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    gains = canonical_gains(gpt2, tokens, progress=False)
    found = {}

    def keep(x, hook, name):
        found[name] = x.detach().double()

    from functools import partial

    with torch.inference_mode():
        gpt2.run_with_hooks(
            tokens,
            fwd_hooks=[(f"blocks.1.attn.hook_{n}", partial(keep, name=n)) for n in ("q", "k")],
        )
    w_q, w_k = head_weights(gpt2, 1)
    for head in range(2):
        m_q, m_k, _ = canonical_basis(w_q[head], w_k[head])
        q, k = found["q"][:, :, head], found["k"][:, :, head]
        torch.testing.assert_close((q @ m_q) @ (k @ m_k).mT, q @ k.mT, rtol=1e-4, atol=1e-4)
        rms = (k @ m_k).square().mean((0, 1)).sqrt()
        torch.testing.assert_close(gains.score("rms")[1, head].double(), rms, rtol=1e-4, atol=1e-5)
    cmap = gl.coordinate_map(gains, n_permutations=19)
    assert "canonical basis" in cmap.facts["alignment"]
    assert cmap.answer == "not comparable"
    assert cmap.verdict().status == "undecided"
    plain = gl.coordinate_map(gl.probe_gains(gpt2, tokens, progress=False), n_permutations=19)
    assert "no alignment" in plain.facts["alignment"]
    assert plain.null == "plain"
    assert plain.answer == "not comparable"
    assert plain.verdict().status == "undecided"
    assert plain.universal_units == ()


def test_the_canonical_basis_has_the_norm_folded_in(gpt2_and_weights):
    """Applied to the normalised input and a one, the matrices give the queries and keys."""
    model, weights = gpt2_and_weights
    w_q, w_k = head_weights(model, 1)
    x = torch.randn(5, 32, dtype=torch.float64)
    normed = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)
    extended = torch.cat([normed, torch.ones(5, 1, dtype=torch.float64)], 1)
    h = "transformer.h.1."
    after = normed * weights[h + "ln_1.weight"] + weights[h + "ln_1.bias"]
    fused = after @ weights[h + "attn.c_attn.weight"] + weights[h + "attn.c_attn.bias"]
    torch.testing.assert_close(extended @ w_q[0], fused[:, :16], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extended @ w_k[1], fused[:, 48:64], rtol=1e-4, atol=1e-4)
    assert float(w_k[:, :-1].mean(1).abs().max()) < 1e-6


def test_a_rotating_model_has_no_canonical_basis(tiny, tiny_calibration):
    with pytest.raises(gl.errors.UnsupportedModelError, match="rotates"):
        canonical_gains(tiny, tiny_calibration)


@pytest.mark.parametrize(("shared", "private"), [(6, 0), (4, 2), (0, 6)])
def test_shared_pairs_of_generated_models_are_recovered(shared, private):
    model, truth = planted_model(0, shared, private)
    tokens = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(1))
    cmap = gl.coordinate_map(gl.probe_gains(model, tokens, progress=False), n_permutations=300)
    assert f1(cmap.universal_units, truth) >= 0.95
    answers = {6: ("universal",), 4: ("universal", "partly shared"), 0: ("not shared",)}
    assert cmap.answer in answers[shared]


def test_every_model_class_is_observed_alike(any_tiny, seen, tiny_calibration, tiny_gains, units):
    found = observe_keys(any_tiny, tiny_calibration, tiny_gains, units, progress=False)
    np.testing.assert_allclose(found.mass, seen.mass, atol=1e-4)
    np.testing.assert_allclose(found.advantage, seen.advantage, atol=1e-3)
    np.testing.assert_allclose(found.rms, seen.rms, rtol=1e-3)
