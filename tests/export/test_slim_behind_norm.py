"""Maps of a cut where a norm acts before them: the slim model keeps them, after the norm."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from slim_families import CONFIGS, NO_BRIDGE, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.ablation import RefitCut, SlotCut
from gainlens.errors import InputError
from gainlens.export import ENGINES, EngineLimitError, SlicePlan, export_model, plan_of
from gainlens.export.after_norm import map_weights
from gainlens.export.card import CARD
from gainlens.export.judging import document_losses, judge_slim
from gainlens.export.plan_files import CUT_FILE
from gainlens.export.slim_attention import SlimAttention
from gainlens.export.speed_ledger import ledger, sizes
from gainlens.model.wrapping import to_bridge

EVERY_NORM = [
    name
    for name in CONFIGS
    if any(
        ".q_norm." in key or ".q_layernorm." in key
        for key, _ in random_model(name).named_parameters()
    )
]
NORMED = [name for name in EVERY_NORM if CONFIGS[name][1] == shape_of(random_model(name))[2]]
"""Those whose whole heads rotate in half-split pairs, as the edit of their own rotation has it."""
OTHERS = sorted(set(EVERY_NORM) - set(NORMED))
EVERY = pytest.mark.parametrize("name", NORMED)
TOKENS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(5))
"""Four times as long as the windows of the matrix."""
FEW = "ignore:tokens holds:UserWarning"


def logits(model, tokens=TOKENS, **kwargs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def hooked(bridge, cut, tokens=TOKENS):
    with torch.no_grad():
        return bridge.run_with_hooks(tokens, fwd_hooks=cut.hooks(bridge))


def random_maps(hf, keep):
    """Query and key maps near plain selection, with rows for what is kept alone."""
    n_heads, d = hf.config.num_attention_heads, keep.shape[2]
    generator = torch.Generator().manual_seed(7)

    def maps(kept):
        noise = 0.3 * torch.randn(*kept.shape, d, generator=generator)
        return (torch.eye(d) + noise) * kept[..., None]

    return maps(keep.repeat_interleave(n_heads // keep.shape[1], 1)), maps(keep)


def random_refit(hf, name):
    keep = random_keep(shape_of(hf), CONFIGS[name][1])
    return RefitCut(gl.KeyMask(keep), *random_maps(hf, keep))


def random_slots(hf, shared):
    """Maps into the first quarter of the pairs, at frequencies of one set or of each head."""
    n_layers, n_kv, d = shape_of(hf)
    keep = torch.zeros(n_layers, n_kv, d, dtype=torch.bool)
    keep[..., : d // 4] = keep[..., d // 2 : d // 2 + d // 4] = True
    generator = torch.Generator().manual_seed(3)
    f = torch.rand(n_layers, n_kv, d // 2, generator=generator, dtype=torch.float64)
    if shared:
        f = f[:1, :1].expand(f.shape).clone()
    own = gl.model.key_sites(to_bridge(copy.deepcopy(hf), "x", None)).frequencies
    return SlotCut(gl.KeyMask(keep), *random_maps(hf, keep), f, own)


@contextmanager
def edited(hf, cut):
    """transformers' own attention with the maps put between its norm and its rotation.

    Slots turn by their own angles in the place of the model's, at positions 0, 1, …
    """
    home = sys.modules[type(hf).__module__]
    own, calls = home.apply_rotary_pos_emb, [0]

    def rotate(x, frequencies):
        angle = torch.arange(x.shape[2])[:, None] * frequencies[:, None]
        angle = torch.cat([angle, angle], -1)
        a, b = x.double().chunk(2, -1)
        return (x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()).to(x.dtype)

    def apply(q, k, cos, sin, *args, **kwargs):
        layer = calls[0] % hf.config.num_hidden_layers
        calls[0] += 1
        q = cut.query_maps[layer].to(q) @ q.transpose(-1, -2)
        k = cut.key_maps[layer].to(k) @ k.transpose(-1, -2)
        q, k = q.transpose(-1, -2), k.transpose(-1, -2)
        if isinstance(cut, SlotCut):
            f = cut.frequencies[layer]
            return rotate(q, f.repeat_interleave(q.shape[1] // len(f), 0)), rotate(k, f)
        return own(q, k, cos, sin, *args, **kwargs)

    home.apply_rotary_pos_emb = apply
    try:
        yield hf
    finally:
        home.apply_rotary_pos_emb = own
    assert calls[0] >= hf.config.num_hidden_layers


@EVERY
@pytest.mark.parametrize("kind", ["refit", "universal slots", "slots of each head"])
def test_the_cut_that_was_judged_is_the_model_that_is_written(originals, name, kind, tmp_path):
    hf = copy.deepcopy(originals[name])
    cut = random_refit(hf, name) if kind == "refit" else random_slots(hf, "universal" in kind)
    intact = logits(hf)
    with edited(hf, cut):
        wanted = logits(hf)
    bridge = to_bridge(copy.deepcopy(hf), name, None)
    torch.testing.assert_close(hooked(bridge, cut), wanted, atol=1e-4, rtol=0)
    with gl.ablate(bridge, cut), torch.no_grad():
        torch.testing.assert_close(bridge(TOKENS), wanted, atol=1e-4, rtol=0)
    thin = gl.slim(hf, cut)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(gl.slim(bridge, cut)), wanted, atol=1e-4, rtol=0)
    assert (wanted - intact).abs().max() > 0.05
    assert (wanted - logits(gl.slim(hf, cut.mask))).abs().max() > 0.05  # the maps matter
    thin.save_pretrained(tmp_path)
    for again in (
        gl.load_slim(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(again), logits(thin))


@EVERY
def test_what_the_slim_model_holds(originals, name):
    """Projections and norms are the original's, and each head has its kept rows of its map."""
    hf = originals[name]
    cut = random_refit(hf, name)
    thin = gl.slim(hf, cut)
    layers = [m for m in thin.modules() if isinstance(m, SlimAttention)]
    theirs = dict(hf.named_parameters())
    prefixes = [key[: -len("q_proj.weight")] for key in theirs if key.endswith(".q_proj.weight")]
    n_heads, n_kv, d = hf.config.num_attention_heads, cut.shape[1], cut.shape[2]
    counted = 0
    for n, (own, prefix) in enumerate(zip(layers, prefixes, strict=True)):
        for part in ("q_proj", "k_proj"):
            stored = getattr(own, part).weight
            assert torch.equal(stored, theirs[f"{prefix}{part}.weight"])
        width = int(cut.keep[n].sum(-1).max())
        assert own.q_map.shape == (n_heads, width, d)
        assert own.k_map.shape == (n_kv, width, d)
        counted += own.q_map.numel() + own.k_map.numel()
        for head in range(n_kv):
            kept = cut.key_maps[n, head][cut.keep[n, head]]
            rows = own.k_map[head]
            filled = rows[rows.abs().sum(1) > 0]
            assert sorted(map(tuple, filled.tolist())) == sorted(map(tuple, kept.tolist()))
    assert map_weights(thin) == counted
    before, after = sizes(gl.slim(hf, SlicePlan.identity(hf))), sizes(thin)
    assert after.parameters == before.parameters + counted - normed_away(hf, thin)
    assert after.key_bytes < before.key_bytes


