"""A further pass of a fit acts on what the cut layers before a layer hand on to it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import gainlens as gl
from gainlens.ablation import refit
from gainlens.ablation.fitting import head_parts, kept_turn
from gainlens.ablation.least_squares import Problem, misfit
from gainlens.ablation.recorded_attention import record_attention
from gainlens.errors import InputError

pytestmark = pytest.mark.one_env


@pytest.fixture(scope="module")
def text(tiny):
    return gl.load_tokens("sotu,stdlib", tiny, n_docs=24, length=96)


@pytest.fixture(scope="module")
def mask(tiny, text):
    gains = gl.probe_gains(tiny, text, scores=("fisher",), progress=False)
    return gl.KeyMask.quietest(gains, 0.75, "fisher", "layer")


def test_each_layer_is_recorded_after_the_cut_of_those_before(tiny, text, mask):
    cut = refit(tiny, text, mask, rounds=1, iterations=4, progress=False)
    document = text[0]
    with record_attention(tiny, [document], 1, cut.hooks(tiny)) as record:
        for layer in range(record.sites.n_layers):
            hooks = [hook for earlier in range(layer) for hook in cut.only(earlier).hooks(tiny)]
            seen = {}

            def catch(x, hook, seen=seen):
                seen["k"] = x[0].detach()

            name = record.sites.key_hook(layer, "rotated")
            with torch.no_grad():
                tiny.run_with_hooks(document[None], fwd_hooks=[*hooks, (name, catch)])
            ((_, keys, at),) = record.layer(layer)
            torch.testing.assert_close(keys, seen["k"], rtol=0, atol=1e-4)
            assert torch.equal(at, torch.arange(len(document)))


def test_the_second_pass_fits_what_the_cut_model_hands_on(tiny, text, mask):
    """On the queries and keys of the cut model its maps miss the intact logits by less."""
    once, twice = (refit(tiny, text, mask, passes=n, progress=False) for n in (1, 2))
    assert twice.facts["passes"] == 2 and once.facts["passes"] == 1
    documents, sites = list(text), gl.model.key_sites(tiny)
    missed = {"once": [], "twice": []}
    with (
        record_attention(tiny, documents, 2) as record,
        record_attention(tiny, documents, 2, once.hooks(tiny)) as given,
    ):
        for layer in range(1, sites.n_layers):
            seen, acted_on = list(record.layer(layer)), list(given.layer(layer))
            for head in range(sites.n_kv_heads):
                kept = mask.keep[layer, head].nonzero()[:, 0]
                turn = partial(kept_turn, record, layer, kept, None)
                parts = head_parts(record, layer, head, seen, acted_on, 0.2, turn)
                problem = Problem(parts, record.attention[layer].scale)
                rows = slice(head * sites.group_size, (head + 1) * sites.group_size)
                for name, cut in (("once", once), ("twice", twice)):
                    maps = cut.query_maps[layer, rows][:, kept], cut.key_maps[layer, head][kept]
                    missed[name].append(misfit(problem, maps))
    assert sum(missed["twice"]) < 0.999 * sum(missed["once"])


def test_passes_are_counted(tiny, text, mask):
    with pytest.raises(InputError, match="passes=0"):
        refit(tiny, text, mask, passes=0)
