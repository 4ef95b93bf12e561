"""Parts of the benchmarks whose mistakes would not show in a record."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

# Last, since tests and benchmarks have modules of the same name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from recall import STRETCH, recall_text, said_again
from worth_speed import merged

from gainlens.data.texts import Texts

pytestmark = pytest.mark.one_env


@pytest.mark.parametrize("length", [512, 1025])
def test_the_second_half_says_stretches_of_the_first_again(length):
    row = torch.arange(length)
    found = said_again(row, torch.Generator().manual_seed(3))
    half = length // 2
    first, second = found[:half].tolist(), found[half:].tolist()
    assert first == row[:half].tolist()
    assert Counter(second) == Counter(first)
    cuts = [i + 1 for i in range(half - 1) if second[i + 1] != second[i] + 1]
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, half], strict=True)]
    assert len(sizes) >= half // STRETCH[1]
    # Neighbours that stayed neighbours read as one stretch; the last one may be short.
    assert sum(size < STRETCH[0] for size in sizes) <= 1


def test_documents_of_recall_are_spread_over_the_long_rows():
    rows = tuple(torch.full((n,), i) for i, n in enumerate([256, 512, 1024, 256, 512, 2048]))
    found = recall_text(Texts(rows, ("a",) * 6, tuple(range(6))), 2, 0)
    assert [row[0].item() for row in found] == [1, 4]
    assert found.lengths == (512, 512)
    assert found.names == ("recall",)


def test_a_ratio_is_taken_within_a_turn():
    cell = {"checkpoint": "thin", "engine": "gainlens", "cache": "f32", "context": 8, "batch": 1}
    turns = [
        [{**cell, "tokens_per_second": speed, "intact_beside": beside}]
        for speed, beside in ((10.0, 5.0), (30.0, 20.0), (20.0, 20.0))
    ]
    other = {**cell, "checkpoint": "eager", "not_run": "no room"}
    turns[0].append(other)
    thin, eager = merged(turns)
    assert thin["tokens_per_second"] == 20
    assert thin["ratio"] == 1.5
    assert thin["turns"] == [10, 30, 20]
    assert eager == other
