"""Run the tutorials and make a page of the site from each.

``python tools/docs/render_tutorials.py --run`` executes ``tutorials/*.py`` on the model named by
GAINLENS_TUTORIAL_MODEL (by default SmolLM2), keeps what each cell printed in
``docs/tutorials/outputs.json`` and its figures beside it, and writes a page per tutorial. Without
``--run`` the pages are rendered again from the kept outputs; ``--check`` only says whether they are
current. A cell that has changed since the run has no output until the next run.

Why not jupytext with a mkdocs plug-in: those run a notebook at each build, or need the outputs in
an .ipynb file. Here a build takes seconds and no model, outputs are kept as readable JSON and tied
to the exact text of their cell, each figure has words in its place, and a test fails when a cell
and its output differ. No plug-in that was looked at does all of this.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
KEPT = PAGES / "outputs.json"
ENV = "GAINLENS_TUTORIAL_MODEL"
FIGURE_DPI = 100


@dataclass(frozen=True)
class Cell:
    """One cell of a percent-format notebook.

    Attributes:
        kind: ``markdown`` or ``code``.
        source: its text; markdown without the comment signs.
        alts: words for the figures that the cell draws, from ``alt="…"`` in its first line.
    """

    kind: str
    source: str
    alts: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


def tutorials() -> list[Path]:
    return sorted(SOURCES.glob("[0-9]*.py"))


def cells(path: Path) -> list[Cell]:
    """The cells of a tutorial in order; what stands before the first is no cell."""
    found = []
    parts = re.split(r"^# %%(.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        body = body.strip("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.splitlines()]
            found.append(Cell("markdown", "\n".join(lines).strip()))
        else:
            found.append(Cell("code", body, tuple(re.findall(r'alt\d?="([^"]*)"', head))))
    return found


def execute(path: Path, figures: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run a tutorial from top to bottom; yields what each code cell left.

    Args:
        path: the tutorial.
        figures: a folder for what the cells draw; None closes figures unseen.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with contextlib.suppress(ImportError):
        import pandas

        pandas.set_option("display.width", 100, "display.max_columns", 20)
    plt.close("all")  # of whoever ran here before: figures are counted below
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in cells(path):
        if cell.kind != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = run_cell(cell.source, f"{path.name} cell {cell.key}", namespace)
        text = printed.getvalue()
        if value is not None and not is_axes(value):
            text += f"{value!r}\n"
        drawn = plt.get_fignums()
        if len(drawn) != len(cell.alts):
            raise ValueError(
                f"{path.name}: a cell draws {len(drawn)} figures and has words for "
                f"{len(cell.alts)}: {cell.source[:60]!r}"
            )
        files = []
        for number in drawn if figures is not None else ():
            count += 1
            files.append(f"figure_{count}.png")
            plt.figure(number).savefig(figures / files[-1], dpi=FIGURE_DPI)
        plt.close("all")
        yield {"key": cell.key, "text": text, "figures": files}


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def is_axes(value: Any) -> bool:
    import numpy as np
    from matplotlib.artist import Artist

    first = value.ravel()[0] if isinstance(value, np.ndarray) and value.size else value
    return isinstance(first, Artist)


def record(path: Path, model: str, busy: bool = False) -> dict[str, Any]:
    """Execute a tutorial for the site; its figures replace those of the run before.

    Args:
        path: the tutorial.
        model: what it runs on.
        busy: other work ran beside it, so that its time says little; the page says so.
    """
    from gainlens.environment import environment

    folder = PAGES / path.stem
    beside = PAGES / f".{path.stem}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    started = time.monotonic()
    found = {}
    for left in execute(path, beside):
        print(left["text"], end="", flush=True)
        found[left["key"]] = {"text": left["text"], "figures": left["figures"]}
    shutil.rmtree(folder, ignore_errors=True)
    if any(beside.iterdir()):
        os.replace(beside, folder)
    else:
        beside.rmdir()
    return {
        "model": model,
        "seconds": round(time.monotonic() - started),
        "busy": busy,
        **environment(),
        "cells": found,
    }


def page(path: Path, kept: dict[str, Any]) -> str:
    """The page of a tutorial, with the outputs that belong to its cells as they are now."""
    run = kept.get(path.stem, {})
    lines = [f"<!-- made of tutorials/{path.name} by tools/docs/render_tutorials.py -->", ""]
    for cell in cells(path):
        if cell.kind == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        left = run.get("cells", {}).get(cell.key)
        if left is None:
            continue
        if left["text"].strip():
            lines += ["```text", left["text"].rstrip(), "```", ""]
        for name, alt in zip(left["figures"], cell.alts, strict=True):
            lines += [f"![{alt}]({path.stem}/{name})", ""]
    lines += ["---", ""]
    if run:
        versions = ", ".join(f"{k} {v}" for k, v in sorted(run["versions"].items()))
        lines += [
            f"The outputs are from a run on `{run['model']}`, which took {run['seconds']} s"
            f"{' on a machine that was busy' if run.get('busy') else ''}, with {versions}."
        ]
    lines += [
        f"The source is `tutorials/{path.name}`, a notebook in jupytext's percent format. Jupyter "
        "(with jupytext), VS Code and plain Python run it as it is. "
        f"`{ENV}=tiny` selects the small model, `{ENV}=smollm2` selects SmolLM2-135M.",
        "",
    ]
    return "\n".join(lines)


def kept_outputs() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="execute before rendering")
    parser.add_argument("--check", action="store_true", help="say whether the pages are current")
    parser.add_argument("--busy", action="store_true", help="other work runs on this machine")
    parser.add_argument("only", nargs="*", help="names to run, e.g. 01_probes; by default all")
    options = parser.parse_args()
    kept = kept_outputs()
    if options.run:
        model = os.environ.setdefault(ENV, "smollm2")
        PAGES.mkdir(parents=True, exist_ok=True)
        for path in tutorials():
            if not options.only or path.stem in options.only:
                print(f"== {path.name} on {model}", flush=True)
                kept[path.stem] = record(path, model, options.busy)
                KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    stale = []
    for path in tutorials():
        target = PAGES / f"{path.stem}.md"
        wanted = page(path, kept)
        if not target.exists() or target.read_text(encoding="utf-8") != wanted:
            stale.append(target.name)
            if not options.check:
                target.write_text(wanted, encoding="utf-8")
    if options.check and stale:
        print(f"run python tools/docs/render_tutorials.py: {', '.join(stale)} not current")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
