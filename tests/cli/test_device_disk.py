"""``--device disk``: the verbs on a model whose weights stay in their files."""

from __future__ import annotations

import json

import pytest
from calls import status_of
from sharded import sharded_tiny

pytest.importorskip("accelerate")
pytestmark = pytest.mark.one_env  # refused on transformer-lens 3

TEXT = ["--n-docs", "4", "--length", "32"]
CUT = ["--judge", "4", "--score", "qk", "--scope", "head", "--refit-rounds", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sharded_tiny(tmp_path_factory.mktemp("sharded"))


def test_slim_says_and_writes_the_same(folder, tmp_path, capsys):
    found = {}
    for device in ("cpu", "disk"):
        out = tmp_path / device / "slim"
        out.parent.mkdir()
        status = status_of(
            [
                "slim",
                "--model",
                str(folder),
                *TEXT,
                *CUT,
                "--device",
                device,
                "--json",
                "--out",
                out,
            ]
        )
        captured = capsys.readouterr()
        assert status == 0, captured.err
        found[device] = json.loads(captured.out)
    here, there = (tmp_path / device / "slim" for device in ("cpu", "disk"))
    names = sorted(file.name for file in here.iterdir())
    assert names == sorted(file.name for file in there.iterdir())
    assert [n for n in names if (here / n).read_bytes() != (there / n).read_bytes()] == []
    for what in ("full", "slim"):
        assert found["cpu"][what] == found["disk"][what]
    verdicts = [found[device]["verdict"]["estimate"] for device in ("cpu", "disk")]
    assert verdicts[0] == pytest.approx(verdicts[1], abs=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [(["--ledger"], "--ledger"), (["--engine", "transformers"], "from memory")],
)
def test_what_needs_a_model_in_memory_is_one_line(folder, tmp_path, capsys, options, message):
    out = tmp_path / "slim"
    arguments = ["slim", "--model", str(folder), *TEXT, *CUT, *options]
    assert status_of([*arguments, "--device", "disk", "--out", out]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said
    assert not out.exists()
