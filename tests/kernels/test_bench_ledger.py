"""What the ledger counts and says, on made-up times: nothing is measured here."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "kernels" / "bench"))

from shapes import HEADS, WIDTHS, Shape, cpu_table, gpu_table
from summary import markdown, summarise

pytestmark = pytest.mark.one_env


def made(kind, d_qk, d_v, ours, rivals, keys=64, **more):
    shape = Shape(kind, 4, 2, d_qk, d_v, keys, 1)
    times = {n: {"median_us": t} if t else {"error": "no"} for n, t in rivals.items()}
    row = {"name": shape.name, **vars(shape), "bytes": shape.bytes(4), "flops": shape.flops()}
    shares = {"share_of_bandwidth": 0.5, "share_of_matmul": 0.25}
    return {**row, **shares, "ours": {"median_us": ours}, "rivals": times, **more}


ROWS = [
    made("decode", 32, 64, 2.0, {"full: enable_gqa": 8.0, "thin: a": 4.0, "padded: flash": 6.0}),
    made("decode", 64, 64, 3.0, {"full: enable_gqa": 2.0, "full: b": None}),
    made("prefill", 32, 64, 2.0, {"full: enable_gqa": 9.0, "padded: flash": 8.0}),
    made("prefill", 64, 128, 2.0, {"full: enable_gqa": None, "padded: flash": None}),
]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_work_is_counted_pair_by_pair(kind):
    shape = Shape(kind, 6, 2, 3, 5, 7, 4)
    queries = 7 if kind == "prefill" else 1
    pairs = sum(1 for i in range(queries) for j in range(7) if j <= i + 7 - queries) * 6 * 4
    assert shape.pairs() == pairs
    assert shape.flops() == pairs * (2 * 3 + 2 * 5)
    kept = sum((3 + 5) * 7 for _ in range(4 * 2))
    assert shape.bytes(2) == 2 * (kept + 4 * 6 * queries * (3 + 5))


def test_the_table_is_the_one_that_was_asked():
    rows = cpu_table()
    assert len({row.name for row in rows}) == len(rows) == len(HEADS) * len(WIDTHS) * 9
    assert {row.kind for row in rows} == {row.kind for row in gpu_table()} == {"decode", "prefill"}


def test_figures_are_means_of_ratios_and_losses_stay():
    found = summarise(ROWS, cache_bytes=1 << 10)
    assert found["rows"] == 4
    assert found["decode, thin: best rival / ours"] == pytest.approx(2.0)
    assert found["decode at 32/64: full-width sdpa (best) / ours"] == pytest.approx(4.0)
    # One of the two padded rows ran.
    assert found["prefill at 32/64 and 64/128: ours / padded flash"] == pytest.approx(0.25)
    assert found["largest ours / best rival"] == pytest.approx(1.5)
    (slower,) = found["rows slower than the best rival by more than 5%"]
    assert slower == f"{ROWS[1]['name']}: 1.50"
    assert not any("exponentials" in name for name in found)


def test_nothing_measured_gives_nothing():
    found = summarise([], cache_bytes=1)
    assert found.pop("rows") == 0
    assert all(value in (None, []) for value in found.values())


def test_a_gpu_states_the_tighter_limit_and_each_rival():
    rivals = {"padded: flash": 4.0, "padded: cudnn": 3.0, "thin: flex": 8.0}
    rows = [made("prefill", 32, 64, 2.0, rivals, share_of_tighter=0.7)]
    found = {
        k: v for k, v in summarise(rows, 1).items() if k.startswith("prefill at 32/64, 64/128,")
    }
    assert [round(value, 6) for value in found.values()] == [2.0, 1.5, 4.0, 0.7]


def test_the_page_has_every_rival_of_every_row():
    ledger = {
        "machine": {"name": "M", "threads": 2, "dtype": "d", "torch": "t", "backend": "b"},
        "date": "today",
        "rows": ROWS,
        "summary": summarise(ROWS, 1),
        "skipped": {"a row": "needs more"},
    }
    page = markdown(ledger)
    assert "| a row | not run: needs more |" in page
    head, every = page.split("## Every rival")
    assert all(f"| {row['name']} |" in head for row in ROWS)
    assert "| row | full: enable_gqa | thin: a | padded: flash | full: b |" in every
    assert f"| {ROWS[0]['name']} | 4.00 | 2.00 | 3.00 |  |" in every
    assert f"| {ROWS[1]['name']} | 0.67 |  |  | error |" in every
    # Every table has as many cells in each row as in its head.
    for table in page.split("\n\n"):
        cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(cells) <= 1
