"""The style sheet of inline figures: for a page of its own, or inside a notebook."""

from __future__ import annotations

from gainlens.plots.markup import colours

PAGE = {
    "light": "--ink:#1a1a1a;--paper:#fff;--quiet:#595959;--line:#d0d0d0;--card:#f6f6f4",
    "dark": "--ink:#ececec;--paper:#16181b;--quiet:#b0b0b0;--line:#3a3d42;--card:#1f2226",
}
"""Text, ground and lines of both schemes, as on the report page."""

RULES = {
    ".panels": "display:grid;gap:.5rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))",
    ".panels > svg": "display:block;width:100%;height:auto",
    ".legend": "display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0;padding:0;"
    "list-style:none;font-size:.88rem",
    ".legend li": "display:inline-flex;gap:.3rem;align-items:center",
    "svg text": "fill:var(--ink);font-size:13px",
    "svg .name": "fill:var(--quiet)",
    "svg .mid": "text-anchor:middle",
    "svg .end": "text-anchor:end",
    "svg .strong": "font-weight:600",
    ".grid": "stroke:var(--line);stroke-width:.6",
    ".zero": "stroke:var(--ink);stroke-width:.9",
    ".margin": "stroke:var(--ink);stroke-width:1.2;stroke-dasharray:5 3;fill:none",
    ".mark": "stroke:currentColor;stroke-width:1.5;fill:currentColor",
    ".mark.fill": "stroke:none",
    ".line": "stroke:currentColor;stroke-width:1.6;fill:none",
    ".whisker": "stroke:currentColor;stroke-width:1.1;fill:none",
    ".whisker.ink": "color:var(--ink)",
    ".cells, .bar": "shape-rendering:crispEdges",
    ".ground": "fill:var(--card)",
    ".values rect": "width:1px;height:1px;fill:transparent",
}
"""What the classes of ``gainlens.plots.markup`` look like."""


def figure_rules() -> str:
    """The rules for a page whose own style sheet has the colours of ``PAGE``."""
    return "".join(f"{selector}{{{how}}}\n" for selector, how in RULES.items())


def notebook_style(name: str) -> str:
    """A style sheet for elements of one class, in a page that is not ours.

    Dark where JupyterLab or VS Code say that their theme is dark; the system's own preference says
    nothing about a notebook.

    Args:
        name: the class; every selector is within it.
    """
    schemes = {scheme: f"{PAGE[scheme]};{colours.variables(scheme)}" for scheme in PAGE}
    dark = f'[data-jp-theme-light="false"] .{name},.vscode-dark .{name}'
    lines = [
        f".{name}{{{schemes['light']};margin:0;max-width:100%;padding:.3rem;"
        "background:var(--paper);color:var(--ink);font:14px/1.4 system-ui,sans-serif}",
        f"{dark}{{{schemes['dark']}}}",
        f".{name} svg{{display:block;width:100%;height:auto;max-width:40rem}}",
        f".{name} .legend svg{{width:14px}}",
    ]
    for selector, how in RULES.items():
        within = ",".join(f".{name} {part.strip()}" for part in selector.split(","))
        lines.append(f"{within}{{{how}}}")
    lines += [f".{name} {rule}" for rule in colours.rules().replace("}", "}\n").split("\n") if rule]
    return "<style>" + "".join(lines) + "</style>"