def normed_away(hf, thin):
    """Norm weights are per key head in the identity, as in any slim model with a norm."""
    full = gl.slim(hf, SlicePlan.identity(hf))
    return sum(
        p.numel() - dict(thin.named_parameters())[key].numel()
        for key, p in full.named_parameters()
        if key.endswith((".q_norm", ".k_norm"))
    )


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(originals, name, side):
    thin = gl.slim(originals[name], random_refit(originals[name], name))
    row = TOKENS[:1, :15]
    padded = torch.zeros(2, 24, dtype=torch.long)
    where = slice(9, 24) if side == "left" else slice(0, 15)
    padded[0, where], padded[1] = row[0], TOKENS[1]
    mask = torch.ones_like(padded)
    mask[0] = 0
    mask[0, where] = 1
    places = (mask.cumsum(1) - 1).clamp_min(0)
    got = logits(thin, padded, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(got[:1, where], logits(thin, row), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1:], logits(thin, TOKENS[1:]), atol=1e-4, rtol=0)


@EVERY
def test_generation_past_every_window_as_the_edited_original(originals, name):
    """A batch of two, one padded on the left, with a cache; then slots with and without one."""
    hf = copy.deepcopy(originals[name])
    cut = random_refit(hf, name)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    args = dict(
        attention_mask=mask, do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=0
    )
    prompt = TOKENS[:, :10]
    with edited(hf, cut):
        wanted = hf.generate(prompt, **args)
    thin = gl.slim(hf, cut)
    assert torch.equal(thin.generate(prompt, **args), wanted)
    assert torch.equal(thin.generate(prompt, use_cache=False, **args), wanted)
    static = thin.generate(prompt, cache_implementation="static", disable_compile=True, **args)
    assert torch.equal(static, wanted)
    with torch.no_grad():
        cache = thin(TOKENS, use_cache=True).past_key_values
    widths = plan_of(thin.config).key_widths(CONFIGS[name][1])
    assert [layer.keys.shape[-1] for layer in cache.layers] == list(widths)
    slots = gl.slim(hf, random_slots(hf, True))
    assert torch.equal(
        slots.generate(prompt, **args), slots.generate(prompt, use_cache=False, **args)
    )


