"""Figures of a surgery: damage with intervals and controls, patching, behaviours, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from gainlens.analysis.behaviours import Behaviours
    from gainlens.analysis.curve import SurgeryCurve
    from gainlens.analysis.patching import PatchEffects


def plot_surgery(curve: SurgeryCurve, ax: Any | None = None, margin: float | None = None) -> Any:
    """Rise of the loss over the fraction cut, one line per order, score and scope.

    Args:
        curve: the sweep.
        ax: matplotlib axes to draw into; new ones by default.
        margin: drawn as a dashed line, in nats per token.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in curve.table():
        # All seeds of a random control are one line, their mean.
        name = row["label"] if row["order"] == "given" else row["order"]
        groups.setdefault((str(name), row["score"], row["scope"]), []).append(row)
    for (name, score, scope), rows in groups.items():
        fractions = sorted({r["fraction"] for r in rows})
        at = [[r for r in rows if r["fraction"] == f] for f in fractions]
        mean = np.array([np.mean([r["delta"] for r in part]) for part in at])
        low = np.array([np.min([r["interval"][0] for r in part]) for part in at])
        high = np.array([np.max([r["interval"][1] for r in part]) for part in at])
        label = name if rows[0]["order"] in ("random", "given") else f"{name}, {score}, {scope}"
        ax.errorbar(
            fractions,
            mean,
            yerr=np.abs(np.stack([mean - low, high - mean])),
            marker="o",
            capsize=3,
            label=label,
        )
    ax.axhline(0, color="black", linewidth=0.8)
    if margin is not None:
        ax.axhline(margin, color="black", linestyle="--", linewidth=0.8, label=f"margin {margin:g}")
    ax.set_xlabel("share of key dimensions cut")
    ax.set_ylabel("rise of the loss (nats per token)")
    ax.set_yscale("symlog", linthresh=0.05)
    ax.legend()
    return ax


def plot_damage(
    damage: Float[np.ndarray, "layer kv_head"], ax: Any | None = None, label: str = ""
) -> Any:
    """Heat map of the rise of the loss when one layer's key head alone is cut.

    Args:
        damage: nats per token; see ``gainlens.analysis.damage.damage_by_head``.
        ax: axes to draw into.
        label: title.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    reach = max(float(np.nanmax(np.abs(damage))), 1e-12)
    image = ax.imshow(damage, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.figure.colorbar(image, ax=ax, label="rise of the loss (nats per token)")
    ax.set_xlabel("key head")
    ax.set_ylabel("layer")
    ax.set_title(label)
    return ax


def plot_scores(curve: SurgeryCurve, ax: Any | None = None, order: str = "quietest") -> Any:
    """The table of scores × scopes × fractions, each cell the rise of the loss in nats.

    Args:
        curve: a sweep over several scores or scopes.
        ax: axes to draw into.
        order: of the points shown.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    rows = [r for r in curve.table() if r["order"] == order]
    names = list(dict.fromkeys((r["score"], r["scope"]) for r in rows))
    fractions = sorted({r["fraction"] for r in rows})
    cells = np.full((len(names), len(fractions)), np.nan)
    for row in rows:
        place = names.index((row["score"], row["scope"])), fractions.index(row["fraction"])
        cells[place] = row["delta"]
    shown = np.log10(np.maximum(np.nan_to_num(cells, nan=1e-3), 1e-3))
    ax.imshow(shown, aspect="auto", cmap="viridis_r")
    for (y, x), value in np.ndenumerate(cells):
        if np.isfinite(value):
            ax.text(x, y, f"{value:.3f}", ha="center", va="center", color="white")
    ax.set_xticks(range(len(fractions)), [f"{f:.0%}" for f in fractions])
    ax.set_yticks(range(len(names)), [f"{score}, {scope}" for score, scope in names])
    ax.set_xlabel("share of key dimensions cut")
    ax.set_title("rise of the loss (nats per token)")
    return ax


def plot_patching(effects: PatchEffects, ax: Any | None = None) -> Any:
    """Heat map of patching effects: layers and key heads down, units across.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    layers, heads, units = effects.effect.shape
    table = effects.effect.reshape(layers * heads, units)
    reach = max(float(np.nanmax(np.abs(table))), 1e-12)
    image = ax.imshow(table, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
    ax.figure.colorbar(image, ax=ax, label="change of the metric")
    step = max(1, layers // 10)
    ax.set_yticks([layer * heads for layer in range(0, layers, step)], range(0, layers, step))
    ax.set_ylabel(f"layer ({heads} key heads each)")
    ax.set_xlabel(f"{effects.unit} (by its first dimension)")
    ax.set_title(f"{effects.method}: clean keys in the corrupted run")
    return ax


def plot_behaviours(result: Behaviours, axes: Any | None = None) -> Any:
    """One panel per behaviour over the fraction cut; the dashed line is chance.

    Returns:
        An array of axes.
    """
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys((r.behaviour, r.distance) for r in result.rows))
    if axes is None:
        _, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3), layout="constrained")
    axes = np.atleast_1d(axes)
    for ax, (behaviour, distance) in zip(axes, kinds, strict=True):
        rows = result.find(behaviour=behaviour, distance=distance)
        intact = [r for r in rows if r.order == "intact"]
        for name in dict.fromkeys(r.label or r.order for r in rows if r.order != "intact"):
            line = sorted(
                intact + [r for r in rows if (r.label or r.order) == name],
                key=lambda r: r.fraction,
            )
            ax.errorbar(
                [r.fraction for r in line],
                [r.value for r in line],
                yerr=[2 * r.standard_error for r in line],
                marker="o",
                capsize=3,
                label=name,
            )
        ax.axhline(rows[0].chance, color="black", linestyle="--", linewidth=0.8, label="chance")
        ax.set_title(behaviour + (f", {distance} back" if distance else ""))
        ax.set_xlabel("share cut")
    axes[0].legend()
    return axes


def _axes(ax: Any | None) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1] if ax is None else ax
