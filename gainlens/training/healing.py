"""``heal``: from a model's name to a healed folder, and on from where a killed run stopped.

``train_virtual_width`` trains a model that is there. Here the texts are loaded as well, so that
none of them shares a document with another, and everything that was done lies in ``OUT.part``.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gainlens.ablation.key_mask import Scope
from gainlens.ablation.kinds import load_cut
from gainlens.ablation.recipe import best_cut, ranking
from gainlens.ablation.refit_cut import RefitCut
from gainlens.data.loading import Length, load_texts
from gainlens.data.overlap import document_identities, shares_text
from gainlens.data.splits import Split
from gainlens.data.texts import Texts
from gainlens.errors import GainlensError, InputError
from gainlens.export.plan import SlicePlan
from gainlens.export.recipe import refitted
from gainlens.export.sources import open_source
from gainlens.files import check_free, check_writable, read_json, write_json
from gainlens.model import load_model
from gainlens.model.context import LONGEST
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.loading import load_hf
from gainlens.plots.training_runs import plot_training
from gainlens.probes import KeyGains
from gainlens.stats.loss_rise import rise_verdict
from gainlens.stats.verdicts import MARGIN
from gainlens.training.folder import fitted_cut, with_maps
from gainlens.training.plans import check_plan, thin_values
from gainlens.training.processes import Processes, gather_gains
from gainlens.training.rounds import nested_plans
from gainlens.training.run import TrainingRun, row_digests
from gainlens.training.settings import Settings
from gainlens.training.student import Student
from gainlens.training.virtual_width import train_virtual_width

FIGURE = "loss.png"
FITTED = "cut.safetensors"
"""The fitted cut that training starts from, in the folder of an unfinished run."""
WAY = "plan.{}.json"
"""Plans of the rounds before the last, in the folder of an unfinished run."""


@dataclass(frozen=True)
class Healing:
    """What ``heal`` is to do.

    Attributes:
        model, text: names as for ``load_model`` and ``load_tokens``.
        n_docs: calibration documents that choose the cut.
        length: tokens of each document, or ``mixed``; by default mixed up to ``LONGEST``.
        plan: a plan file, in the place of ``fraction``, ``score`` and ``scope``.
        fraction: share of key dimensions to cut.
        value_fraction: share of value dimensions to cut; None leaves those of the plan.
        score, scope: as for ``KeyMask.quietest``.
        refit_rounds: of the least-squares refit to start from; 0 for the plain cut.
        rounds: cut in so many, healing in between.
        monitor: calibration documents on which the run is watched.
        judge: validation documents that judge it.
        margin: nats per token that count as no rise.
        save_every: steps between checkpoints.
        device: where the model runs.
        settings: of the training; see ``Settings``.
    """

    model: str
    text: str
    settings: Settings
    n_docs: int = 24
    length: Length | None = None
    plan: str | None = None
    fraction: float = 0.5
    value_fraction: float | None = None
    score: str = "fisher"
    scope: Scope = "layer"
    refit_rounds: int = 6
    rounds: int = 1
    monitor: int = 8
    judge: int = 32
    margin: float = MARGIN
    save_every: int = 20
    device: str = "cpu"

    def check(self) -> None:
        """Refuse what can be known to be wrong before a model is loaded.

        Raises:
            InputError: a number out of range, a plan that can't be trained.
            FileFormatError: a plan file that is missing or damaged.
        """
        for name, least in (("monitor", 2), ("judge", 2), ("n_docs", 1), ("save_every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not 1 <= self.rounds <= max(1, self.settings.steps):
            raise InputError(
                f"rounds={self.rounds}: expected 1 to steps, which is {self.settings.steps}"
            )
        if not self.margin > 0:
            raise InputError(f"margin={self.margin}: expected a number of nats above 0")
        thin = bool(self.value_fraction)
        if self.plan:
            plan = SlicePlan.load(self.plan)
            check_plan(plan)
            thin = thin or (self.value_fraction is None and thin_values(plan))
        if thin and not {"v", "o"} <= set(self.settings.train):
            raise InputError("a plan that cuts values trains v and o as well (--train q,k,v,o)")
        if thin and self.rounds > 1:
            raise InputError(
                f"rounds={self.rounds}: values are cut in one round; expected rounds=1"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values; a plan file with its digest, since it may change under its name."""
        found = {**asdict(self), "settings": self.settings.to_json()}
        if self.plan:
            digest = hashlib.sha256(Path(self.plan).read_bytes()).hexdigest()
            found["plan"] = f"{self.plan} ({digest[:12]})"
        return found


