"""Figures of gains, of kept dimensions and of a verdict. Each returns the axes it drew on."""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from gainlens.plots.axes import (
    DIVERGING,
    LETTERS_PER_INCH,
    SEQUENTIAL,
    STATUS_COLOURS,
    colour_bar,
    new_axes,
    title,
    whole_numbers,
)

if TYPE_CHECKING:
    from gainlens.probes.gains import KeyGains
    from gainlens.stats.verdicts import Verdict

RANGE = 2.0
"""The colour scale is clipped at a factor of 100 from the head's mean."""


def plot_gains(gains: KeyGains, ax: Any | None = None, score: str = "qk") -> Any:
    """Heat map of gains, layers down and dimensions across; each head is scaled to mean 1.

    Args:
        gains: the gains.
        ax: matplotlib axes to draw into; new ones by default.
        score: which gain.
    """
    ax = new_axes(ax, (9, 4.2))
    values = gains.score(score).numpy().astype(np.float64)
    scaled = values / np.maximum(values.mean(-1, keepdims=True), 1e-30)
    shown = np.log10(np.maximum(scaled.mean(1), 10**-RANGE))
    width = min(RANGE, max(0.1, float(np.abs(shown).max())))
    image = ax.imshow(
        shown, aspect="auto", cmap=DIVERGING, vmin=-width, vmax=width, interpolation="nearest"
    )
    ax.set_xlabel("key dimension (index in the head)")
    ax.set_ylabel("layer")
    title(ax, f"gain of each key dimension ({score}, mean over key heads)")
    colour_bar(ax, image, "log10 of gain over the head's mean")
    return whole_numbers(ax, "x", "y")


def plot_kept(keep: Bool[np.ndarray, "layer kv_head d_head"], ax: Any | None = None) -> Any:
    """Heat map of kept dimensions: the share of a layer's key heads that keep each dimension.

    Args:
        keep: True for kept dimensions.
        ax: matplotlib axes to draw into; new ones by default.
    """
    ax = new_axes(ax, (8, 4))
    image = ax.imshow(
        keep.mean(1), aspect="auto", cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest"
    )
    ax.set_xlabel("key dimension (index in the head)")
    ax.set_ylabel("layer")
    title(ax, f"{keep.mean():.1%} of key dimensions stay")
    colour_bar(ax, image, "share of the layer's key heads that keep it")
    return whole_numbers(ax, "x", "y")


def plot_verdict(verdict: Verdict, ax: Any | None = None) -> Any:
    """The estimate with its interval, the predefined margin, and the outcome.

    Args:
        verdict: the verdict.
        ax: matplotlib axes to draw into; new ones by default.
    """
    ax = new_axes(ax, (7, 1.9))
    low, high = verdict.interval
    if math.isfinite(verdict.estimate):
        bars = [[max(0.0, verdict.estimate - low)], [max(0.0, high - verdict.estimate)]]
        ax.errorbar(
            [verdict.estimate],
            [0],
            xerr=bars if np.isfinite(bars).all() else None,
            marker="o",
            capsize=5,
            color=STATUS_COLOURS[verdict.status],
            label=f"{verdict.status}: estimate and interval",
        )
    else:
        ax.plot([], [], color=STATUS_COLOURS[verdict.status], label=f"{verdict.status}: no number")
    if math.isfinite(verdict.margin):
        ax.axvline(
            verdict.margin, color="0.2", linestyle="--", label=f"margin {verdict.margin:.4g}"
        )
    ax.set_yticks([])
    ax.set_ylim(-1, 1)
    ax.margins(x=0.15)
    documents = f" ({verdict.n_documents} documents)" if verdict.n_documents else ""
    ax.set_xlabel(_quantity(verdict.claim) + documents)
    # Wrap the title narrowly: the legend takes a third of the figure's width.
    letters = int(0.8 * LETTERS_PER_INCH * ax.figure.get_figwidth())
    ax.set_title(textwrap.fill(verdict.claim, max(16, min(60, letters))), fontsize=9)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _quantity(claim: str) -> str:
    """Name and unit of a claim's estimate, inferred from the wording of the claim."""
    if re.search(r"\bnats\b", claim):
        return "rise of the loss (nats per token)"
    return "cosine" if "cosine" in claim else "value (as the claim says)"
