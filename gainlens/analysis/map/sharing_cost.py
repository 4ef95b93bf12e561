"""The price of universality: the loss at equal cut with one index set for the whole model, with
one per layer, with one per head.

Every design keeps the same number of units in every head, chosen by gains: of a head its own, or
of a layer or the whole model the mean of its heads' shares. Which gain ranks best depends on the
design (a unit that few heads need dearly is lost in a mean), so several can be tried, and a text
that does not judge picks one for each design and cut.
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
from gainlens.analysis.sweep.run import document_losses
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import TextHasher
from gainlens.data.overlap import check_overlap
from gainlens.errors import InputError
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.tokens import model_batches
from gainlens.probes.gains import KeyGains
from gainlens.stats.intervals import t_interval
from gainlens.stats.verdicts import Verdict, judge

SHARING = ("model", "layer", "head")


class Bench:
    """One text on which masks are compared; the intact loss is measured once.

    Args:
        model: the model.
        tokens: the text.
        gains: what chose the masks; for ``mode="mean"`` also what is put in.
        judges: whether the text judges, and so may not have chosen.

    Raises:
        InputError: gains of another model, or a judging text that the gains were gathered on.
    """

    def __init__(
        self, model: Any, tokens: Tokens, gains: KeyGains, judges: bool, name: str = "tokens"
    ) -> None:
        if model_fingerprint(model) != gains.model.fingerprint:
            raise InputError(
                f"gains were gathered on other weights ({gains.model.architecture}) than this "
                "model's"
            )
        self.model, self.gains = model, gains
        self.documents = list(model_batches(model, tokens, TOKENS_PER_BATCH))
        hasher = TextHasher()
        for batch in self.documents:
            hasher.update(batch)
        self.text = hasher.hexdigest()
        if judges:
            check_overlap(
                self.documents,
                gains.documents,
                texts=gains.texts,
                tokenizer=getattr(model, "tokenizer", None),
                name=name,
            )
        self.n_tokens = sum(batch.numel() for batch in self.documents)
        self._intact: np.ndarray | None = None

    @property
    def intact(self) -> Float[np.ndarray, " document"]:
        """Loss of each document without a cut."""
        if self._intact is None:
            self._intact = document_losses(self.model, self.documents)
        return self._intact

    def rise(self, mask: KeyMask, mode: str = "zero") -> Float[np.ndarray, " document"]:
        """Rise of each document's loss with ``mask``, nats per token."""
        cut = document_losses(self.model, self.documents, mask, mode, self.gains)
        difference: Float[np.ndarray, " document"] = cut - self.intact
        return difference


def ranked_units(
    x: Float[np.ndarray, "layer head unit"], sharing: str
) -> Int[np.ndarray, "layer head unit"]:
    """Units from loudest to quietest as each head sees them under a design of sharing."""
    total = x.sum(-1, keepdims=True)
    share = np.divide(x, total, out=np.zeros_like(x), where=total > 0)
    if sharing == "model":
        share = np.broadcast_to(share.mean((0, 1), keepdims=True), x.shape)
    elif sharing == "layer":
        share = np.broadcast_to(share.mean(1, keepdims=True), x.shape)
    elif sharing != "head":
        raise InputError(f"sharing={sharing!r} is not one of {', '.join(SHARING)}")
    return np.argsort(-share, axis=-1, kind="stable")


def unit_mask(
    keep: Bool[np.ndarray, "layer head unit"], units: Units, d_head: int, **facts: Any
) -> KeyMask:
    """The mask that keeps the given units; dimensions in no unit stay."""
    mask = torch.ones(*keep.shape[:2], d_head, dtype=torch.bool)
    for u, dims in enumerate(units.dims):
        mask[..., list(dims)] = torch.from_numpy(keep[..., u])[..., None].expand(-1, -1, len(dims))
    return KeyMask(mask, facts)


def shared_mask(
    x: Float[np.ndarray, "layer head unit"], units: Units, d_head: int, kept: int, sharing: str
) -> KeyMask:
    """Keep the ``kept`` loudest units of every head under a design of sharing."""
    keep = np.zeros(x.shape, dtype=bool)
    np.put_along_axis(keep, ranked_units(x, sharing)[..., :kept], True, -1)
    return unit_mask(keep, units, d_head, sharing=sharing, kept=kept)