@EVERY
@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("scope", ["layer", "universal"])
def test_the_recipe_is_kept(originals, name, scope, recwarn):
    """``best_cut`` at one half, fitted, through ``slim`` and into a folder."""
    bridge = to_bridge(copy.deepcopy(originals[name]), name, None)
    text = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(11))
    cut = gl.best_cut(bridge, text, 0.5, scope, score="qk", rounds=1, progress=False)
    assert isinstance(cut, SlotCut if scope == "universal" else RefitCut)
    assert not [w for w in recwarn if "without a refit" in str(w.message)]
    assert abs(cut.fraction_kept - 0.5) < 1e-6
    thin = gl.slim(bridge, cut)
    torch.testing.assert_close(logits(thin), hooked(bridge, cut), atol=1e-4, rtol=0)
    with edited(copy.deepcopy(originals[name]), cut) as hf:
        torch.testing.assert_close(logits(thin), logits(hf), atol=1e-4, rtol=0)


@EVERY
def test_values_beside_the_maps(originals, name):
    """``slim`` compares with the original under both edits and refuses if they differ."""
    hf = originals[name]
    plan = SlicePlan.from_cut(random_refit(hf, name), values=0.5)
    thin = gl.slim(hf, plan, TOKENS)
    bridge = to_bridge(copy.deepcopy(hf), name, None)
    torch.testing.assert_close(
        logits(gl.slim(bridge, plan, TOKENS)), logits(thin), atol=1e-4, rtol=0
    )
    widths = {m.value_dim for m in thin.modules() if isinstance(m, SlimAttention)}
    assert widths == {shape_of(hf)[2] // 2}


@EVERY
def test_what_is_left_in_float64_is_rounding(originals, name):
    """Of norms and angles, which transformers computes in float32 in any type."""
    exact = copy.deepcopy(originals[name]).double()
    for cut in (random_refit(exact, name), random_slots(originals[name], False)):
        with edited(exact, cut):
            wanted = logits(exact)
        thin = gl.slim(exact, cut)
        assert logits(thin).dtype == torch.float64
        torch.testing.assert_close(logits(thin), wanted, atol=2e-5, rtol=0)


@EVERY
def test_half_precision_rounds_no_more_than_the_original_does(originals, name):
    hf = originals[name]
    half = copy.deepcopy(hf).to(torch.bfloat16)
    for cut in (random_refit(hf, name), random_slots(hf, False)):
        wanted = logits(gl.slim(hf, cut))
        with edited(half, cut):
            theirs = (logits(half) - wanted).abs().mean()
        got = logits(gl.slim(half, cut))
        assert got.dtype == torch.bfloat16
        assert (got - wanted).abs().mean() < 1.5 * theirs


@EVERY
@pytest.mark.filterwarnings("ignore:folder .* gets no tokenizer:UserWarning")
def test_a_written_folder(originals, name, tmp_path):
    hf = originals[name]
    cut = random_refit(hf, name)
    thin = gl.slim(hf, cut)
    export_model(thin, tmp_path / "out")
    again = gl.load_slim(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(thin), atol=1e-6, rtol=0)
    card = (tmp_path / "out" / CARD).read_text()
    assert "the cache alone: a norm acts on queries and keys" in card
    assert f"{map_weights(thin):,} weights, after the norm" in card
    full = gl.slim(hf, SlicePlan.identity(hf))
    found = ledger(full, thin, contexts=(64,), measure=False)
    assert found["map_weights"] == map_weights(thin)
    assert found["saves"] == "cache alone"
    assert found["saved"]["parameters"] < 0 < found["saved"]["key_cache"]
    plain = ledger(full, gl.slim(hf, cut.mask), contexts=(64,), measure=False)
    assert plain["map_weights"] == 0


@EVERY
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "gainlens"])
def test_engines_without_a_place_for_maps(originals, name, engine, tmp_path):
    thin = gl.slim(originals[name], random_refit(originals[name], name))
    with pytest.raises(
        EngineLimitError, match="between the norm on its keys and the rotation"
    ) as e:
        export_model(thin, tmp_path / "out", engine=engine)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


