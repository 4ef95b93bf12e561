"""Where a cut hurts, on the page: position, distance, texts, tasks, controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gainlens as gl
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.data.loading import load_texts
from gainlens.report.build import Plan, build_report
from gainlens.report.reach import across_texts, long_texts, measure_reach
from gainlens.report.unfinished import Unfinished

pytestmark = pytest.mark.one_env
PLAN = Plan(
    "tiny", "sotu,stdlib", n_docs=4, length=48, seeds=(0,), fractions=(0.5,), damage_docs=2,
    damage_length=32, context=96, across_docs=2, task_prompts=2, task_length=200,
    evidence_docs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("reach") / "report"
    facts = build_report(tiny, PLAN, folder)
    return (folder / "index.html").read_text(encoding="utf-8"), facts, folder


def test_claims_name_the_texts_and_the_context(made):
    text, facts, _ = made
    for claim in facts["claims"][:2]:
        assert claim["where"] == "sotu, stdlib: positions 0–47, distances 0–47"
        assert claim["where"] in text
    verdict = facts["claims"][0]["verdict"]
    assert verdict["domain"] == ["sotu", "stdlib"] and "decided by" in verdict["note"]


def test_the_worst_text_decides(made):
    _, facts, folder = made
    curve = gl.SurgeryCurve.load(folder / "surgery.json")
    assert curve.domains == ("sotu", "stdlib", "sotu", "stdlib")
    (index,) = curve.find(order="quietest", fraction=0.5)
    rise = curve.deltas(index)
    worst = max(rise[0::2].mean(), rise[1::2].mean())
    assert facts["claims"][0]["verdict"]["estimate"] == pytest.approx(worst)


def test_rise_by_position_is_that_of_plain_hooks(made, tiny):
    _, facts, folder = made
    gains = gl.KeyGains.load(folder / "gains.safetensors")
    mask = gl.KeyMask.quietest(gains, 0.5, "qk")
    for name, found in facts["reach"]["by_position"].items():
        text = load_texts(name, tiny, n_docs=2, length=found["lengths"][0], split="validation")
        assert found["lengths"] == [96, 96]
        rise = []
        for row in text:
            losses = [
                torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="none")
                for logits in (
                    tiny.run_with_hooks(row[None], fwd_hooks=gl.ablation_hooks(tiny, mask)),
                    tiny(row[None]),
                )
            ]
            rise.append((losses[0] - losses[1]).detach().numpy())
        rows = {r["first"]: r for r in found["rows"] if r["cut"] == "qk, head, zeroed"}
        assert set(rows) == {0, 64}
        assert rows[0]["rise"] == pytest.approx(np.mean([r[:64].mean() for r in rise]), abs=1e-4)
        assert rows[64]["rise"] == pytest.approx(np.mean([r[64:].mean() for r in rise]), abs=1e-4)


def test_each_text_chooses_and_each_judges(made, tiny):
    _, facts, _ = made
    rows = {(r["chosen_on"], r["judged_on"]): r["rise"] for r in facts["reach"]["across_texts"]}
    assert set(rows) == {(a, b) for a in ("sotu", "stdlib") for b in ("sotu", "stdlib")}
    chosen = load_texts("stdlib", tiny, n_docs=4, length=48, split="calibration")
    judged = load_texts("sotu", tiny, n_docs=2, length=48, split="validation")
    with pytest.warns(UserWarning, match="tokens holds"):
        cut = gl.best_cut(tiny, list(chosen), 0.5, progress=False)
    gains = gl.probe_gains(tiny, list(chosen), progress=False)
    curve = gl.surgery(tiny, list(judged), gains, (), orders=(), cuts={"best": cut}, progress=False)
    assert rows["stdlib", "sotu"] == pytest.approx(curve.deltas(0).mean(), abs=1e-4)


def test_the_page_shows_what_was_measured(made):
    text, facts, folder = made
    claims, rest = text.index('id="claims"'), text.index('id="surgery"')
    assert claims < text.index("Rise of the loss against the position") < rest
    for anchor in ("position", "texts", "tasks", "controls"):
        assert f'id="{anchor}"' in text
    assert (folder / "rise_by_position.png").exists()
    assert (folder / "change_by_distance.png").exists()
    reach = facts["reach"]
    assert {r["side"] for r in reach["controls"]} == {"key", "query", "value"}
    assert {(r["side"], r["stage"]) for r in reach["effective_rank"]} == {
        (side, stage) for side in ("query", "key") for stage in ("projected", "rotated")
    }
    assert reach["tasks"]["rows"] and reach["by_distance"]["rows"]
    assert any("too short for the task" in why for why in reach["skipped"]), "128 tokens of context"
    assert "Not measured: task " in text


def test_a_text_without_long_documents_gives_what_it_has(tiny, tmp_path):
    for number in range(60):
        words = " ".join(f"word{number}{i} of a text" for i in range(30))
        (tmp_path / f"{number}.txt").write_text(words)
    plan = Plan("tiny", str(tmp_path), long_docs=2, context=4096)
    skipped = []
    ((_, found),) = long_texts(tiny, plan, skipped)
    assert found.lengths == (128, 128) and not skipped, "tiny reads 128 tokens"
    for file in tmp_path.glob("*.txt"):
        file.write_text(file.stem + " is short")
    assert list(long_texts(tiny, plan, skipped)) == []
    assert len(skipped) == 1 and "documents of at least 64 tokens" in skipped[0]


def test_nothing_is_measured_that_was_not_asked_for(tiny, tiny_gains, tmp_path):
    plan = Plan("tiny", "sotu", long_docs=0, task_prompts=0, damage_docs=0, price_docs=0)
    text = load_texts("sotu", tiny, n_docs=2, length=48)
    kept = Unfinished(tmp_path / "report", {})
    found = measure_reach(Evaluator(tiny), plan, tiny_gains, {}, (text, text), kept)
    assert not found.by_position and not found.across and found.tasks is None
    assert (
        found.controls is None and found.ranks is None and found.price is None and not found.skipped
    )
    assert across_texts(Evaluator(tiny), plan, []) == [], "one text has no other to judge"


def test_the_price_of_one_coordinate_system_is_on_the_page(made):
    text, facts, folder = made
    price = facts["reach"]["price"]
    assert {(r["scope"], r["kind"]) for r in price["rows"]} == {
        (scope, kind)
        for scope in ("universal", "layer", "head")
        for kind in ("zeroed", "refitted", "slots")
    }
    assert "One coordinate system: at which price" in text
    for row in price["rows"]:
        assert f"{row['rise']:+.4f}" in text
    assert (folder / "slots.png").exists() and (folder / "price.png").exists()
