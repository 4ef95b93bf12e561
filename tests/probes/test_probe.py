"""Gains against plain run_with_cache, and the promises of the probe."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
import torch
from families import FAMILIES, NO_NORM, bridge, family_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import gainlens as gl
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import hook_point


def cached(model, tokens, name):
    """All activations of a hook in float64, from the library's own cache."""
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens, names_filter=[name])
    return cache[name].double()


def test_gains_are_those_of_run_with_cache(any_tiny, tiny_calibration):
    gains = gl.probe_gains(any_tiny, tiny_calibration, tokens_per_batch=128, progress=False)
    sites = key_sites(any_tiny)
    for stage, rot in (("projected", ""), ("rotated", "rot_")):
        for layer in (0, 3):
            k = cached(any_tiny, tiny_calibration, f"blocks.{layer}.attn.hook_{rot}k").flatten(0, 1)
            q = cached(any_tiny, tiny_calibration, f"blocks.{layer}.attn.hook_{rot}q").flatten(0, 1)
            q_sq = q.square().mean(0).reshape(sites.n_kv_heads, sites.group_size, -1).mean(1)
            expected = {
                "rms": k.square().mean(0).sqrt(),
                "std": k.std(0, correction=0),
                "qk": (q_sq * k.square().mean(0)).sqrt(),
            }
            for name, value in expected.items():
                assert torch.allclose(
                    gains.score(name, stage=stage)[layer].double(), value, rtol=2e-5
                ), (name, stage, layer)
            assert torch.allclose(gains.mean(stage)[layer].double(), k.mean(0), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_probed(name):
    gains = gl.probe_gains(bridge(name), family_tokens(), progress=False)
    assert gains.shape == key_sites(bridge(name)).shape
    for score in ("rms", "std", "qk"):
        for unit in ("dim", "pair"):
            value = gains.score(score, unit=unit)
            assert torch.isfinite(value).all()
            assert (value > 0).all()
            if unit == "pair":
                assert torch.equal(value, value[..., gains.model.partner])


@pytest.mark.parametrize("name", NO_NORM)
def test_a_pair_keeps_its_energy_through_the_rotation(name):
    gains = gl.probe_gains(bridge(name), family_tokens(), progress=False)
    for score in ("rms", "qk"):
        before, after = (
            gains.score(score, stage, unit="pair") for stage in ("projected", "rotated")
        )
        assert torch.allclose(before, after, rtol=1e-4)


def test_silent_families_get_their_rotated_gains_from_attention():
    """On GPT-NeoX the rotated key energy is what a Llama hook would have shown: test by hand."""
    model = bridge("GPTNeoXForCausalLM")
    tokens = family_tokens()
    gains = gl.probe_gains(model, tokens, progress=False)
    k = cached(model, tokens, "blocks.0.attn.hook_k")
    cos, sin = model.original_model.gpt_neox.rotary_emb(k.float(), torch.arange(12)[None])
    cos, sin = cos[:, :, None].double(), sin[:, :, None].double()
    part, rest = k[..., :6], k[..., 6:]
    half = torch.cat([-part[..., 3:], part[..., :3]], -1)
    turned = torch.cat([part * cos + half * sin, rest], -1)
    expected = turned.square().mean((0, 1)).sqrt()
    assert torch.allclose(gains.score("rms")[0].double(), expected, rtol=1e-4)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=3, unique=True), batch=st.sampled_from([64, 200]))
def test_shards_merge_to_the_whole(tiny, tiny_calibration, tiny_gains, cuts, batch):
    bounds = [0, *sorted(cuts), 6]
    shards = [
        gl.probe_gains(tiny, tiny_calibration[a:b], tokens_per_batch=batch, progress=False)
        for a, b in itertools.pairwise(bounds)
    ]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged + shard
    assert (merged.n_tokens, merged.n_documents) == (tiny_gains.n_tokens, 6)
    for name, value in tiny_gains.sums.items():
        # Batch shapes change the matrix products' rounding; the sums themselves are float64.
        assert torch.allclose(merged.sums[name], value, rtol=1e-5, atol=1e-4), name


def test_documents_of_unequal_length_and_batches(tiny, tiny_calibration):
    ragged = [tiny_calibration[0], tiny_calibration[1, :40], tiny_calibration[2, :40].tolist()]
    gains = gl.probe_gains(tiny, ragged, progress=False)
    assert (gains.n_documents, gains.n_tokens) == (3, 64 + 40 + 40)
    by_batches = gl.probe_gains(
        tiny,
        iter([tiny_calibration[:1], torch.stack([torch.as_tensor(r) for r in ragged[1:]])]),
        progress=False,
    )
    assert torch.allclose(gains.score("qk"), by_batches.score("qk"), rtol=1e-4)
    assert gains.texts == by_batches.texts


def test_probe_in_a_loop_of_ones_own(tiny, tiny_calibration, tiny_gains):
    with torch.inference_mode(), gl.KeyGainProbe(tiny) as probe:
        for row in tiny_calibration.split(2):
            tiny(row)
    assert torch.allclose(probe.gains().score("qk"), tiny_gains.score("qk"), rtol=1e-4)
    assert gl.probe_gains(tiny, tiny_calibration, progress=False).texts != ()


