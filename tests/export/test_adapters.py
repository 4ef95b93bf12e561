"""Adapters inside a model: LoRA merged on a copy, all else refused with what to do."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from slim_families import CONFIGS, random_keep, random_model, shape_of
from torch import nn

import gainlens as gl
from gainlens.errors import UnsupportedModelError
from gainlens.export import SlicePlan, export_model, load_slim, slim
from gainlens.export.adapters import without_adapters
from gainlens.model.wrapping import to_bridge

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(5))


class Lora(nn.Module):
    """What PEFT's layer holds and does, written out."""

    def __init__(self, inner, rank=3):
        super().__init__()
        self.base_layer = inner
        conv = isinstance(inner, transformers.pytorch_utils.Conv1D)
        rows, columns = inner.weight.shape[::-1] if conv else inner.weight.shape
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.use_dora = {}, {}
        self.active_adapters, self.merged_adapters = ["one"], []
        self.disable_adapters = False
        generator = torch.Generator().manual_seed(rows)
        for name, scale in (("one", 0.7), ("two", 2.0)):
            self.lora_A[name] = nn.Linear(columns, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, rows, bias=False)
            for part in (self.lora_A[name], self.lora_B[name]):
                nn.init.normal_(part.weight, 0, 0.2, generator=generator)
            self.scaling[name], self.use_dora[name] = scale, False

    def forward(self, x):
        out = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return out


def adapted(name="llama"):
    """A model with adapters on queries, keys and an MLP; and the module that holds each."""
    model = random_model(name)
    found = []
    for path, module in list(model.named_modules()):
        leaf = path.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj", "down_proj", "query_key_value", "c_attn", "c_fc"):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, leaf, Lora(module))
            found.append(getattr(parent, leaf))
    return model, found


class Peft(nn.Module):
    """A wrapper like PeftModel."""

    def __init__(self, inner, kind=None):
        super().__init__()
        self.base_model, self.peft_config = inner, {"one": kind}

    def get_base_model(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen3", "neox", "gpt2"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("active", [["one"], ["one", "two"], []])
def test_lora_is_merged_on_a_copy(name, wrapped, active, tmp_path):
    model, adapters = adapted(name)
    for adapter in adapters:
        adapter.active_adapters = active
    before = copy.deepcopy(model.state_dict())
    plain = logits(model)
    assert active == [] or (plain - logits(random_model(name))).abs().max() > 0.1
    given = Peft(model) if wrapped else model
    merged = without_adapters(given)
    torch.testing.assert_close(logits(merged), plain, atol=1e-5, rtol=1e-5)
    shape = shape_of(model)
    thin = slim(given, SlicePlan.identity(given))
    torch.testing.assert_close(logits(thin), plain, atol=1e-4, rtol=0)
    cut = slim(given, SlicePlan(random_keep(shape, CONFIGS[name][1])))
    export_model(cut, tmp_path / "out")
    assert torch.equal(logits(load_slim(tmp_path / "out")), logits(cut))
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(logits(model), plain)


def test_a_merged_copy_shares_what_it_can():
    model, adapters = adapted()
    merged = without_adapters(model)
    theirs = {p.data_ptr() for p in model.parameters()}
    own = {n for n, p in merged.named_parameters() if p.data_ptr() not in theirs}
    assert len(own) == len(adapters)
    assert all(n.endswith(("q_proj.weight", "k_proj.weight", "down_proj.weight")) for n in own)
    assert without_adapters(random := random_model("llama")) is random


def test_merged_and_disabled_adapters():
    model, adapters = adapted()
    expected = logits(model)
    for adapter in adapters:
        with torch.no_grad():
            product = adapter.lora_B["one"].weight @ adapter.lora_A["one"].weight
            adapter.base_layer.weight.add_(adapter.scaling["one"] * product)
        adapter.merged_adapters = ["one"]
    torch.testing.assert_close(logits(without_adapters(model)), expected, atol=1e-4, rtol=0)
    model, adapters = adapted()
    for adapter in adapters:
        adapter.disable_adapters = True
    assert torch.equal(logits(without_adapters(model)), logits(random_model("llama")))
    adapters[0].merged_adapters = ["one"]
    with pytest.raises(UnsupportedModelError, match="merged and disabled at once: merge first"):
        slim(model, SlicePlan(torch.ones(shape_of(model), dtype=torch.bool)))


@pytest.mark.parametrize("what", ["dora", "bias", "embedding", "saved", "variant"])
def test_adapters_that_are_more_than_a_matrix(what):
    model, adapters = adapted()
    if what == "dora":
        adapters[0].use_dora["one"] = True
    elif what == "variant":
        adapters[0].lora_variant = {"one": object()}
    elif what == "bias":
        old = adapters[0].lora_B["one"]
        adapters[0].lora_B["one"] = nn.Linear(old.in_features, old.out_features)
    elif what == "embedding":
        wrapper = nn.Module()
        wrapper.base_layer = model.model.embed_tokens
        model.model.embed_tokens = wrapper
    else:
        wrapper = nn.Module()
        wrapper.original_module = model.model.norm
        model.model.norm = wrapper
    plan = SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool))
    for given in (model, Peft(model)):
        with pytest.raises(UnsupportedModelError, match=r"merge first: .*merge_and_unload"):
            slim(given, plan)


def test_learned_prompts():
    kind = type("Kind", (), {"is_prompt_learning": True})()
    with pytest.raises(UnsupportedModelError, match="learns a prompt"):
        slim(Peft(random_model("llama"), kind), SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_healing_and_bridges_ask_to_merge_first(wrapped):
    model, _ = adapted()
    given = Peft(model) if wrapped else model
    before = copy.deepcopy(model.state_dict())
    plan = SlicePlan(random_keep((3, 2, 16), 16))
    with pytest.raises(UnsupportedModelError, match="trained at virtual width: merge first"):
        gl.train_virtual_width(given, plan, TOKENS, steps=1, progress=False)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    if not wrapped:
        bridge = to_bridge(random_model("llama"), "llama", None)
        inner = bridge.original_model.model.layers[0].mlp
        inner.adapter = Lora(nn.Linear(32, 32))
        with pytest.raises(UnsupportedModelError, match="TransformerBridge: merge first"):
            slim(bridge, plan)


def test_of_peft_itself(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    hf = random_model("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(hf), config).eval()
    expected = logits(copy.deepcopy(model).merge_and_unload())
    assert (expected - logits(hf)).abs().max() > 0.01
    for given in (model, model.get_base_model()):
        thin = slim(given, SlicePlan.identity(given))
        torch.testing.assert_close(logits(thin), expected, atol=1e-4, rtol=0)
    with model.disable_adapter():
        thin = slim(model, SlicePlan.identity(model))
    torch.testing.assert_close(logits(thin), logits(hf), atol=1e-4, rtol=0)
    with pytest.raises(UnsupportedModelError, match="merge first"):
        gl.train_virtual_width(model, SlicePlan.identity(model), TOKENS, steps=1)
    for other in (
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        peft.LoraConfig(target_modules=["embed_tokens"]),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
    ):
        adapted_model = peft.get_peft_model(copy.deepcopy(hf), other)
        with pytest.raises(UnsupportedModelError, match="merge first"):
            slim(adapted_model, SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool)))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="learns a prompt"):
        slim(
            peft.get_peft_model(copy.deepcopy(hf), prompt),
            SlicePlan(torch.ones(3, 2, 16, dtype=torch.bool)),
        )
