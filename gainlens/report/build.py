"""Make the report folder. Every number on the page comes from the result objects."""

from __future__ import annotations

import shlex
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gainlens.ablation import Cut, KeyMask, best_cut
from gainlens.ablation.kinds import load_cut
from gainlens.analysis import CoordinateMap, SurgeryCurve, coordinate_map, surgery
from gainlens.analysis.damage_by_place import damage_by_head
from gainlens.analysis.map.evidence import similarity_table, with_evidence
from gainlens.analysis.map.files import plain
from gainlens.analysis.sweep.evaluator import Evaluator
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.loading import load_texts
from gainlens.data.splits import Split
from gainlens.data.texts import Texts
from gainlens.environment import environment
from gainlens.errors import InputError
from gainlens.files import locked, write_json, written_folder
from gainlens.model import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.probes import KeyGains, probe_gains
from gainlens.report.claims import all_claims, best_claim
from gainlens.report.figures import DAMAGE_FRACTION, Damage, draw_figures
from gainlens.report.folder import check_page_folder
from gainlens.report.next_step import next_step
from gainlens.report.page import render_page
from gainlens.report.page_figures import page_figures
from gainlens.report.progress import Stages, stage_costs
from gainlens.report.reach import Reach, measure_reach
from gainlens.report.sections import all_sections
from gainlens.report.unfinished import Unfinished

KIND = "gainlens-report"
REFITTED = "fisher, layer, refitted"


@dataclass(frozen=True)
class Plan:
    """The settings of a report.

    Attributes:
        model, text: names as for ``load_model`` and ``load_tokens``.
        n_docs: number of documents from each split.
        length: tokens per document.
        fractions: shares of key dimensions to cut; 0.5 and 0.8 are always added for the claims.
        score: which gain ranks the units.
        seeds: number of seeds for the random control.
        evidence_docs: documents from each split for sinks, red line and sharing cost.
        damage_docs, damage_length: number of validation documents, and tokens per document, for
            cutting one layer, key head or red-line unit at a time; 0 documents skip this.
        long_docs, context: number of validation documents of each text for the rise by position,
            and their tokens, at most; 0 documents skip it.
        across_docs: validation documents of each text that judge the cuts chosen on the others; 0
            skips it.
        price_docs: validation documents of each text that judge what sharing one set costs; 0 skips
            it.
        task_prompts, task_length: prompts per task, and their tokens; below 2 skips the tasks.
        refit_rounds: rounds of the least-squares refit of the cut at 0.5; 0 skips it.
        seed: seed of the permutations.
        device: device on which the model runs.
    """

    model: str
    text: str
    n_docs: int = 16
    length: int = 256
    fractions: tuple[float, ...] = (0.25, 0.5, 0.6, 0.8)
    score: str = "qk"
    seeds: tuple[int, ...] = (0, 1, 2)
    evidence_docs: int = 6
    damage_docs: int = 4
    damage_length: int = 128
    long_docs: int = 2
    context: int = 2048
    across_docs: int = 8
    price_docs: int = 6
    task_prompts: int = 4
    task_length: int = 1024
    refit_rounds: int = 6
    seed: int = 0
    device: str = "cpu"

    @property
    def all_fractions(self) -> tuple[float, ...]:
        """All fractions to run."""
        return tuple(sorted({*self.fractions, 0.5, 0.8}))

    @property
    def buckets(self) -> tuple[int, ...]:
        """Positions at which buckets begin."""
        return tuple(b for b in (0, 64, 256, 1024, 4096) if b < self.context)

    def check(self) -> None:
        """Reject bad arguments before a model is loaded."""
        from gainlens.analysis.sweep.points import sweep_points
        from gainlens.probes.scores import get_score

        get_score(self.score)
        sweep_points(
            self.all_fractions, ("quietest",), self.seeds, (self.score,), ("head",), "pair", "zero"
        )
        if not self.seeds:
            raise InputError("--seeds 0: expected at least one random control")

    def command(self) -> str:
        """How to reproduce this report: a shell command, or Python if a setting has no flag."""
        flags = {
            "--model": self.model,
            "--text": self.text,
            "--n-docs": self.n_docs,
            "--length": self.length,
            "--fractions": ",".join(f"{f:g}" for f in self.fractions),
            "--score": self.score,
            "--seeds": len(self.seeds),
            "--context": self.context,
            "--task-prompts": self.task_prompts,
            "--refit-rounds": self.refit_rounds,
            "--seed": self.seed,
            "--device": self.device,
        }
        usual = Plan(self.model, self.text)
        same = (
            "evidence_docs",
            "damage_docs",
            "damage_length",
            "long_docs",
            "across_docs",
            "price_docs",
            "task_length",
        )
        if self.seeds != tuple(range(self.seed, self.seed + len(self.seeds))) or any(
            getattr(self, name) != getattr(usual, name) for name in same
        ):
            given = ", ".join(
                f"{field.name}={getattr(self, field.name)!r}"
                for field in fields(self)
                if getattr(self, field.name) != field.default
            )
            return f"gainlens.report.build.build_report(model, Plan({given}), out)"
        words = [word for flag, value in flags.items() for word in (flag, str(value))]
        return shlex.join(["gainlens", "report", *words])

    def describe(self) -> list[str]:
        """A description of the plan, printed before anything runs."""
        points = len(self.all_fractions) * (2 + len(self.seeds)) + 1
        tokens = self.n_docs * self.length
        return [
            f"gainlens report: {self.model} on {self.text}, {self.device}",
            f"  probe    {self.n_docs} calibration documents × {self.length} tokens",
            f"  surgery  {points} forward passes over {self.n_docs} validation documents "
            f"({tokens} tokens each)",
            "  damage   one layer, key head or unit of the red line at a time, "
            f"{min(self.damage_docs, self.n_docs)} validation documents × "
            f"{min(self.damage_length, self.length)} tokens",
            f"  reach    by position up to {self.context:,} tokens, by distance, across texts, "
            f"{self.task_prompts} prompts per task, controls",
            "  map      1000 permutations; sinks, red line and cost of sharing on "
            f"{min(self.evidence_docs, self.n_docs)} documents of each split",
        ]


