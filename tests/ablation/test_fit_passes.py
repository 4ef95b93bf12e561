"""A further pass of a fit acts on what the cut layers before a layer hand on to it."""

from __future__ import annotations

import pytest
import torch

import gainlens as gl
from gainlens.ablation import fit_slots, refit
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


@pytest.mark.parametrize("kind", ["refit", "slots"])
def test_the_misfit_in_the_cut_model_falls(tiny, text, mask, kind):
    """Misfit of the first pass's maps on what the cut model feeds them, against the second's."""
    validation = gl.load_tokens("sotu,stdlib", tiny, n_docs=16, length=96, split="validation")
    gains = gl.probe_gains(tiny, text, scores=("fisher",), progress=False)

    def made(passes):
        if kind == "refit":
            return refit(tiny, text, mask, passes=passes, progress=False)
        return fit_slots(tiny, text, gains, 0.75, passes=passes, progress=False)

    once, twice = made(1), made(2)
    assert twice.facts["passes"] == 2 and once.facts["passes"] == 1
    assert [divergence(tiny, cut, validation) for cut in (twice, once)] == sorted(
        divergence(tiny, cut, validation) for cut in (twice, once)
    )


def divergence(model, cut, text):
    """Mean Kullback-Leibler divergence from the intact model's predictions, nats."""
    found = []
    with torch.no_grad():
        for document in text:
            hooks = cut.hooks(model)
            intact = model(document[None]).log_softmax(-1)
            after = model.run_with_hooks(document[None], fwd_hooks=hooks).log_softmax(-1)
            found.append(float((intact.exp() * (intact - after)).sum(-1).mean()))
    return sum(found) / len(found)


def test_passes_are_counted(tiny, text, mask):
    with pytest.raises(InputError, match="passes=0"):
        refit(tiny, text, mask, passes=0)
