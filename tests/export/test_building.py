"""Building a model without its weights touches nothing outside its own thread."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from slim_families import SMALL
from torch import nn

from gainlens.errors import UnsupportedModelError
from gainlens.export import SlicePlan, slim
from gainlens.export.building import without_weights

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))


def random_llama(seed=0):
    torch.manual_seed(seed)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.15)
    return hf


def test_parameters_take_no_memory_and_buffers_are_real():
    config = transformers.LlamaConfig(**SMALL)
    built = without_weights(lambda: transformers.LlamaForCausalLM(config))
    usual = transformers.LlamaForCausalLM(config)
    assert all(p.is_meta for p in built.parameters())
    wanted = dict(usual.named_buffers())
    assert wanted
    for name, buffer in built.named_buffers():
        assert torch.equal(buffer, wanted[name])
    assert [n for n, _ in built.named_parameters()] == [n for n, _ in usual.named_parameters()]


def test_other_threads_and_the_process_see_nothing(monkeypatch):
    """While a model is built, every patchable function is what it was, here and elsewhere."""
    names = [(nn.Module, "register_parameter"), (nn.Module, "__setattr__"), (torch, "empty")]
    names += [(nn.init, name) for name in vars(nn.init) if name.endswith("_")]
    before = {(owner, name): getattr(owner, name) for owner, name in names}
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
            thread = threading.Thread(target=lambda: seen.append(nn.Linear(2, 2)))
            thread.start()
            thread.join()
            seen.append({key: getattr(*key) for key in before})

        def smart(self):
            return self

    real = transformers.PreTrainedModel.init_weights
    during = []

    def watching(self):
        real(self)
        during.append({key: getattr(*key) for key in before})

    monkeypatch.setattr(transformers.PreTrainedModel, "init_weights", watching)
    without_weights(Watched)
    elsewhere, here = seen
    assert not elsewhere.weight.is_meta
    assert here == before
    assert during
    assert all(found == before for found in during)


def test_three_threads_build_at_once():
    keep = torch.zeros(3, 2, 8, dtype=torch.bool)
    keep[..., [0, 2, 4, 6]] = True
    models = [random_llama(seed) for seed in range(3)]
    wanted = [slim(m, SlicePlan(keep))(TOKENS).logits.detach() for m in models]
    register = nn.Module.register_parameter
    together, found = threading.Barrier(3), {}

    def build(number):
        together.wait()
        for turn in range(4):
            thin = slim(models[number], SlicePlan(keep))
            found[number, turn] = thin(TOKENS).logits.detach()

    threads = [threading.Thread(target=build, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    for (number, _), logits in found.items():
        assert torch.equal(logits, wanted[number])
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_buffer_that_is_filled_later_is_refused():
    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.empty(3))

    with pytest.raises(UnsupportedModelError, match="'table'"):
        without_weights(Later)