def check_report_folder(out: str | Path) -> Path:
    """Check that the folder is new, empty, or an earlier report, which may be replaced.

    Raises:
        InputError: the folder is not writable or contains something else.
    """
    return check_page_folder(out, "report.json", KIND, "a gainlens report")


def build_report(model: Any, plan: Plan, out: str | Path) -> dict[str, Any]:
    """Run the plan and write the page, the figures and the numbers to ``out``.

    The folder appears in one step at the end and replaces an old report if there is one. A killed
    run goes on after its last finished part: see ``gainlens.report.unfinished``.

    Returns:
        The content of ``report.json``.

    Raises:
        InputError: another process is writing the report; see also ``check_report_folder``,
            ``Plan.check``, ``load_tokens``, ``probe_gains``, ``surgery``.
    """
    out = check_report_folder(out)
    plan.check()
    with locked(out):
        return _build(model, plan, out)


def _build(model: Any, plan: Plan, out: Path) -> dict[str, Any]:
    texts = _texts(model, plan, "calibration"), _texts(model, plan, "validation")
    calibration, validation = (text.stacked() for text in texts)
    kept = Unfinished(
        out,
        {
            "plan": asdict(plan),
            "model": model_fingerprint(model),
            "texts": [text_fingerprint(list(text)) for text in texts],
            "versions": environment()["versions"],
        },
    )
    stages = Stages(stage_costs(plan, key_sites(model).shape))
    with closing(stages):
        with stages.stage("probe"):
            gains = kept.file(
                "gains.safetensors",
                lambda: probe_gains(model, calibration),
                lambda file, found: found.save(file),
                KeyGains.load,
            )
        with stages.stage("refit"):
            cuts, without = refitted_cuts(model, calibration, plan, kept)
        evaluator = Evaluator(model)
        with stages.stage("surgery"):
            curve = kept.file(
                "surgery.json",
                lambda: surgery(
                    model,
                    texts[1],
                    gains,
                    plan.all_fractions,
                    score=plan.score,
                    seeds=plan.seeds,
                    cuts=cuts,
                    evaluator=evaluator,
                ),
                lambda file, found: found.save(file),
                SurgeryCurve.load,
            )
        with stages.stage("damage"):
            damage = kept.part(
                "damage", lambda: damage_by_place(evaluator, validation, gains, plan)
            )
        with stages.stage("reach"):
            quietest = {f"{plan.score}, head, zeroed": KeyMask.quietest(gains, 0.5, plan.score)}
            reach = measure_reach(evaluator, plan, gains, {**cuts, **quietest}, texts, kept)
        with stages.stage("map"):
            cmap = kept.file(
                "map.safetensors",
                lambda: with_evidence(
                    model,
                    calibration[: plan.evidence_docs],
                    validation[: plan.evidence_docs],
                    coordinate_map(gains, seed=plan.seed),
                    gains,
                    score=tuple(dict.fromkeys((plan.score, "std", "rms"))),
                    fractions=(0.25, 0.5),
                    patch=validation[: plan.damage_docs, : plan.damage_length]
                    if plan.damage_docs
                    else False,
                    seed=plan.seed,
                    evaluator=evaluator,
                ),
                lambda file, found: found.save(file),
                CoordinateMap.load,
            )
    with written_folder(out, "--out", replace=True) as beside:
        facts = _write(beside, plan, gains, curve, cmap, damage, reach, without, kept.seconds)
    kept.done()
    return facts


def _texts(model: Any, plan: Plan, split: Split) -> Texts:
    return load_texts(plan.text, model, n_docs=plan.n_docs, length=plan.length, split=split)


