"""Parts of the benchmarks whose mistakes would not show in a record."""

import sys
import types
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

# Last, since tests and benchmarks have modules of the same name.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from healing_text import ROWS, evened
from recall import STRETCH, recall_text, said_again
from worth_speed import MEMORY, grouped, in_turns, merged

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


def test_no_text_is_most_of_the_training():
    sizes = {"a": 3 * ROWS + 1, "b": 2, "c": ROWS}
    domains = [name for name, size in sizes.items() for _ in range(size)]
    rows = tuple(torch.tensor([i]) for i in range(len(domains)))
    found = evened(Texts(rows, tuple(domains), tuple(range(len(domains)))))
    assert Counter(found.domains) == {"a": ROWS, "b": 2, "c": ROWS}
    assert found.domains[:7] == ("a", "b", "c", "a", "b", "c", "a")
    assert len({int(row) for row in found.rows}) == len(found)
    some = [int(row) for row, name in zip(found.rows, found.domains, strict=True) if name == "a"]
    assert {b - a for a, b in pairwise(some)} <= {3, 4}


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


def test_turns_that_are_done_are_kept_and_more_can_follow(tmp_path):
    cell = {"checkpoint": "thin", "engine": "gainlens", "cache": "f32", "context": 8, "batch": 1}
    ran = []

    def run(turn, first):
        ran.append((turn, first and first[0]["tokens_per_second"]))
        return [{**cell, "tokens_per_second": 10.0 * (turn + 1), "intact_beside": 10.0}]

    (one,) = in_turns(tmp_path, "cells", "state", 1, run)
    (three,) = in_turns(tmp_path, "cells", "state", 3, run)
    assert ran == [(0, None), (1, 10.0), (2, 10.0)]
    assert one["turns"] == [10]
    assert three["turns"] == [10, 20, 30]
    assert three["ratio"] == 2
    assert in_turns(tmp_path, "cells", "state", 4, None) == [three]
    assert in_turns(tmp_path, "cells", "other", 1, None) == []
    (again,) = in_turns(tmp_path, "cells", "other", 1, run)
    assert again == one
    assert len(ran) == 4


@pytest.mark.parametrize(
    ("batch", "runs", "without"),
    [
        (1, [["intact", "a", "b", "c"]], {"eager": "11.6 GB of caches in one run"}),
        (2, [["intact", "a"], ["b"], ["c"]], {"eager": "16.5 GB of caches in one run"}),
        (
            4,
            [],
            dict.fromkeys(
                ("intact", "a", "b", "c", "eager"), "13.2 GB of caches of the intact model"
            ),
        ),
    ],
    ids=["all side by side", "two at a time", "not even the intact one"],
)
def test_caches_that_fit_into_memory_side_by_side(monkeypatch, batch, runs, without):
    def contender(name, engine, share, checkpoint=""):
        one = types.SimpleNamespace(name=name, model=share * MEMORY)
        return checkpoint or name, engine, one

    monkeypatch.setattr("worth_speed.cache_bytes", lambda size: size)
    some = [contender(name, "gainlens", 0.15) for name in "abc"]
    some.insert(1, contender("eager", "transformers, eager", 0.3, "intact"))
    some.append(contender("intact", "gainlens", 0.3))
    groups, left_out = grouped(some, 1, batch)
    assert [[one.name for _, _, one in group] for group in groups] == runs
    assert left_out == without
