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


def cuts_table(path: Path) -> str:
    """Rise of the loss by method and share cut, from a recorded run of benchmarks/surgery.py."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| cut | how | rise of the loss (nats) | 95% interval |", "| --- | --- | --- | --- |"]
    for point in facts["points"]:
        low, high = point["interval"]
        how = point["label"].rsplit(",", 1)[0]
        lines.append(
            f"| {point['fraction']:.0%} | {how} | {point['delta']:+.3f} "
            f"| {low:+.3f} to {high:+.3f} |"
        )
    text = facts["text"]
    lines += [
        "",
        f"{text['score_documents']} calibration speeches ranked the pairs and "
        f"{text['refit_documents']} served the refit; {text['validation_documents']} other "
        f"speeches of {text['length']} tokens judged. Intact loss {facts['intact_loss']:.3f} nats.",
    ]
    return "\n".join(lines)


TABLES = {
    "claims": (claims_table, "report_smollm2.json"),
    "cuts": (cuts_table, "surgery_smollm2.json"),
}


def filled(text: str) -> str:
    """``text`` with every marked table made anew."""
    for name, (make, file) in TABLES.items():
        table = make(ROOT / "docs/results" / file)
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, table=table: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
    return text


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
