"""The cache that grows in place: the same logits however it is filled, continued and branched."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from slim_families import random_keep, shape_of

from gainlens.export import SlicePlan, slim

pytestmark = pytest.mark.one_env
TOKENS = torch.randint(3, 96, (3, 14), generator=torch.Generator().manual_seed(5))
OTHERS = TOKENS[[1, 2, 0]]


@pytest.fixture(scope="module")
def thin(originals):
    hf = originals["llama"]
    return slim(hf, SlicePlan(random_keep(shape_of(hf), 16)))


def plain(thin, tokens):
    with torch.no_grad():
        return thin(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    "modes",
    [
        (torch.inference_mode, torch.no_grad, torch.inference_mode),
        (torch.no_grad, torch.inference_mode, torch.no_grad),
        (torch.inference_mode, torch.enable_grad, torch.no_grad),
    ],
)
def test_continued_in_another_mode(thin, modes):
    """A buffer made under inference_mode can't be written outside."""
    cache = transformers.DynamicCache(config=thin.config)
    for mode, part in zip(modes, (slice(0, 5), slice(5, 9), slice(9, 14)), strict=True):
        with mode():
            got = thin(TOKENS[:, part], past_key_values=cache).logits
        torch.testing.assert_close(got.detach(), plain(thin, TOKENS)[:, part], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["deepcopy", "same tensors"])
def test_two_branches_of_one_prompt(thin, how):
    with torch.no_grad():
        first = thin(TOKENS[:, :5], use_cache=True).past_key_values
        if how == "deepcopy":
            second = copy.deepcopy(first)
        else:
            data = [(layer.keys, layer.values) for layer in first.layers]
            first, second = transformers.DynamicCache(data), transformers.DynamicCache(data)
        for part in (slice(5, 9), slice(9, 14)):
            one = thin(TOKENS[:, part], past_key_values=first).logits
            two = thin(OTHERS[:, part], past_key_values=second).logits
            torch.testing.assert_close(one, plain(thin, TOKENS)[:, part], atol=1e-5, rtol=0)
            joined = torch.cat([TOKENS[:, :5], OTHERS[:, 5:]], 1)
            torch.testing.assert_close(two, plain(thin, joined)[:, part], atol=1e-5, rtol=0)
