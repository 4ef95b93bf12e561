"""What ``slim`` takes and leaves as it was, and what it refuses with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from slim_families import NEOX, SMALL, random_keep, random_model, shape_of

import gainlens as gl
from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export import SlicePlan, slim
from gainlens.model.wrapping import hooked_class, to_bridge

TOKENS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(5))

try:
    hooked_class()
    HAS_HOOKED = True
except UnsupportedModelError:
    HAS_HOOKED = False


def logits(model, **kwargs):
    with torch.no_grad():
        return model(TOKENS, **kwargs).logits


@pytest.mark.parametrize("kind", ["transformers", "bridge"])
def test_modes_are_as_they_were_and_dropout_does_not_matter(originals, kind):
    """Also where the parts of a model are in different modes."""
    hf = copy.deepcopy(originals["gpt2"])
    assert hf.config.resid_pdrop > 0
    model = to_bridge(hf, "gpt2", None) if kind == "bridge" else hf
    model.train()
    next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)).eval()
    before = [module.training for module in model.modules()]
    plan = SlicePlan(random_keep((3, 4, 8), 0)).with_values(0.5)
    thin = slim(model, plan, TOKENS)
    assert [module.training for module in model.modules()] == before
    assert not thin.training
    torch.testing.assert_close(
        logits(thin), logits(slim(originals["gpt2"], plan, TOKENS)), atol=1e-5, rtol=0
    )


def test_other_classes_that_read_such_a_checkpoint(originals, tmp_path):
    hf = originals["llama"]
    plan = SlicePlan.identity(hf)
    hf.save_pretrained(tmp_path)
    for auto in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        model = auto.from_pretrained(tmp_path)
        model.config.architectures = ["LlamaForCausalLM"]
        with pytest.raises(
            UnsupportedModelError, match=f"{type(model).__name__}.* expected LlamaForCausalLM"
        ):
            slim(model, plan)


def test_a_compiled_model_is_read_like_its_own(originals):
    hf = originals["llama"]
    plan = SlicePlan(random_keep(shape_of(hf), 16))
    thin = slim(torch.compile(hf, backend="eager"), plan)
    assert torch.equal(logits(thin), logits(slim(hf, plan)))


def test_weights_without_numbers(originals):
    plan = SlicePlan.identity(originals["llama"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(originals["llama"].config)
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        slim(model, plan)
    model = copy.deepcopy(originals["llama"])
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.to(torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torch.int8\)"):
        slim(model, plan)
    model = copy.deepcopy(originals["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or infinite"):
        slim(model, SlicePlan(plan.keep))


def test_norm_factors_keep_their_digits_in_half_precision():
    """Gemma's norms multiply by one plus a weight; the sum rounds away what the weight says."""
    config = transformers.Gemma3TextConfig(**SMALL, head_dim=16)
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.normal_(0, 0.002)
            layer.self_attn.k_norm.weight.normal_(0, 0.002)
    model = model.to(torch.bfloat16)
    thin = slim(model, SlicePlan.identity(model))
    for old, new in zip(model.model.layers, thin.model.layers, strict=True):
        for name in ("q_norm", "k_norm"):
            weight = getattr(old.self_attn, name).weight
            assert weight.unique().numel() > 10
            assert torch.equal(getattr(new.self_attn, name), weight.expand(2, -1))


@pytest.mark.parametrize("what", ["bias", "block"])
@pytest.mark.parametrize("length", [6, 14, 24])
def test_masks_of_the_callers_own(originals, what, length):
    """Four axes, numbers to be added: for few queries and for many."""
    hf = originals["llama"]
    thin = slim(hf, SlicePlan.identity(hf))
    tokens = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    lowest = torch.finfo(torch.float32).min
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.zeros(2, 1, length, length).masked_fill(distance < 0, lowest)
    mask = mask - 0.1 * distance.clamp_min(0) if what == "bias" else mask
    if what == "block":
        mask[:, :, length // 2 :, : length // 3] = lowest
    with torch.no_grad():
        got, wanted = (m(tokens, attention_mask=mask).logits for m in (thin, hf))
        assert (wanted - hf(tokens).logits).abs().max() > 0.05
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.skipif(not HAS_HOOKED, reason="needs transformer-lens 3.9")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attn_only": True}, "has nothing for 'transformer.h.0.mlp"),
        ({"d_mlp": 48, "act_fn": "solu_ln"}, "act_fn='solu_ln'"),
        (
            {"d_mlp": 48, "positional_embedding_type": "rotary", "rotary_dim": 8},
            "nothing for 'transformer.wpe.weight'",
        ),
        ({"d_mlp": 48, "use_attn_scale": False}, "differ from the masked original's"),
    ],
)
def test_hooked_transformers_that_no_layout_holds(options, why):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = {"act_fn": "gelu_new", "normalization_type": "LN", **options}
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=8, n_heads=4, d_vocab=96, device="cpu",
        original_architecture="GPT2LMHeadModel", **settings,
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        model.unembed.b_U.zero_()
    with pytest.raises(UnsupportedModelError, match=why):
        slim(model, SlicePlan(torch.ones(2, 4, 8, dtype=torch.bool)))


@pytest.mark.skipif(not HAS_HOOKED, reason="needs transformer-lens 3.9")
@pytest.mark.parametrize("scaling", ["dynamic NTK", "YaRN"])
def test_rotary_scaling_that_no_layout_holds(scaling):
    """Written as plain rotation, such a model would lose its scaling without a message."""
    from gainlens.model.wrapping import to_hooked

    model = to_hooked(random_model("llama"), "llama", None)
    plan = SlicePlan(torch.ones(shape_of(random_model("llama")), dtype=torch.bool))
    assert slim(model, plan) is not None
    name = {"dynamic NTK": "use_dynamic_ntk_rope", "YaRN": "use_yarn_rope"}[scaling]
    setattr(model.cfg, name, True)
    with pytest.raises(UnsupportedModelError, match="YaRN or dynamic NTK"):
        slim(model, plan)
    if scaling == "dynamic NTK":
        with pytest.raises(UnsupportedModelError, match="dynamic NTK"):
            gl.model.key_sites(model).rotation.turn(0, 8)


def test_identity_under_transformers_own_attention_is_the_original_to_the_bit(originals):
    """What is left under the sliced attention is the order of its sums, nothing else."""
    for name in ("llama", "qwen2", "gpt2", "neox"):
        hf = originals[name]
        thin = slim(hf, SlicePlan.identity(hf))
        thin.set_attn_implementation("sdpa")
        if name == "neox":  # one product for queries, keys and values there, three here
            torch.testing.assert_close(logits(thin), logits(hf), atol=1e-6, rtol=0)
        else:
            assert torch.equal(logits(thin), logits(hf)), name


def test_an_odd_rotary_width(originals):
    """A rotary share that gives 3 dimensions of 8 turns 4: transformers rounds the pairs up."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    torch.manual_seed(0)
    hf = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**NEOX, rope_parameters=rope)
    ).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.3)
    keep = random_keep(shape_of(hf), 4)
    cut = copy.deepcopy(hf)
    with torch.no_grad():  # the oracle: zero rows in the original's own weights
        for layer, kept in zip(cut.gpt_neox.layers, keep, strict=True):
            for tensor in layer.attention.query_key_value.parameters():
                rows = tensor.view(4, 3, 8, -1)
                rows[:, 0][~kept] = 0
                rows[:, 1][~kept] = 0
    torch.testing.assert_close(logits(slim(hf, SlicePlan(keep))), logits(cut), atol=1e-5, rtol=0)
