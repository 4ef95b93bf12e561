"""The least-squares refit, on problems whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from families import bridge, family_tokens
from oracle_rotation import rotate
from planted import planted_llama, written_by

import gainlens as gl
from gainlens.ablation import fitting, recorded_attention
from gainlens.ablation.fitting import (
    Settings,
    fit_held_out,
    head_parts,
    in_halves,
    weighted_logits,
)
from gainlens.ablation.least_squares import Part, Problem, fit_rounds, misfit
from gainlens.ablation.recorded_attention import Attention
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.model.rotation import Turn
from gainlens.model.sites import pair_partners


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_turn_is_the_models_rotation(pairing):
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
        any_tiny, tiny_calibration, mask, rounds=1, iterations=3, progress=False
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
    for bad in ({"rounds": 0}, {"stride": 0}, {"uniform": 1.0}, {"ridge": -1.0}, {"ridge": ()}):
        with pytest.raises(gl.errors.InputError, match=next(iter(bad))):
            gl.ablation.refit(tiny, tiny_calibration, mask, **bad)
    cut = gl.ablation.refit(
        tiny, tiny_calibration[:1, :16], mask, rounds=1, iterations=1, progress=False
    )
    with pytest.raises(gl.errors.InputError, match="chose a cut"):
        gl.surgery(tiny, tiny_calibration[:1, :16], tiny_gains, (), cuts={"x": cut}, progress=False)
    other = bridge("LlamaForCausalLM")
    with pytest.raises(gl.errors.InputError, match="shape|maps"):
        cut.hooks(other)


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
        model, family_tokens(rows=40), mask, rounds=1, iterations=4, progress=False
    )
    assert cut.facts["misfit_after"] < cut.facts["misfit_before"]


def random_problem(soft_cap=None, window=None, groups=2):
    """Two documents of unequal lengths of a head of six dimensions, in float64."""
    generator = torch.Generator().manual_seed(3)
    partner = pair_partners(6, 6, "half")
    frequencies = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    turn = Turn.of_frequencies(frequencies, partner, torch.arange(25))
    turn = Turn(turn.cos.double(), turn.sin.double(), partner)
    attention = Attention(0.4, window, soft_cap)
    kept = torch.tensor([0, 2, 3, 5])
    parts = []
    for length in (25, 19):
        q = torch.randn(groups, length, 6, generator=generator, dtype=torch.float64)
        k = torch.randn(length, 6, generator=generator, dtype=torch.float64)
        at = torch.arange(1, length, 2)
        here = turn.at(torch.arange(length))
        rotated = turn.at(at)(q[:, at])
        logits, weights, slope = weighted_logits(
            attention, rotated[:, None], here(k)[None], at[None], 0.2
        )
        own = here.of(kept)
        parts.append(Part(q[:, None, at], k[None], at[None], logits, weights, own, slope))
    start = torch.eye(6, dtype=torch.float64)[kept]
    return Problem(parts, 0.4), (start.expand(groups, -1, -1).clone(), start)


@pytest.mark.parametrize(
    ("soft_cap", "window"), [(None, None), (None, 4), (1.5, None)], ids=["plain", "window", "cap"]
)
def test_each_solve_is_the_brute_force_least_squares(soft_cap, window):
    """Every weighted logit error written out as one row of a design matrix, solved in float64."""
    problem, (m_q, m_k) = random_problem(soft_cap, window)

    def residuals(q_maps, k_maps, g):
        rows = []
        for part in problem.parts:
            at = part.at[0]
            q = part.turn.at(at)(part.queries[g, 0] @ q_maps[g].T)
            k = part.turn(part.keys[0] @ k_maps.T)
            for i in range(len(at)):
                error = 0.4 * k @ q[i] - part.logits[g, 0, i]
                if soft_cap is not None:  # the cap, linear about the intact logit
                    error = error / torch.cosh(part.logits[g, 0, i] / soft_cap) ** 2
                w = part.weights[g, 0, i]
                rows.append(w.sqrt() * (error - (w * error).sum()))
                hidden = torch.arange(len(w)) > at[i]
                if window is not None:
                    hidden |= torch.arange(len(w)) <= at[i] - window
                assert bool((w[hidden] == 0).all())
                assert float(w.sum()) == pytest.approx(1)
        return torch.cat(rows)

    def solved(build, shape):
        zero = torch.zeros(shape, dtype=torch.float64)
        offset = build(zero)
        columns = []
        for n in range(zero.numel()):
            one = zero.clone()
            one.view(-1)[n] = 1.0
            columns.append(build(one) - offset)
        return torch.linalg.lstsq(torch.stack(columns, 1), -offset[:, None]).solution.view(shape)

    settings = {"rounds": 1, "iterations": 400, "ridge": 0.0}
    ((got_q, got_k),) = list(fit_rounds(problem, (m_q, m_k), **settings))

    def query_rows(g):
        def build(m):
            maps = m_q.clone()
            maps[g] = m
            return residuals(maps, m_k, g)

        return build

    wanted_q = torch.stack([solved(query_rows(g), (4, 6)) for g in (0, 1)])
    for g in (0, 1):
        best, plain = (residuals(m, m_k, g).square().sum() for m in (wanted_q, m_q))
        assert float(residuals(got_q, m_k, g).square().sum() - best) < 1e-6 * float(plain - best)

    def key_rows(m):
        return torch.cat([residuals(got_q, m, g) for g in (0, 1)])

    wanted_k = solved(key_rows, (4, 6))
    best, plain = (key_rows(m).square().sum() for m in (wanted_k, m_k))
    assert float(key_rows(got_k).square().sum() - best) < 1e-6 * float(plain - best)
    n_queries = 2 * sum(part.at.numel() for part in problem.parts)
    assert misfit(problem, (got_q, wanted_k)) == pytest.approx(float(0.5 * best / n_queries))


def test_one_query_map_for_a_group_is_the_least_squares_over_all_its_heads():
    """Against the normal equations of an explicit design matrix, with M_k held."""
    problem, (m_q, m_k) = random_problem(groups=3)
    settings = {"rounds": 1, "iterations": 400, "ridge": 0.0, "shared": True}
    ((got_q, _),) = list(fit_rounds(problem, (m_q, m_k), **settings))
    assert torch.equal(got_q, got_q[:1].expand_as(got_q))
    design, wanted = [], []
    for part in problem.parts:
        at, keys = part.at[0], part.turn(part.keys[0] @ m_k.T)
        for g in range(3):
            for i, place in enumerate(at):
                basis = torch.eye(24, dtype=torch.float64).view(24, 4, 6)
                moved = part.turn.at(place[None])((basis @ part.queries[g, 0, i])[:, None])
                logits = 0.4 * moved[:, 0] @ keys.T
                w = part.weights[g, 0, i]
                design.append((w.sqrt() * (logits - (logits * w).sum(-1, keepdim=True))).T)
                aim = part.logits[g, 0, i]
                wanted.append(w.sqrt() * (aim - (w * aim).sum()))
    found = torch.linalg.lstsq(torch.cat(design), torch.cat(wanted)[:, None]).solution
    best, plain = (
        float((torch.cat(design) @ x.reshape(24, 1) - torch.cat(wanted)[:, None]).square().sum())
        for x in (found, m_q[0])
    )
    reached = torch.cat(design) @ got_q[0].reshape(24, 1) - torch.cat(wanted)[:, None]
    assert float(reached.square().sum()) - best < 1e-6 * (plain - best)


def test_one_query_map_is_chosen_where_the_heads_need_the_same():
    """Few queries, much noise and one true map: what is learned together carries over better."""
    problem, start = random_problem(groups=3)
    generator = torch.Generator().manual_seed(5)
    true = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    halves = []
    for part in problem.parts:
        keys = part.turn(part.keys @ start[1].T)
        logits = 0.4 * part.query_turn(part.queries @ true.T) @ keys.mT
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        halves.append(replace(problem, parts=[replace(part, logits=logits + 0.3 * noise)]))
    (maps, choice, (before, after)) = fit_held_out(*halves, start, Settings(rounds=1, ridge=1e-3))
    assert choice.shared
    assert after < before
    own = list(fit_rounds(halves[0], start, rounds=1, iterations=12, ridge=1e-3))[-1]
    assert after < misfit(halves[1], own)
    assert torch.equal(maps[0], maps[0][:1].expand_as(maps[0]))


def test_both_halves_have_every_text_that_takes_turns():
    for texts in (2, 3, 4):
        seen = [(torch.tensor(n), torch.tensor(n % texts), torch.tensor(0)) for n in range(32)]
        halves = in_halves(seen)
        assert sorted(int(q) for half in halves for q, _, _ in half) == list(range(32))
        assert len(halves[0]) == len(halves[1])
        for half in halves:
            counts = torch.bincount(torch.stack([text for _, text, _ in half]), minlength=texts)
            assert int(counts.min()) >= 2, (texts, counts)


def test_no_fit_where_none_is_better_on_text_it_has_not_seen():
    """Logits of noise: what one half teaches is wrong for the other."""
    problem, start = random_problem()
    noisy = [replace(p, logits=torch.randn_like(p.logits)) for p in problem.parts]
    halves = [replace(problem, parts=[part]) for part in noisy]
    maps, chosen, (before, after) = fit_held_out(*halves, start, Settings(ridge=1e-6))
    assert chosen.rounds == 0
    assert before == after
    assert torch.equal(maps[1], start[1])


def test_a_text_goes_through_the_disk_unchanged(tiny, tiny_calibration, tiny_gains, monkeypatch):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    ragged = [tiny_calibration[0], tiny_calibration[1, :40], tiny_calibration[2, :40]]
    cuts = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(recorded_attention, "IN_MEMORY", limit)
        cuts.append(gl.ablation.refit(tiny, ragged, mask, rounds=1, iterations=2, progress=False))
    assert torch.equal(cuts[0].key_maps, cuts[1].key_maps)
    assert cuts[0].facts["n_tokens"] == 144
    assert cuts[0].facts["longest"] == 64


def test_queries_are_spread_over_all_positions(tiny, tiny_calibration):
    with recorded_attention.record_attention(tiny, list(tiny_calibration), 8) as record:
        at = torch.cat(record.at)
        assert all(len(a) == 8 for a in record.at)
        assert len({int(a[0]) for a in record.at}) >= 5
        queries, keys, places = next(record.layer(1))
    assert queries.shape == (8, 4, 32)
    assert keys.shape == (64, 2, 32)
    assert int(at.max()) == 63
    sites = gl.model.key_sites(tiny)
    _, cache = tiny.run_with_cache(tiny_calibration[:1])
    seen = cache[sites.query_hook(1, sites.hook_stage("rotated"))][0]
    if not sites.rotated_fires:
        seen = rotate(seen[None], sites.frequencies[1], sites.pairing)[0]
    assert torch.allclose(queries, seen[places], atol=1e-4)


@pytest.mark.parametrize("window", [8, 24, 40])
def test_the_window_of_the_model_is_seen_at_any_width(window):
    """Also where it is wider than a head, and longer than any short prompt."""
    model, documents = windowed(window)
    found = recorded_attention.check_attention(model, documents[0])
    assert [a.window for a in found] == [window, None]
    mask = gl.KeyMask.random(gl.probe_gains(model, documents, progress=False), 0.5, 0)
    with recorded_attention.record_attention(model, list(documents), 2) as record:
        seen = list(record.layer(0))
        part = head_parts(record, 0, 0, seen, seen, 0.2, partial(record.turn, 0))[0]
        assert part.keys.shape[0] == 4  # short documents of one shape go together
        distance = part.at[..., None] - torch.arange(64)
        assert float(part.weights[:, distance >= window].abs().max()) == 0
        assert float(part.weights[:, distance == window - 1].min()) > 0
    cut = gl.ablation.refit(model, documents, mask, rounds=1, iterations=4, progress=False)
    assert cut.facts["held_out_after"] <= cut.facts["held_out_before"]


def windowed(window):
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=window,
        query_pre_attn_scalar=16,
        max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"],
    )
    config.architectures = ["Gemma3ForCausalLM"]
    hf = transformers.Gemma3ForCausalLM(config).eval()
    model = build_bridge_from_module(hf, "Gemma3ForCausalLM", hf_config=hf.config)
    return model, torch.randint(3, 64, (4, 64), generator=torch.Generator().manual_seed(1))


def test_a_soft_cap_is_part_of_the_attention():
    capped = bridge("Gemma2ForCausalLM")
    gains = gl.probe_gains(capped, family_tokens(), progress=False)
    with torch.no_grad():  # the cap bends large logits only
        capped.blocks[0].attn.q.weight.mul_(30)
    try:
        found = recorded_attention.check_attention(capped, family_tokens()[0])
        mask = gl.KeyMask.quietest(gains, 0.5)
        cut = gl.ablation.refit(capped, family_tokens(rows=6), mask, rounds=1, progress=False)
    finally:
        with torch.no_grad():
            capped.blocks[0].attn.q.weight.div_(30)
    cap = capped.original_model.config.attn_logit_softcapping
    assert all(attention.soft_cap == cap for attention in found)
    assert cut.facts["held_out_after"] <= cut.facts["held_out_before"]


def test_another_attention_is_refused(tiny, tiny_calibration, tiny_gains, monkeypatch):
    real = recorded_attention._candidates
    monkeypatch.setattr(
        recorded_attention,
        "_candidates",
        lambda *a: [replace(c, scale=1.5 * c.scale) for c in real(*a)],
    )
    with pytest.raises(gl.errors.UnsupportedModelError, match="attention of layer 0 is more than"):
        gl.ablation.refit(
            tiny, tiny_calibration, gl.KeyMask.quietest(tiny_gains, 0.5), progress=False
        )


def test_too_little_text_is_said(tiny, tiny_calibration, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    with pytest.warns(UserWarning, match="64 tokens: a fit of heads with 32 .* some 2048 or more"):
        gl.ablation.refit(tiny, tiny_calibration[:1], mask, rounds=1, iterations=1, progress=False)


def test_another_default_type_changes_nothing(tiny, tiny_calibration, tiny_gains):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    settings = {"rounds": 1, "iterations": 2, "progress": False}
    wanted = gl.ablation.refit(tiny, tiny_calibration[:2], mask, **settings)
    was = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            got = gl.ablation.refit(tiny, tiny_calibration[:2], mask, **settings)
            assert got.key_maps.dtype == torch.float32
            assert torch.allclose(got.key_maps, wanted.key_maps, atol=1e-5)
    finally:
        torch.set_default_dtype(was)


def test_documents_of_one_shape_may_go_together(tiny, tiny_calibration, tiny_gains, monkeypatch):
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    settings = {"rounds": 1, "iterations": 3, "progress": False, "stride": 4}
    wanted = gl.ablation.refit(tiny, tiny_calibration, mask, **settings)
    monkeypatch.setattr(fitting, "PART_SIZE", 0)
    got = gl.ablation.refit(tiny, tiny_calibration, mask, **settings)
    assert got.facts["misfit_after"] == pytest.approx(wanted.facts["misfit_after"], rel=1e-2)
    assert got.facts["heads_unfitted"] < 8
