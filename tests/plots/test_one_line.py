"""What a notebook shows of a result: one line that fits a screen, values, units, what was saved."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.brief import LONGEST, brief
from gainlens.model import key_sites
from gainlens.stats.verdicts import Context, Verdict


@pytest.fixture(scope="module")
def results(tiny, tiny_gains, tiny_calibration, tiny_validation):
    some = tiny_calibration[:2], tiny_validation[:2]
    mask = gl.KeyMask.quietest(tiny_gains, 0.5)
    cmap = gl.analysis.with_evidence(
        tiny, *some, gl.coordinate_map(tiny_gains, n_permutations=99), tiny_gains, progress=False
    )
    curve = gl.surgery(tiny, some[1], tiny_gains, (0.25, 0.5), seeds=(0,), progress=False)
    return {
        "sites": key_sites(tiny),
        "rotation": key_sites(tiny).rotation,
        "gains": tiny_gains,
        "probe": gl.KeyGainProbe(tiny),
        "mask": mask,
        "cut": gl.best_cut(tiny, tiny_calibration, 0.5, progress=False),
        "curve": curve,
        "verdict": curve.verdict(0.5, 0.02),
        "map": cmap,
        "plan": gl.SlicePlan.from_mask(mask),
        "position": gl.analysis.rise_by_position(tiny, some[1], mask, progress=False),
        "distance": gl.analysis.change_by_distance(tiny, some[1], mask, progress=False),
    }


def parts(name, value, depth=2):
    """A result and the results that it holds."""
    yield name, value
    if dataclasses.is_dataclass(value) and depth:
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                yield from parts(f"{name}.{field.name}", inner, depth - 1)


def test_every_result_fits_a_screen(results):
    seen = 0
    for name, result in results.items():
        for place, part in parts(name, result):
            line = repr(part)
            assert "\n" not in line, place
            assert len(line) <= 320, place
            assert line.startswith(type(part).__name__), place
            seen += 1
    assert seen > len(results) + 8, "the parts of the map"


def test_sites_say_what_a_person_asks(results):
    line = repr(results["sites"])
    for words in ("4 layers × 2 key heads × 32 dims", "4 query heads", "16 rotary pairs (half)",
                  "blocks.0.attn.hook_k", "hook_rot_k"):  # fmt: skip
        assert words in line
    shortest, longest = re.search(r"([\d,]+) to ([\d,]+) tokens a turn", line).groups()
    waves = 2 * np.pi / results["sites"].frequencies[0].double().numpy()
    assert int(shortest) == round(waves.min())
    assert int(longest.replace(",", "")) == pytest.approx(waves.max(), rel=1e-3)


def test_a_verdict_prints_three_lines_with_units():
    verdict = Verdict(
        "fails", "half can go at less than 0.02 nats", 0.1, (0.05, 0.15), 0.02, 80,
        domain=("sotu",), context=Context.of([256]),
    )  # fmt: skip
    assert str(verdict).split("\n") == [
        "fails: half can go at less than 0.02 nats",
        "  +0.1 nats per token, interval +0.05 to +0.15, margin 0.02",
        "  80 documents of sotu, positions 0–255, distances 0–255",
    ]
    cosine = dataclasses.replace(verdict, claim="the cosine is above 0.99")
    assert cosine.unit == "" and "nats" not in str(cosine)


def test_a_curve_shows_its_values_and_the_margin(results):
    curve = results["curve"]
    html = curve._repr_html_()
    rows = re.findall("<tr><td>(.*?)</tr>", html)
    assert len(rows) == len(curve.points)
    for row, known in zip(rows, curve.table(), strict=True):
        cells = row.split("</td><td>")
        assert float(cells[3]) == pytest.approx(known["delta"], abs=1e-4)
        low, high = known["interval"]
        side = cells[5].removesuffix("</td>")
        assert side == (
            "below" if high < 0.02 else "above" if low > 0.02 else "inside the interval"
        )
    (index,) = curve.find(order="quietest", fraction=0.5)
    assert f"quietest 50% {curve.deltas(index).mean():+.3f}" in repr(curve)
    assert "random" not in repr(curve)


def test_a_slim_model_says_what_it_saved(tiny, results):
    slim = gl.slim(tiny, results["plan"])
    line = slim.extra_repr()
    assert line in repr(slim)
    tokens = torch.arange(8)[None]
    held = slim(tokens, use_cache=True).past_key_values
    bytes_held = sum(
        x.numel() * x.element_size() for layer in held.layers for x in (layer.keys, layer.values)
    )
    assert f"cache {bytes_held // 8:,} bytes a token instead of 2,048" in line
    own = sum(p.numel() for n, p in slim.named_parameters() if "_proj" in n and "self_attn" in n)
    full = 4 * 2 * 128 * 32 * (4 + 2)  # layers, keys with queries and values with outputs
    assert f"attention weights {own:,} instead of {full:,}" in line
    assert line.startswith("keys 16 of 32 dimensions a head, values 32;")


def test_brief_never_prints_an_array():
    @dataclasses.dataclass
    class Result:
        values: np.ndarray
        scalar: torch.Tensor
        many: list
        words: str
        __repr__ = brief

    line = repr(Result(np.zeros((3, 4)), torch.tensor(1.5), list(range(100)), "x" * 500))
    assert line.startswith("Result(values=[3 × 4], scalar=1.5, many=100 entries, words='xxx")
    assert len(line) <= LONGEST
