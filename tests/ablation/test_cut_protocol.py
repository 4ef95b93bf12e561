"""Every kind of cut keeps what the protocol promises; a new kind is tested by being listed."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.ablation import CUTS, KeyCache, KeyMask, RefitCut, SlotCut
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.errors import FileFormatError, InputError
from gainlens.export import SlicePlan
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import token_losses


def random_refit(mask: KeyMask, n_heads: int, seed: int = 1) -> RefitCut:
    generator = torch.Generator().manual_seed(seed)
    layers, n_kv, d = mask.shape
    eye = torch.eye(d)
    keys = eye + 0.1 * torch.randn(layers, n_kv, d, d, generator=generator)
    queries = eye + 0.1 * torch.randn(layers, n_heads, d, d, generator=generator)
    keep = mask.keep.float()
    by_query = keep.repeat_interleave(n_heads // n_kv, 1)
    return RefitCut(mask, queries * by_query[..., None], keys * keep[..., None], {"text": "t"})


def random_slots(mask: KeyMask, model, seed: int = 3) -> SlotCut:
    sites = key_sites(model)
    maps = random_refit(mask, sites.n_heads)
    generator = torch.Generator().manual_seed(seed)
    own = sites.frequencies.double()
    shape = (*mask.shape[:2], own.shape[1])
    moved = own[:, None] * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    return SlotCut(mask, maps.query_maps, maps.key_maps, moved, own, facts={"text": "t"})


@pytest.fixture(scope="module")
def mask(tiny_gains):
    return KeyMask.quietest(tiny_gains, 0.5, scope="layer")


KINDS = {
    "mask": lambda mask, model, gains, text: mask,
    "mean": lambda mask, model, gains, text: mask.in_mode("mean", gains=gains),
    "resample": lambda mask, model, gains, text: mask.in_mode("resample", donors=[text], seed=1),
    "patch": lambda mask, model, gains, text: mask.in_mode(
        "patch", cache=KeyCache.run(model, text.flip(0))
    ),
    "refit": lambda mask, model, gains, text: random_refit(mask, key_sites(model).n_heads),
    "slots": lambda mask, model, gains, text: random_slots(mask, model),
}


@pytest.fixture(params=KINDS)
def cut(request, mask, tiny, tiny_gains, tiny_validation):
    return KINDS[request.param](mask, tiny, tiny_gains, tiny_validation)


def hooked_losses(model, cut, batch):
    with torch.inference_mode(), model.hooks(fwd_hooks=cut.hooks(model, batch)):
        return token_losses(model, batch)


def test_hooks_and_edit_agree(cut, tiny, tiny_validation):
    evaluator = Evaluator(tiny)
    assert evaluator.fast_copy is not None
    got = evaluator.tokens(tiny_validation, cut)
    torch.testing.assert_close(got, hooked_losses(tiny, cut, tiny_validation), atol=1e-3, rtol=0)
    assert (got - evaluator.tokens(tiny_validation)).abs().max() > 0.01


def test_one_place_alone_is_a_cut_there_and_nowhere_else(cut, tiny, tiny_validation):
    """Layer 1, head 0: keys elsewhere are the intact ones, keys there those of the whole cut."""
    found = {}
    for name, one in (("only", cut.only(1, 0)), ("whole", cut), ("intact", None)):
        keys = {}

        def record(k, hook, keys=keys):
            keys[len(keys)] = k.clone()

        sites = key_sites(tiny)
        hooks = [] if one is None else list(one.hooks(tiny, tiny_validation))
        hooks += [(sites.key_hook(layer, "rotated"), record) for layer in range(sites.n_layers)]
        with torch.inference_mode():
            tiny.run_with_hooks(tiny_validation, fwd_hooks=hooks, return_type=None)
        found[name] = keys
    torch.testing.assert_close(found["only"][0], found["intact"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found["only"][1][:, :, 1:], found["intact"][1][:, :, 1:], atol=1e-4, rtol=0
    )
    assert (found["only"][1][:, :, 0] - found["intact"][1][:, :, 0]).abs().max() > 0.01
    assert torch.equal(cut.only(1, 0).keep[0], torch.ones_like(cut.keep[0]))


@pytest.mark.parametrize("kind", CUTS)
def test_files(kind, mask, tiny, tiny_gains, tiny_validation, tmp_path):
    cut = KINDS[kind](mask, tiny, tiny_gains, tiny_validation)
    cut.save(tmp_path / "cut.safetensors")
    again = gl.load_cut(tmp_path / "cut.safetensors")
    assert type(again) is type(cut)
    assert again.digest() == cut.digest()
    assert again.all_facts == cut.all_facts
    assert torch.equal(again.keep, cut.keep)
    gains = tmp_path / "gains.safetensors"
    tiny_gains.save(gains)
    with pytest.raises(FileFormatError, match="gains"):
        gl.load_cut(gains)


def test_the_digest_sees_all_that_decides(mask, tiny, tiny_gains, tiny_validation):
    cuts = [make(mask, tiny, tiny_gains, tiny_validation) for make in KINDS.values()]
    cuts += [random_refit(mask, key_sites(tiny).n_heads, seed=2), random_slots(mask, tiny, seed=4)]
    cuts += [mask.only(0), mask.only(0, 1)]
    cuts.append(mask.in_mode("resample", donors=[tiny_validation], seed=2))
    digests = [cut.digest() for cut in cuts]
    assert len(set(digests)) == len(digests)


def test_what_it_becomes(cut, tiny):
    plan = SlicePlan.from_cut(cut)
    assert torch.equal(plan.keep, cut.keep)
    assert (plan.maps is None) == (cut.maps is None)


def test_texts_that_fitted_or_chose(mask, tiny, tiny_gains):
    texts, _ = random_refit(mask, key_sites(tiny).n_heads).chosen_on()
    assert texts == {"t", *tiny_gains.texts}
    assert KeyMask(mask.keep).chosen_on() == (set(), set())


def test_a_refit_that_keeps_what_is_cut_is_refused(mask, tiny):
    n_heads = key_sites(tiny).n_heads
    good = random_refit(mask, n_heads)
    keys = good.key_maps.clone()
    head, dim = (~mask.keep[2]).nonzero()[0].tolist()
    keys[2, head, dim, 0] = 1.0
    with pytest.raises(InputError, match=f"key head {head} of layer 2 writes dimension {dim}"):
        RefitCut(mask, good.query_maps, keys)
    keys = good.key_maps.clone()
    keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        RefitCut(mask, good.query_maps, keys)
    with pytest.raises(InputError, match="shapes"):
        RefitCut(mask, good.query_maps[:, :3], good.key_maps)


def test_cuts_of_other_kinds_have_one_mode(unchecked, mask, tiny, tiny_gains):
    refit = random_refit(mask, key_sites(tiny).n_heads)
    with pytest.raises(InputError, match="mode='mean'"), gl.ablate(tiny, refit, "mean"):
        pass
    with pytest.raises(InputError, match="expected a cut"):
        gl.ablation_hooks(tiny, mask.keep)
    with pytest.raises(InputError, match="cannot be saved"):
        mask.in_mode("mean", gains=tiny_gains).save("x")


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_no_head_is_left_empty(tiny_gains, scope, fraction):
    """One loud head takes the whole budget; the others keep their best unit all the same."""
    values = tiny_gains.score("qk", unit="pair")
    from gainlens.ablation.key_mask import keep_by_order

    values = values.clone()
    values[:, 0] *= 1e6
    partner = tiny_gains.model.partner
    keep = keep_by_order(values, fraction, scope, "pair", partner)
    assert bool(keep.any(-1).all())
    best = values[0, 1].argmax()
    assert keep[0, 1, best]
    assert keep[0, 1, partner[best]]
    assert not bool(keep_by_order(values, 1.0, scope, "pair", partner).any())


@pytest.mark.one_env
def test_nobody_downstream_asks_for_a_kind():
    root = Path(gl.__file__).parent
    names = {"KeyMask", "RefitCut", "MaskedCut", *(c.__name__ for c in CUTS.values())}
    own = {"key_mask.py", "refit_cut.py", "masked_cut.py", "slot_cut.py"}
    asked = []
    for path in root.rglob("*.py"):
        if path.name in own:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                found = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                if found & names:
                    asked.append(f"{path.relative_to(root)}:{node.lineno}")
    assert asked == []


def test_each_cut_is_run_once(tiny, mask, tiny_validation, monkeypatch):
    evaluator = Evaluator(tiny)
    calls = []
    real = Evaluator.tokens
    monkeypatch.setattr(
        Evaluator, "tokens", lambda self, b, cut=None: calls.append(cut) or real(self, b, cut)
    )
    text = evaluator.on(tiny_validation)
    again = evaluator.on(list(tiny_validation))
    assert again is text
    first = text.rise(mask)
    assert np.array_equal(again.rise(KeyMask(mask.keep)), first)
    assert len(calls) == 2 * len(text.documents)


def test_an_evaluator_belongs_to_its_model_and_hooks(tiny, tiny_gains, mask, tiny_validation):
    evaluator = Evaluator(tiny)
    with pytest.raises(InputError, match="another model"):
        gl.surgery(gl.load_model("tiny"), tiny_validation, tiny_gains, evaluator=evaluator)
    with gl.ablate(tiny, mask), pytest.raises(InputError, match="hooks on the model"):
        tiny(tiny_validation)
        evaluator.tokens(tiny_validation)