def heal(healing: Healing, out: str | Path) -> dict[str, Any] | None:
    """Cut, train, judge, write; after a kill, go on with what was done (``OUT.part``).

    Args:
        healing: what to do.
        out: the folder to write: the checkpoint at full width, ``plan.json``, ``training.json``
            and a figure.

    Returns:
        ``run`` (its ``TrainingRun``), ``untrained`` (what the cut cost before, on the monitored
        and on the validation documents), ``verdict`` and ``by_position``; None in all processes but
        the first, which alone writes.

    Raises:
        InputError: see ``Healing.check``, ``load_model``, ``load_tokens``,
            ``train_virtual_width``; a folder that holds something; an unfinished run of other
            options in ``OUT.part``.
    """
    out = Path(out)
    check_free(out)
    healing.check()
    check_writable(out.absolute().parent)
    processes = Processes.here()
    part = _open_part(healing, out, processes)
    try:
        found = _heal(healing, out, part, processes)
    except GainlensError:
        if processes.first and not any(part.glob("checkpoint*")):
            shutil.rmtree(part, ignore_errors=True)  # nothing to go on from: other options may come
        raise
    return found if processes.first else None


def _heal(healing: Healing, out: Path, part: Path, processes: Processes) -> dict[str, Any]:
    bridge = load_model(healing.model, device=healing.device)
    texts = _texts(healing, bridge)
    tokenizer = getattr(bridge, "tokenizer", None)
    _cut(healing, bridge, texts["calibration"], part, processes)
    del bridge
    plan = SlicePlan.load(part / "plan.json")
    kept = part / FITTED
    maps = load_cut(kept).maps if kept.exists() else None
    model = load_hf(healing.model, device=healing.device)
    model.tokenizer = tokenizer  # the judge then compares text by the pieces that _texts compared
    way = [*(SlicePlan.load(part / WAY.format(n)) for n in range(1, healing.rounds)), plan]
    way[0] = replace(way[0], maps=maps)
    start = way[0] if len(way) == 1 else plan
    before = _untrained(model, start, texts, healing)
    trained = train_virtual_width(
        model,
        way,
        texts["training"],
        monitor=texts["monitor"],
        checkpoint=part / "checkpoint.safetensors",
        save_every=healing.save_every,
        **asdict(healing.settings),
    )
    verdict, by_position = trained.judge_by_position(
        texts["validation"], healing.margin, progress=processes.first
    )
    if processes.first:
        figure = part / FIGURE
        _draw(trained, before["monitor"], healing.margin, figure)
        facts = {
            "untrained": before,
            "verdict": verdict.to_json(),
            "by_position": by_position.to_json(),
            "model": healing.model,
            "text": healing.text,
        }
        trained.save(out, tokenizer, facts, {FIGURE: figure})
        shutil.rmtree(part)
    processes.wait()
    return {
        "run": trained,
        "untrained": before,
        "verdict": verdict,
        "by_position": by_position,
    }


def _open_part(healing: Healing, out: Path, processes: Processes) -> Path:
    """The folder of an unfinished run, made or found to be of the same options."""
    part = check_writable(out.with_name(f"{out.name}.part"))
    asked = _flat(healing)
    file = part / "options.json"
    processes.wait()
    if file.exists():
        then = read_json(file)
        for name, value in asked.items():
            if then.get(name) != value:
                raise InputError(
                    f"{part} holds an unfinished run with {name}={then.get(name)!r}, not "
                    f"{value!r}: give the same options to go on, or remove it"
                )
    elif processes.first:
        write_json(file, asked)
    processes.wait()
    return part


def _flat(healing: Healing) -> dict[str, Any]:
    found = healing.to_json()
    return {**found.pop("settings"), **found}


def _texts(healing: Healing, model: Any) -> dict[str, Texts]:
    """Four texts that share no document."""
    lengths: dict[str, Any] = {"length": healing.length}
    if healing.length is None:
        lengths = {"length": "mixed", "longest": LONGEST}

    def documents(split: Split, n_docs: Any, **more: Any) -> Texts:
        return load_texts(healing.text, model, n_docs=n_docs, split=split, **lengths, **more)

    calibration = documents("calibration", healing.n_docs + healing.monitor)
    if len(calibration) < healing.n_docs + 2:
        raise InputError(
            f"text {healing.text} has {len(calibration)} documents for calibration: expected "
            f"{healing.n_docs + 2} or more (n_docs, and 2 to be monitored)"
        )
    monitor = calibration[healing.n_docs :]
    watched = row_digests(monitor)
    training = documents("training", "all", windows="all")
    training = training.chosen(
        [i for i, row in enumerate(training) if row_digests([row]).isdisjoint(watched)]
    )
    # Short documents of two splits may open with the very same words: those do not judge.
    tokenizer = getattr(model, "tokenizer", None)
    used = document_identities([*training, *calibration], tokenizer)
    known = row_digests([*training, *calibration])
    validation = documents("validation", "all")
    unlike = [i for i, row in enumerate(validation) if row_digests([row]).isdisjoint(known)]

    def judges() -> Texts:
        return validation.chosen(unlike[: healing.judge])

    # What counts as a shared formula depends on the documents that are compared: ask again.
    while any(shared := shares_text(judges(), used, tokenizer)):
        first = zip(unlike, shared, strict=False)
        unlike = [i for i, like in first if not like] + unlike[healing.judge :]
    if len(unlike) < healing.judge:
        raise InputError(
            f"text {healing.text} has {len(unlike)} validation documents that share no text with "
            f"the others: expected {healing.judge} (judge)"
        )
    return {
        "calibration": calibration[: healing.n_docs],
        "monitor": monitor,
        "training": training,
        "validation": judges(),
    }


