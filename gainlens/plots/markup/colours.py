"""Colours of inline figures: series and scales as style-sheet variables, light and dark.

Figures name classes (``s0`` a series, ``d3`` a step of the diverging scale, ``q3`` of the
sequential one). Only this module knows which colours they are.
"""

from __future__ import annotations

from collections.abc import Sequence

STEPS = 24
"""Scales have ``STEPS + 1`` colours; the middle one of the diverging scale is zero."""

SERIES = {
    "light": ("#0072b2", "#b8590a", "#00795a", "#a3487e", "#5b4b8a", "#555555"),
    "dark": ("#58a9e0", "#f0954a", "#3fc39a", "#e08bbd", "#b0a1ec", "#a8a8a8"),
}
"""In the order of series: blue, orange, green, pink, violet, grey (Okabe and Ito, adapted)."""

ANCHORS = {
    "light": {
        "d": ("#053061", "#4393c3", "#f4f3f1", "#d6604d", "#67001f"),
        "q": ("#f4f3f1", "#9ecae1", "#2f7fb8", "#08306b"),
    },
    "dark": {
        "d": ("#8fd0ff", "#2f76ad", "#24272b", "#b3503f", "#ffb59e"),
        "q": ("#24272b", "#1f4e79", "#3f8fc9", "#c5e6ff"),
    },
}
"""Colours that a scale passes through at equal distances; zero is the colour of the ground."""


def variables(scheme: str) -> str:
    """The declarations of all colours of figures in a scheme (``light`` or ``dark``)."""
    lines = [f"--s{i}:{colour}" for i, colour in enumerate(SERIES[scheme])]
    for name, anchors in ANCHORS[scheme].items():
        lines += [f"--{name}{i}:{colour}" for i, colour in enumerate(ramp(anchors))]
    return ";".join(lines)


def rules() -> str:
    """The rules that give classes their colours."""
    found = [f".s{i}{{color:var(--s{i})}}" for i in range(len(SERIES["light"]))]
    found += [f".{n}{i}{{fill:var(--{n}{i})}}" for n in ("d", "q") for i in range(STEPS + 1)]
    return "".join(found)


def ramp(anchors: Sequence[str]) -> list[str]:
    """``STEPS + 1`` colours through the anchors, straight in RGB."""
    parts = [[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors]
    colours = []
    for step in range(STEPS + 1):
        at = step / STEPS * (len(parts) - 1)
        low = min(int(at), len(parts) - 2)
        mixed = [
            round(a + (at - low) * (b - a)) for a, b in zip(parts[low], parts[low + 1], strict=True)
        ]
        colours.append("#" + "".join(f"{c:02x}" for c in mixed))
    return colours