def refitted_cuts(
    model: Any, calibration: torch.Tensor, plan: Plan, kept: Unfinished
) -> tuple[dict[str, Cut], str]:
    """The best cut at 0.5 without training, both refitted and only zeroed.

    Pairs are ranked by ``fisher`` within each layer. The kept query and key dimensions are then
    refitted to the intact attention logits on the same calibration text.

    Returns:
        The cuts by name, and the reason if there are none because the model does not support it.
    """
    if plan.refit_rounds < 1:
        return {}, "It was skipped in this run; --refit-rounds 6 adds it to the table."
    reason = "its attention is not described by the fit"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cut: Cut = kept.file(
            "cut.safetensors",
            lambda: best_cut(model, calibration, 0.5, rounds=plan.refit_rounds),
            lambda file, found: found.save(file),
            load_cut,
        )
    if cut.maps is None:
        reason = kept.part("without", lambda: str(said[-1].message) if said else reason)
        return {}, f"It is not available for this model: {reason}."
    zeroed = KeyMask(cut.keep, {k: v for k, v in cut.all_facts.items() if k != "refit"})
    return {REFITTED: cut, "fisher, layer, zeroed": zeroed}, ""


def damage_by_place(
    evaluator: Evaluator, validation: torch.Tensor, gains: KeyGains, plan: Plan
) -> Damage | None:
    """The cost of the cut at 0.5 in each single layer and each single key head."""
    if plan.damage_docs < 1:
        return None
    text = validation[: plan.damage_docs, : plan.damage_length]
    mask = KeyMask.quietest(gains, DAMAGE_FRACTION, plan.score)
    by_layer, by_head = (
        damage_by_head(evaluator.model, text, mask, by=by, evaluator=evaluator)
        for by in ("layer", "head")
    )
    return Damage(by_layer, by_head, len(text), int(text.shape[1]))


def _write(
    folder: Path,
    plan: Plan,
    gains: KeyGains,
    curve: SurgeryCurve,
    cmap: CoordinateMap,
    damage: Damage | None,
    reach: Reach,
    without: str,
    seconds: float,
) -> dict[str, Any]:
    gains.save(folder / "gains.safetensors")
    curve.save(folder / "surgery.json")
    cmap.save(folder / "map.safetensors")
    claims = all_claims(curve, cmap)
    best = best_claim(curve, REFITTED)
    step = next_step(claims, best)
    similarity = similarity_table(gains, seed=plan.seed)
    draw_figures(folder, gains, curve, cmap, plan.score, damage, reach)
    figures = page_figures(gains, curve, cmap, plan.score, damage, reach)
    facts: dict[str, Any] = {
        "kind": KIND,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "plan": asdict(plan),
        "model": asdict(gains.model),
        "texts": {"calibration": list(gains.texts), "validation": curve.text},
        "tokens": {"calibration": gains.n_tokens, "validation": curve.n_tokens},
        "claims": [claim.to_json() for claim in claims],
        "next": asdict(step),
        "best_cut": None if best is None else best.to_json(),
        "intact_loss": float(curve.baseline.mean()),
        "surgery": curve.table(),
        "damage": None if damage is None else damage.to_json(),
        "reach": reach.to_json(),
        "map": cmap.to_json(),
        "similarity": similarity,
        "cut": _cut_facts(plan, gains),
        **environment(),
    }
    facts = plain(facts)  # one document has an infinite interval, which JSON does not know
    write_json(folder / "report.json", facts)
    card = gains.model
    page = render_page(
        model=plan.model,
        shape=f"{card.architecture}: {card.n_layers} layers, {card.n_heads} query heads, "
        f"{card.n_kv_heads} key heads of {card.d_head} dimensions, "
        f"{card.rotary_dim // 2} rotary pairs each",
        calibration=f"{plan.text}, {gains.n_documents} documents, {gains.n_tokens} tokens",
        validation=f"{plan.text}, {curve.n_documents} documents, {curve.n_tokens} tokens",
        claims=claims,
        best=best,
        lead=figures.get("rise_by_position"),
        next_step={"why": step.why, "command": step.command(plan.model, plan.text)},
        sections=all_sections(curve, cmap, similarity, figures, plan.score, without, damage, reach),
        command=plan.command(),
        provenance=[
            ("made", facts["made"]),
            ("took", f"{seconds:.0f} s"),
            ("model weights", card.fingerprint),
            ("calibration text", gains.texts[0]),
            ("validation text", curve.text),
            *sorted(facts["versions"].items()),
            *sorted((k, str(v)) for k, v in facts["machine"].items()),
        ],
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return facts


def _cut_facts(plan: Plan, gains: KeyGains) -> list[dict[str, Any]]:
    """The share of dimensions that each fraction actually cuts (units are whole)."""
    return [
        {
            "fraction": fraction,
            "cut": 1 - KeyMask.quietest(gains, fraction, plan.score).fraction_kept,
        }
        for fraction in plan.all_fractions
    ]
