"""Fill the README's tables from recorded results, so that no number is typed by hand.

python docs/fill.py            # rewrite
python docs/fill.py --check    # exit 1 if a table is stale
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def claims_table(path: Path) -> str:
    """The claims of a recorded report as Markdown."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| claim | says SmolLM2-135M | number | control |", "| --- | --- | --- | --- |"]
    for claim in facts["claims"]:
        cells = (claim["quote"], f"**{claim['status']}**", claim["number"], claim["control"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    tokens, plan = facts["tokens"], facts["plan"]
    lines.append("")
    lines.append(
        f"{plan['n_docs']} speeches of {plan['length']} tokens chose the cut "
        f"({tokens['calibration']} tokens), {plan['n_docs']} others judged it; "
        f"{facts['machine']['processor']}, {facts['machine']['cores']} cores, "
        f"{facts['seconds']:.0f} s, torch {facts['versions']['torch']}."
    )
    return "\n".join(lines)


def filled(text: str) -> str:
    """``text`` with every marked table made anew."""
    table = claims_table(ROOT / "docs/results/report_smollm2.json")
    return re.sub(
        r"(<!-- claims -->\n).*?(<!-- /claims -->)",
        lambda m: f"{m[1]}{table}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