def test_users_hooks_stay_and_ours_go(any_tiny, tiny_calibration):
    name = "blocks.1.attn.hook_k"
    calls = []
    any_tiny.add_hook(name, lambda t, hook: calls.append(1))
    try:
        gl.probe_gains(any_tiny, tiny_calibration, progress=False)
        assert calls
        assert len(hook_point(any_tiny, name).fwd_hooks) == 1
        with pytest.raises(ZeroDivisionError), gl.KeyGainProbe(any_tiny):
            raise ZeroDivisionError
        assert len(hook_point(any_tiny, name).fwd_hooks) == 1
        assert not hook_point(any_tiny, "blocks.2.attn.hook_rot_k").fwd_hooks
    finally:
        any_tiny.reset_hooks()


def test_a_silent_layer_is_named(any_tiny, tiny_calibration):
    probe = gl.KeyGainProbe(any_tiny)
    with (
        pytest.raises(gl.errors.SilentSiteError, match=r"\[2, 3\]"),
        torch.inference_mode(),
        probe,
    ):
        any_tiny.run_with_hooks(tiny_calibration, stop_at_layer=2)
    with pytest.raises(gl.errors.SilentSiteError):
        gl.KeyGainProbe(any_tiny).gains()


def test_save_and_load(tiny_gains, tmp_path):
    path = tmp_path / "gains.safetensors"
    tiny_gains.save(path)
    again = gl.KeyGains.load(path)
    assert again.model == tiny_gains.model
    assert (again.n_tokens, again.n_documents, again.texts) == (
        tiny_gains.n_tokens,
        tiny_gains.n_documents,
        tiny_gains.texts,
    )
    for name, value in tiny_gains.sums.items():
        assert torch.equal(again.sums[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["gains.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_gains_are_refused(tiny_gains, tmp_path, keep):
    path = tmp_path / "gains.safetensors"
    tiny_gains.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(gl.errors.FileFormatError, match=r"gains\.safetensors"):
        gl.KeyGains.load(path)


def test_foreign_and_doctored_files_are_refused(tiny_gains, tmp_path):
    path = tmp_path / "gains.safetensors"
    gl.KeyMask(torch.ones(1, 1, 2)).save(path)
    with pytest.raises(gl.errors.FileFormatError, match="kind"):
        gl.KeyGains.load(path)
    with pytest.raises(gl.errors.FileFormatError):
        gl.KeyGains.load(tmp_path / "nothing")
    tiny_gains.save(path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["facts"])
    facts["model"]["n_layers"] = 3
    header["__metadata__"]["facts"] = json.dumps(facts)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])
    with pytest.raises(gl.errors.FileFormatError, match="checksum"):
        gl.KeyGains.load(path)


def test_gains_of_different_models_do_not_mix(tiny_gains):
    other = gl.probe_gains(bridge("LlamaForCausalLM"), family_tokens(), progress=False)
    with pytest.raises(gl.errors.InputError, match="different models"):
        tiny_gains + other


def test_both_classes_share_a_fingerprint(any_tiny, tiny_gains, tiny_calibration):
    gains = gl.probe_gains(any_tiny, tiny_calibration, progress=False)
    assert gains.model == tiny_gains.model
    assert (gains + tiny_gains).n_tokens == 2 * gains.n_tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.long), "at least 2"),
        (torch.zeros(0, 5, dtype=torch.long), "no document"),
        ([], "no document"),
        (torch.zeros(5, dtype=torch.long), r"expected \[document, position\]"),
        (torch.zeros(2, 5), "expected integers"),
        (torch.full((2, 5), 10**6), "this model's vocabulary"),
        (torch.full((2, 5), -1), "this model's vocabulary"),
        ("some text", "expected a long tensor"),
        (7, "expected a long tensor"),
    ],
)
def test_bad_tokens(unchecked, tiny, tokens, message):
    with pytest.raises(gl.errors.InputError, match=message) as caught:
        gl.probe_gains(tiny, tokens, progress=False)
    assert "\n" not in str(caught.value)


def test_bad_scores(unchecked, tiny, tiny_gains, tiny_calibration):
    with pytest.raises(gl.errors.InputError, match="loudness"):
        gl.probe_gains(tiny, tiny_calibration, scores=("loudness",))
    with pytest.raises(gl.errors.InputError, match="empty"):
        gl.probe_gains(tiny, tiny_calibration, scores=())
    for bad in ({"name": "x"}, {"name": "rms", "stage": "x"}, {"name": "rms", "unit": "x"}):
        with pytest.raises(gl.errors.InputError, match="'x'"):
            tiny_gains.score(**bad)
    only_keys = gl.probe_gains(tiny, tiny_calibration, scores=("rms",), progress=False)
    with pytest.raises(gl.errors.InputError, match="qk"):
        only_keys.score("qk")


def test_half_precision_keys_are_summed_in_double(tiny_calibration):
    model = gl.load_model("tiny", dtype=torch.bfloat16)
    gains = gl.probe_gains(model, tiny_calibration, progress=False)
    k = cached(model, tiny_calibration, "blocks.2.attn.hook_rot_k").flatten(0, 1)
    assert torch.allclose(gains.score("rms")[2].double(), k.square().mean(0).sqrt(), rtol=1e-5)