@EVERY
def test_the_verdict_is_on_the_written_model(originals, name):
    hf = originals[name]
    bridge = to_bridge(copy.deepcopy(hf), name, None)
    cut = random_refit(hf, name)
    text = torch.randint(3, 96, (8, 20), generator=torch.Generator().manual_seed(2))

    def losses(found):
        got = torch.nn.functional.cross_entropy(
            found[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none"
        )
        return got.view(len(text), -1).double().mean(1).numpy()

    with torch.no_grad():
        rise = losses(hooked(bridge, cut, text)) - losses(bridge(text))
    thin = gl.slim(hf, cut)
    verdict = judge_slim(thin, hf, text, margin=0.02)
    assert verdict.estimate == pytest.approx(float(np.mean(rise)), abs=1e-5)
    mine = document_losses(thin, text) - document_losses(hf, text)
    assert mine == pytest.approx(rise, abs=1e-4)


@EVERY
def test_maps_that_do_not_belong(originals, name):
    hf = originals[name]
    cut = random_refit(hf, name)
    stranger = RefitCut(cut.mask, cut.query_maps, cut.key_maps, {"fingerprint": "ab" * 32})
    with pytest.raises(InputError, match=r"another model \(weights abababababab\)"):
        gl.slim(hf, stranger)
    plan = SlicePlan.from_cut(cut)
    half = replace(plan, maps=replace(plan.maps, queries=plan.maps.queries[:, :2]))
    with pytest.raises(InputError, match="plan has query maps"):
        gl.slim(hf, half)
    lost = replace(plan, maps=None, facts={CUT_FILE: "cut.safetensors"})
    with pytest.raises(InputError, match="lost its maps.*cut.safetensors"):
        gl.slim(hf, lost)
    with pytest.raises(InputError, match="carries the maps"):
        plan.save("nowhere.json")


@pytest.mark.parametrize("name", OTHERS)
def test_other_rotations_behind_a_norm(originals, name):
    """Partial rotation and adjacent pairs: the slim model is the cut's own hooks on a bridge."""
    hf = originals[name]
    cut = random_refit(hf, name)
    thin = gl.slim(hf, cut)  # refused unless it is the original with the maps put in by hooks
    assert (logits(thin) - logits(gl.slim(hf, cut.mask))).abs().max() > 0.05  # the maps matter
    if name in NO_BRIDGE:
        return
    bridge = to_bridge(copy.deepcopy(hf), name, None)
    wanted = hooked(bridge, cut)
    torch.testing.assert_close(logits(thin), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(gl.slim(bridge, cut)), wanted, atol=1e-4, rtol=0)