def _cut(healing: Healing, model: Any, tokens: Texts, part: Path, processes: Processes) -> None:
    """Plan and refit, from the options or from before the kill; all processes probe."""
    if all(processes.gathered((part / "plan.json").exists())):
        return
    gains = None
    if healing.rounds > 1 or not healing.plan:
        some = healing.rounds == 1 and healing.score == "fisher"
        gains = gather_gains(
            model,
            ranking(list(tokens)) if some else tokens,
            (healing.score,),
            progress=processes.first,
        )
    if processes.first:
        _write_cut(healing, model, tokens, part, gains)
    processes.wait()


def _write_cut(
    healing: Healing, model: Any, tokens: Texts, part: Path, gains: KeyGains | None
) -> None:
    """Plan and refit; a plan file in the place of gains."""
    given, rounds = healing.plan, healing.refit_rounds
    cut_values = healing.value_fraction
    values = None if cut_values is None else 1 - cut_values
    if given:
        plan = with_maps(SlicePlan.load(given), Path(given).parent)
        if values is not None:
            plan = plan.with_values(values)
        source = open_source(model)
        plan.check_model(source.shape, source.fingerprint, source.architecture)
    else:
        cut = best_cut(
            model,
            tokens,
            healing.fraction,
            healing.scope,
            score=healing.score,
            gains=gains,
            rounds=rounds if healing.rounds == 1 else 0,
        )
        plan = SlicePlan.from_cut(cut, values=values, fingerprint=model_fingerprint(model))
        if plan.maps is not None:
            cut.save(part / FITTED)
    if given and plan.maps is not None and healing.rounds == 1:
        fitted_cut(model, plan).save(part / FITTED)
    elif given or healing.rounds > 1:
        way = [plan]
        if healing.rounds > 1:
            assert gains is not None
            way = nested_plans(gains, plan, healing.rounds, healing.score, healing.scope)
            for number, one in enumerate(way[:-1], 1):
                one.save(part / WAY.format(number))
        maps = refitted(model, tokens, way[0], rounds=rounds).maps
        if maps is not None:
            fitted = RefitCut(way[0].mask, maps.queries, maps.keys, dict(maps.facts))
            fitted.save(part / FITTED)
    replace(plan, maps=None).save(part / "plan.json")  # last: where it lies, the cut is whole


def _untrained(
    model: Any,
    plan: SlicePlan,
    texts: dict[str, Texts],
    healing: Healing,
) -> dict[str, dict[str, Any]]:
    """What the cut costs before training, on the monitored and on the validation documents."""

    def student(plan: SlicePlan) -> Student:
        return Student(model, plan, healing.settings.train, text=texts["calibration"])

    students = {}
    if plan.frequencies is None:  # slots without their maps are no cut of their own
        students["cut"] = student(replace(plan, maps=None, facts={}))
    if plan.maps is not None:
        students["cut and refitted"] = student(plan)
    first = next(iter(students.values()))
    found: dict[str, dict[str, Any]] = {"monitor": {}, "validation": {}}
    for where, row in found.items():
        intact = first.document_losses(texts[where], intact=True)
        for name, one in students.items():
            rise = one.document_losses(texts[where]) - intact
            row[name] = rise_verdict(
                rise,
                1 - plan.fraction_kept,
                healing.margin,
                trained=False,
                domains=texts[where].domains,
                lengths=texts[where].lengths,
                groups=texts[where].groups,
            ).to_json()
    return found


def _draw(trained: TrainingRun, before: dict[str, Any], margin: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    plot_training(
        trained.curve,
        figure.subplots(),
        untrained={name: row["estimate"] for name, row in before.items()},
        margin=margin,
    )
    figure.savefig(path, dpi=120)
