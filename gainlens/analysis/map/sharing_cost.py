"""The cost of sharing: the loss at equal cuts with one index set for all layers and heads, one per
layer, or one per head.

Every scope keeps the same number of units in every head, ranked by the gains of the head, or by the
mean of the heads' shares over the layer or the model. Which gain ranks best depends on the scope (a
mean hides a unit that is essential to few heads), so several can be tried. The best for each scope
and fraction is then chosen on text that is not used for the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.key_mask import KeyMask
from gainlens.analysis.map.units import Units, unit_gains
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.sweep.judging_text import text_that_chooses, text_that_judges
from gainlens.data.batches import Tokens
from gainlens.errors import InputError
from gainlens.probes.gains import KeyGains
from gainlens.stats.intervals import t_interval
from gainlens.stats.verdicts import MARGIN, Verdict, judge

SCOPES = ("universal", "layer", "head")


def ranked_units(
    x: Float[np.ndarray, "layer head unit"], scope: str
) -> Int[np.ndarray, "layer head unit"]:
    """Units of each head from loudest to quietest under a scope."""
    total = x.sum(-1, keepdims=True)
    share = np.divide(x, total, out=np.zeros_like(x), where=total > 0)
    if scope == "universal":
        share = np.broadcast_to(share.mean((0, 1), keepdims=True), x.shape)
    elif scope == "layer":
        share = np.broadcast_to(share.mean(1, keepdims=True), x.shape)
    elif scope != "head":
        raise InputError(f"scope={scope!r} is not one of {', '.join(SCOPES)}")
    return np.argsort(-share, axis=-1, kind="stable")


def unit_mask(
    keep: Bool[np.ndarray, "layer head unit"], units: Units, d_head: int, **facts: Any
) -> KeyMask:
    """The mask that keeps the given units; dimensions outside all units are kept."""
    mask = torch.ones(*keep.shape[:2], d_head, dtype=torch.bool)
    for u, dims in enumerate(units.dims):
        mask[..., list(dims)] = torch.from_numpy(keep[..., u])[..., None].expand(-1, -1, len(dims))
    return KeyMask(mask, facts)


def shared_mask(
    x: Float[np.ndarray, "layer head unit"], units: Units, d_head: int, kept: int, scope: str
) -> KeyMask:
    """Keep the ``kept`` loudest units of every head under a scope."""
    keep = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(keep, ranked_units(x, scope)[..., :kept], True, -1)
    return unit_mask(keep, units, d_head, scope=scope, kept=kept)


@dataclass(frozen=True, eq=False)
class SharingCost:
    """Losses of the three scopes at equal cuts.

    Attributes:
        rows: per scope (``universal``, ``layer``, ``head``) and fraction the rise of the loss in
            nats per token, its interval and the score used. Rows with ``order`` ``random`` are
            the control: universal sets drawn at random.
        rises: rise per document, ``[row, document]``.
        intact: loss of each document without a cut.
        tried: rise of every score on the ``choose`` text, if several were tried.
        n_units, n_tokens: units per head; size of the text.
        text: fingerprint of the text.
    """

    rows: list[dict[str, Any]]
    rises: Float[np.ndarray, "row document"]
    intact: Float[np.ndarray, " document"]
    tried: list[dict[str, Any]]
    n_units: int
    n_tokens: int
    text: str

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{'random ' if r['order'] == 'random' else ''}{r['scope']} {r['fraction']:.0%}: "
            f"{r['rise']:+.3f}"
            for r in self.rows
        )
        return f"SharingCost({shown}; nats, {len(self.intact)} documents)"

    @property
    def fractions(self) -> tuple[float, ...]:
        """The measured shares cut."""
        return tuple(sorted({r["fraction"] for r in self.rows}))

    def row(self, scope: str, fraction: float) -> int:
        """The row index of a scope at a fraction.

        Raises:
            InputError: this combination was not measured.
        """
        for i, r in enumerate(self.rows):
            if (r["scope"], r["order"], r["fraction"]) == (scope, "quietest", fraction):
                return i
        raise InputError(
            f"scope={scope!r} at fraction={fraction!r} was not measured: expected one of "
            f"{', '.join(SCOPES)} at {self.fractions}"
        )

    def difference(
        self, fraction: float, a: str = "universal", b: str = "head"
    ) -> tuple[float, tuple[float, float]]:
        """Mean and 95% interval of the paired loss difference between scopes ``a`` and ``b``."""
        difference = self.differences(fraction, a, b)
        return float(difference.mean()), t_interval(difference)

    def differences(
        self, fraction: float, a: str = "universal", b: str = "head"
    ) -> Float[np.ndarray, " document"]:
        """Loss of scope ``a`` minus that of scope ``b`` on each document, nats per token."""
        found: Float[np.ndarray, " document"] = (
            self.rises[self.row(a, fraction)] - self.rises[self.row(b, fraction)]
        )
        return found

    def verdict(self, margin: float = MARGIN, fraction: float | None = None) -> Verdict:
        """ "One index set for all layers costs less than ``margin`` nats more than one per head".

        Args:
            margin: nats per token, above 0.
            fraction: a measured share cut; by default the one nearest to 0.5.
        """
        at = min(self.fractions, key=lambda f: abs(f - 0.5)) if fraction is None else fraction
        own, universal = (self.rows[self.row(scope, at)] for scope in ("head", "universal"))
        return judge(
            f"at {at:.0%} cut one index set for all layers and heads costs less than {margin:g} "
            "nats more than one per head",
            self.differences(at),
            margin,
            note=f"per head {own['rise']:+.3f} nats (ranked by {own['score']}), universal "
            f"{universal['rise']:+.3f} ({universal['score']})",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "tried": self.tried,
            "n_units": self.n_units,
            "n_documents": len(self.intact),
            "n_tokens": self.n_tokens,
            "text": self.text,
            "intact_loss": float(self.intact.mean()),
            "rows": self.rows,
            "differences": [
                {"fraction": f, "a": a, "b": b, "mean": mean, "interval": list(interval)}
                for f in self.fractions
                for a, b in (("universal", "head"), ("universal", "layer"), ("layer", "head"))
                for mean, interval in [self.difference(f, a, b)]
            ],
        }


def cost_of_sharing(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fractions: Sequence[float] = (0.25, 0.5),
    *,
    score: str | Sequence[str] = "qk",
    choose: Tokens | None = None,
    seeds: Sequence[int] = (0,),
    mode: str = "zero",
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> SharingCost:
    """Cut the same number of units in every head, with sets per head, per layer or for all heads.

    Args:
        model: the model.
        tokens: validation text, different from the text for the gains.
        gains: the gains that rank the units.
        fractions: shares of the units to cut, between 0 and 1.
        score: which gain ranks the units. If several are given, the best on ``choose`` is used.
        choose: calibration or training text; needed with several scores.
        seeds: seeds of random universal sets, the control.
        mode: ablation mode.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar.

    Raises:
        InputError: a fraction that cuts nothing or everything, gains of another model, text that
            was already used for a choice, or several scores without ``choose``.
    """
    names = (score,) if isinstance(score, str) else tuple(score)
    if len(names) > 1 and choose is None:
        raise InputError(f"score={names!r} names several scores: expected choose=… to select one")
    values = {name: unit_gains(gains, name, "rotated")[0] for name in names}
    units = unit_gains(gains, names[0], "rotated")[1]
    cuts = [(f, _kept(f, len(units))) for f in fractions]
    evaluator = evaluator_of(model, evaluator)
    judge = text_that_judges(evaluator, tokens, gains)
    chooser = None
    if len(names) > 1 and choose is not None:
        chooser = text_that_chooses(evaluator, choose, judge)
    runs = len(cuts) * (len(SCOPES) * (1 + len(names) * (chooser is not None)) + len(seeds))
    rows: list[dict[str, Any]] = []
    rises, tried = [], []

    def measure(mask: KeyMask, fraction: float, kept: int, **facts: Any) -> None:
        rise = judge.rise(mask.in_mode(mode, gains=gains))
        rises.append(rise)
        rows.append(
            {
                **facts,
                "fraction": float(fraction),
                "kept": kept,
                "rise": float(rise.mean()),
                "interval": list(t_interval(rise)),
            }
        )

    with tqdm(total=runs, desc="sharing cost", unit="run", disable=not progress) as bar:
        for fraction, kept in cuts:
            for scope in SCOPES:
                masks = {
                    name: shared_mask(x, units, gains.shape[-1], kept, scope)
                    for name, x in values.items()
                }
                best = names[0]
                if chooser is not None:
                    means = {}
                    for name, mask in masks.items():
                        means[name] = float(chooser.rise(mask.in_mode(mode, gains=gains)).mean())
                        bar.update()
                    best = min(means, key=lambda name: means[name])
                    tried.append({"scope": scope, "fraction": float(fraction), "rises": means})
                measure(
                    masks[best], fraction, kept,
                    scope=scope, order="quietest", score=best, seed=None,
                )  # fmt: skip
                bar.update()
            for seed in seeds:
                noise = np.random.default_rng(seed).random(len(units))
                drawn = np.broadcast_to(noise, values[names[0]].shape).copy()
                mask = shared_mask(drawn, units, gains.shape[-1], kept, "universal")
                measure(
                    mask, fraction, kept,
                    scope="universal", order="random", score="random", seed=seed,
                )  # fmt: skip
                bar.update()
    return SharingCost(
        rows, np.stack(rises), judge.intact, tried, len(units), judge.n_tokens, judge.text
    )


def _kept(fraction: float, n_units: int) -> int:
    kept = n_units - round(fraction * n_units) if 0 < fraction < 1 else 0
    if not 0 < kept < n_units:
        raise InputError(
            f"fraction={fraction!r} cuts none or all of {n_units} units: expected between "
            f"{1 / n_units:.3f} and {1 - 1 / n_units:.3f}"
        )
    return kept
