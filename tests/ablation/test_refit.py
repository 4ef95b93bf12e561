"""The least-squares refit, on problems whose answer is known."""

from __future__ import annotations

import pytest
import torch
from families import bridge, family_tokens
from oracle_rotation import rotate
from planted import planted_llama, written_by

import gainlens as gl
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.model.rotation import Turn


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_turn_is_the_models_rotation(pairing):
    from gainlens.model.sites import pair_partners

    frequencies = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)
    x = torch.randn(2, 5, 3, 8)
    turn = Turn.of_frequencies(frequencies, pair_partners(8, 6, pairing), torch.arange(5))
    wanted = rotate(x, frequencies, pairing).transpose(1, 2)
    assert torch.allclose(turn(x.transpose(1, 2)), wanted, atol=1e-6)
    assert torch.allclose(turn(wanted, inverse=True), x.transpose(1, 2), atol=1e-5)
    kept = torch.tensor([0, 3]) if pairing == "half" else torch.tensor([0, 1])
    assert torch.allclose(turn.of(kept)(x.transpose(1, 2)[..., kept]), wanted[..., kept], atol=1e-6)


def test_keeping_everything_changes_nothing(tiny, tiny_calibration, tiny_validation):
    mask = gl.KeyMask(torch.ones(gl.model.key_sites(tiny).shape, dtype=torch.bool))
    cut = gl.ablation.refit(tiny, tiny_calibration, mask, progress=False)
    evaluator = Evaluator(tiny)
    got, wanted = evaluator.tokens(tiny_validation, cut), evaluator.tokens(tiny_validation)
    assert torch.allclose(got, wanted, atol=2e-3)


@pytest.fixture(scope="module")
def doubled():
    """Two slow pairs that hold the same content: cutting one is made good by doubling the other."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf, _ = planted_llama("shared")
    keep = torch.ones(2, 2, 16, dtype=torch.bool)
    keep[..., [7, 15]] = False
    with torch.no_grad():
        for block in hf.model.layers:
            for projection, heads in ((block.self_attn.q_proj, 4), (block.self_attn.k_proj, 2)):
                rows = projection.weight.view(heads, 16, -1)
                rows[:, [7, 15]] = rows[:, [6, 14]]
    calibration, validation = (written_by(hf, 8, 32, s) for s in (1, 2))
    model = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
    return model, gl.KeyMask(keep), calibration, validation


def test_refit_finds_the_exact_answer_where_there_is_one(doubled):
    model, mask, calibration, validation = doubled
    cut = gl.ablation.refit(
        model, calibration, mask, rounds=3, iterations=20, ridge=1e-6, progress=False
    )
    assert cut.facts["misfit_before"] > 0.05
    assert cut.facts["misfit_after"] < 1e-3 * cut.facts["misfit_before"]
    gains = gl.probe_gains(model, calibration, progress=False)
    curve = gl.surgery(
        model, validation, gains, (), cuts={"zero": mask, "refit": cut}, progress=False
    )
    zero, fitted = (row["delta"] for row in curve.table())
    assert zero > 0.05
    assert abs(fitted) < 0.02 * zero
    assert curve.verdict(0.125, 0.02, order="given", label="refit").interval[1] < 0.02
    assert curve.verdict(0.125, 0.02, order="given", label="zero").status == "fails"


def test_both_ways_agree(doubled, tiny, tiny_calibration, tiny_validation, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    small = gl.ablation.refit(tiny, tiny_calibration, mask, rounds=1, iterations=4, progress=False)
    for model, cut, tokens in ((tiny, small, tiny_validation),):
        fast, slow = (Evaluator(model, fast=f).tokens(tokens, cut) for f in (True, False))
        assert Evaluator(model).fast_copy is not None
        assert torch.allclose(fast, slow, atol=1e-4)
        assert (fast - Evaluator(model).tokens(tokens)).abs().max() > 1e-3
    assert small.facts["misfit_after"] < small.facts["misfit_before"]


def test_any_model_class(any_tiny, tiny_calibration):
    gains = gl.probe_gains(any_tiny, tiny_calibration[:2], progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5)
    cut = gl.ablation.refit(
        any_tiny, tiny_calibration[:2], mask, rounds=1, iterations=3, progress=False
    )
    assert cut.facts["misfit_after"] < cut.facts["misfit_before"]
    assert torch.isfinite(Evaluator(any_tiny).tokens(tiny_calibration[2:3], cut)).all()


def test_rows_of_cut_dimensions_are_zero_and_files_come_back(
    tiny, tiny_calibration, tiny_gains, tmp_path
):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    cut = gl.ablation.refit(
        tiny, tiny_calibration[:2], mask, rounds=1, iterations=2, progress=False
    )
    assert (cut.key_maps[~mask.keep] == 0).all()
    assert (cut.key_maps[mask.keep].abs().sum(-1) > 0).all()
    cut.save(tmp_path / "cut.safetensors")
    again = gl.ablation.RefitCut.load(tmp_path / "cut.safetensors")
    assert again.mask == cut.mask
    assert torch.equal(again.query_maps, cut.query_maps)
    assert again.facts == cut.facts
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(gl.errors.FileFormatError):
        gl.ablation.RefitCut.load(tmp_path / "cut.safetensors")


def test_bad_input(tiny, tiny_calibration, tiny_gains):
    half = torch.ones(tiny_gains.shape, dtype=torch.bool)
    half[..., 0] = False
    with pytest.raises(gl.errors.InputError, match="pair"):
        gl.ablation.refit(tiny, tiny_calibration, gl.KeyMask(half))
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    for bad in ({"rounds": 0}, {"stride": 0}, {"uniform": 1.0}):
        with pytest.raises(gl.errors.InputError, match=next(iter(bad))):
            gl.ablation.refit(tiny, tiny_calibration, mask, **bad)
    with pytest.raises(gl.errors.InputError, match="unequal"):
        gl.ablation.refit(tiny, [tiny_calibration[0], tiny_calibration[1, :20]], mask)
    cut = gl.ablation.refit(
        tiny, tiny_calibration[:1, :16], mask, rounds=1, iterations=1, progress=False
    )
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_calibration[:1, :16], tiny_gains, (), cuts={"x": cut}, progress=False)
    other = bridge("LlamaForCausalLM")
    with pytest.raises(gl.errors.InputError, match="shape|maps"):
        cut.hooks(other)
    capped = bridge("Gemma2ForCausalLM")
    gains = gl.probe_gains(capped, family_tokens(), progress=False)
    with torch.no_grad():  # the cap bends large logits only
        capped.blocks[0].attn.q.weight.mul_(30)
    try:
        with pytest.raises(gl.errors.UnsupportedModelError, match="cap"):
            gl.ablation.refit(
                capped, family_tokens(), gl.KeyMask.quietest(gains, 0.5), progress=False
            )
    finally:
        with torch.no_grad():
            capped.blocks[0].attn.q.weight.div_(30)


def test_bfloat16_is_rounding_and_not_another_attention():
    """Its attention weights are some hundredths off, which is no window and no soft cap."""
    from families import hugging_face
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    name = "LlamaForCausalLM"
    hf = hugging_face(name).to(torch.bfloat16)
    model = build_bridge_from_module(hf, name, hf_config=hf.config)
    gains = gl.probe_gains(model, family_tokens(), progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5)
    cut = gl.ablation.refit(
        model, family_tokens(rows=6), mask, rounds=1, iterations=4, progress=False
    )
    assert cut.facts["misfit_after"] < cut.facts["misfit_before"]