@dataclass(frozen=True, eq=False)
class Price:
    """Losses of the three designs at equal cuts.

    Attributes:
        rows: per design (``model``, ``layer``, ``head``, ``random model``) and fraction the rise
            of the loss in nats per token with its interval, and the score that ranked.
        rises: rise per document, ``[row, document]``.
        intact: loss of each document without a cut.
        tried: rise on the choosing text of every score, where several were tried.
        n_units, n_tokens: units per head; length of the text.
        text: its fingerprint.
    """

    rows: list[dict[str, Any]]
    rises: Float[np.ndarray, "row document"]
    intact: Float[np.ndarray, " document"]
    tried: list[dict[str, Any]]
    n_units: int
    n_tokens: int
    text: str

    def __repr__(self) -> str:
        shown = ", ".join(f"{r['sharing']} {r['cut']:.0%}: {r['rise']:+.3f}" for r in self.rows)
        return f"Price({shown}; nats, {len(self.intact)} documents)"

    @property
    def fractions(self) -> tuple[float, ...]:
        """Cuts that were measured."""
        return tuple(sorted({r["cut"] for r in self.rows}))

    def difference(
        self, cut: float, a: str = "model", b: str = "head"
    ) -> tuple[float, tuple[float, float]]:
        """Mean and 95% interval of the paired difference in loss of designs ``a`` and ``b``."""
        difference = self._differences(cut, a, b)
        return float(difference.mean()), t_interval(difference)

    def _differences(self, cut: float, a: str, b: str) -> Float[np.ndarray, " document"]:
        found = []
        for name in (a, b):
            at = [i for i, r in enumerate(self.rows) if r["sharing"] == name and r["cut"] == cut]
            if not at:
                raise InputError(
                    f"sharing={name!r} at cut={cut!r} was not measured; have {self.fractions}"
                )
            found.append(self.rises[at].mean(0))
        difference: Float[np.ndarray, " document"] = found[0] - found[1]
        return difference

    def verdict(self, margin: float = 0.05, cut: float | None = None) -> Verdict:
        """ "One index set for all layers costs less than ``margin`` nats more than one per head".

        Args:
            margin: nats per token, above 0.
            cut: a measured fraction; by default the one nearest to a half.
        """
        at = min(self.fractions, key=lambda f: abs(f - 0.5)) if cut is None else cut
        own, shared = (
            next(r for r in self.rows if r["sharing"] == name and r["cut"] == at)
            for name in ("head", "model")
        )
        return judge(
            f"at {at:.0%} cut one index set for the whole model costs less than {margin:g} nats "
            "more than one per head",
            self._differences(at, "model", "head"),
            margin,
            note=f"per head {own['rise']:+.3f} nats (ranked by {own['score']}), shared "
            f"{shared['rise']:+.3f} ({shared['score']})",
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
                {"cut": cut, "a": a, "b": b, "mean": mean, "interval": list(interval)}
                for cut in self.fractions
                for a, b in (("model", "head"), ("model", "layer"), ("layer", "head"))
                for mean, interval in [self.difference(cut, a, b)]
            ],
        }


def price_of_universality(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fractions: Sequence[float] = (0.25, 0.5),
    *,
    score: str | Sequence[str] = "qk",
    choose: Tokens | None = None,
    seeds: Sequence[int] = (0,),
    mode: str = "zero",
    progress: bool = True,
) -> Price:
    """Cut the same number of units everywhere, with sets shared ever more widely.

    Args:
        model: the model.
        tokens: validation text, other than what the gains were gathered on.
        gains: what ranks the units.
        fractions: shares of the units to cut, between 0 and 1.
        score: which gain ranks, or several of which ``choose`` picks.
        choose: calibration or training text; needed with several scores.
        seeds: of random shared sets, the control.
        mode: of the ablation.
        progress: show a progress bar.

    Raises:
        InputError: a fraction that cuts nothing or everything, gains of another model, text that
            chose, several scores without a text to choose by.
    """
    names = (score,) if isinstance(score, str) else tuple(score)
    if len(names) > 1 and choose is None:
        raise InputError(f"score={names!r} names several: expected choose=… to pick one by")
    values = {name: unit_gains(gains, name, "rotated")[0] for name in names}
    units = unit_gains(gains, names[0], "rotated")[1]
    cuts = [(f, _kept(f, len(units))) for f in fractions]
    bench = Bench(model, tokens, gains, judges=True)
    chooser = (
        Bench(model, choose, gains, judges=False) if len(names) > 1 and choose is not None else None
    )
    if chooser is not None and chooser.text == bench.text:
        raise InputError("choose is the text that judges: expected other documents")
    runs = len(cuts) * (len(SHARING) * (1 + len(names) * (chooser is not None)) + len(seeds))
    rows: list[dict[str, Any]] = []
    rises, tried = [], []

    def measure(mask: KeyMask, fraction: float, kept: int, **facts: Any) -> None:
        rise = bench.rise(mask, mode)
        rises.append(rise)
        rows.append(
            {
                **facts,
                "cut": float(fraction),
                "kept": kept,
                "rise": float(rise.mean()),
                "interval": list(t_interval(rise)),
            }
        )

    with tqdm(total=runs, desc="price", unit="run", disable=not progress) as bar:
        for fraction, kept in cuts:
            for sharing in SHARING:
                masks = {
                    name: shared_mask(x, units, gains.shape[-1], kept, sharing)
                    for name, x in values.items()
                }
                best = names[0]
                if chooser is not None:
                    means = {}
                    for name, mask in masks.items():
                        means[name] = float(chooser.rise(mask, mode).mean())
                        bar.update()
                    best = min(means, key=lambda name: means[name])
                    tried.append({"sharing": sharing, "cut": float(fraction), "rises": means})
                measure(masks[best], fraction, kept, sharing=sharing, score=best, seed=None)
                bar.update()
            for seed in seeds:
                noise = np.random.default_rng(seed).random(len(units))
                drawn = np.broadcast_to(noise, values[names[0]].shape).copy()
                mask = shared_mask(drawn, units, gains.shape[-1], kept, "model")
                measure(mask, fraction, kept, sharing="random model", score="random", seed=seed)
                bar.update()
    return Price(rows, np.stack(rises), bench.intact, tried, len(units), bench.n_tokens, bench.text)


def _kept(fraction: float, n_units: int) -> int:
    kept = n_units - round(fraction * n_units) if 0 < fraction < 1 else 0
    if not 0 < kept < n_units:
        raise InputError(
            f"fraction={fraction!r} cuts none or all of {n_units} units: expected between "
            f"{1 / n_units:.3f} and {1 - 1 / n_units:.3f}"
        )
    return kept
