"""Figures of the report. Each function draws on the axes it is given and returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gainlens.analysis.curve import SurgeryCurve
from gainlens.analysis.intervals import t_interval
from gainlens.probes.gains import KeyGains

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinct also without red-green vision.
COLOURS = {"quietest": "#0072B2", "random": "#E69F00", "loudest": "#D55E00"}
MARKERS = {"quietest": "o", "random": "s", "loudest": "^"}
LABELS = {
    "quietest": "quietest first",
    "random": "random (control)",
    "loudest": "loudest first (control)",
}


def plot_gains(gains: KeyGains, score: str = "qk", ax: Axes | None = None) -> Axes:
    """Heat map of gains, layers downwards, dimensions across; each head scaled to mean 1."""
    ax = ax or _axes(9, 4.2)
    values = gains.score(score).numpy().astype(np.float64)
    scaled = values / np.maximum(values.mean(-1, keepdims=True), 1e-30)
    image = ax.imshow(
        np.log10(np.maximum(scaled.mean(1), 1e-3)),
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    ax.set_xlabel("key dimension (index in the head)")
    ax.set_ylabel("layer")
    ax.set_title(f"Gain of each key dimension ({score}, mean over key heads)")
    _colour_bar(ax, image, "log10 of gain over the head's mean")
    return ax


def plot_surgery(
    curve: SurgeryCurve, margin: float | None = None, ax: Axes | None = None, **choice: Any
) -> Axes:
    """Rise of the loss against the share of dimensions cut, with controls and 95% intervals."""
    ax = ax or _axes(8, 4.6)
    for order, colour in COLOURS.items():
        found = curve.find(order=order, **(choice if order == "quietest" else {}))
        fractions = sorted({curve.points[i].fraction for i in found})
        if not fractions:
            continue
        rows = [
            np.mean([curve.deltas(i) for i in found if curve.points[i].fraction == f], axis=0)
            for f in fractions
        ]
        means = np.array([row.mean() for row in rows])
        bounds = np.array([t_interval(row) for row in rows])
        x = 100 * np.array(fractions)
        ax.plot(x, means, color=colour, marker=MARKERS[order], label=LABELS[order])
        if np.isfinite(bounds).all():
            ax.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.2, linewidth=0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    if margin is not None:
        ax.axhline(
            margin, color="0.2", linestyle="--", linewidth=1, label=f"margin {margin:g} nats"
        )
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_xlabel("share of key dimensions cut (%)")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_title(
        f"What cutting key dimensions costs ({curve.n_documents} documents, bands: 95% intervals)"
    )
    ax.legend()
    return ax


def _axes(width: float, height: float) -> Axes:
    from matplotlib.figure import Figure

    axes: Axes = Figure(figsize=(width, height), layout="constrained").subplots()
    return axes


def _colour_bar(ax: Axes, image: Any, label: str) -> None:
    ax.figure.colorbar(image, ax=ax, label=label)
