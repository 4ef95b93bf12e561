"""Compare reports claim by claim, from the ``report.json`` of each: one page and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gainlens.environment import environment
from gainlens.errors import InputError
from gainlens.files import locked, read_json, write_json, written_folder
from gainlens.report.build import KIND as REPORT_KIND
from gainlens.report.compare_figures import interval_figure
from gainlens.report.compare_tables import all_tables, claim_rows, claims_of, claims_table
from gainlens.report.folder import check_page_folder
from gainlens.report.page import PageTable

KIND = "gainlens-comparison"
SETTINGS = {
    "text": "text",
    "n_docs": "documents from each split",
    "length": "tokens per document",
    "score": "score that ranks the pairs",
    "seeds": "seeds of the random control",
    "refit_rounds": "rounds of the refit",
    "long_docs": "long documents of each text",
    "context": "tokens of a long document, at most",
    "across_docs": "documents that judge across texts",
    "evidence_docs": "documents for sinks, red line and sharing cost",
    "task_prompts": "prompts per task",
    "seed": "seed",
}
"""Settings of a report that change what its numbers mean."""


@dataclass(frozen=True)
class NamedReport:
    """A report that was read.

    Attributes:
        label: its model's short name, with the folder where two reports share it.
        source: the folder or file that it was read from.
        facts: content of its ``report.json``.
    """

    label: str
    source: str
    facts: Mapping[str, Any]


def compare_reports(sources: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Write a page that compares reports, and its numbers, to the folder ``out``.

    Args:
        sources: folders written by ``gainlens report``, or their ``report.json`` files.
        out: a new or empty folder, or an earlier comparison, which is replaced.

    Returns:
        The content of ``comparison.json``: ``reports``, ``differences`` (what keeps the reports
        from being compared directly, in words), ``claims`` and ``tables``.

    Raises:
        InputError: fewer than two reports, one of them twice, no report at a place, or ``out``
            contains something else.

    For the folders of two reports: ``compare_reports(["smollm2/", "gemma3/"], "comparison")``.
    """
    out = check_comparison_folder(out)
    reports = read_reports(sources)
    differing = differences(reports)
    named = [(report.label, report.facts) for report in reports]
    tables = all_tables(named)
    facts = {
        "kind": KIND,
        "reports": [_card(report) for report in reports],
        "differences": differing,
        "claims": claim_rows(named),
        "tables": [asdict(table) for table in tables],
        **environment(),
    }
    with locked(out), written_folder(out, "--out", replace=True) as beside:
        write_json(beside / "comparison.json", facts)
        page = _page(reports, differing, tables)
        (beside / "index.html").write_text(page, encoding="utf-8")
    return facts


def check_comparison_folder(out: str | Path) -> Path:
    """Check that the folder is new, empty, or an earlier comparison, which may be replaced.

    Raises:
        InputError: the folder is not writable or contains something else.
    """
    return check_page_folder(out, "comparison.json", KIND, "a comparison of reports")


def read_reports(sources: Sequence[str | Path]) -> list[NamedReport]:
    """The reports at ``sources``, each with a label of its own.

    Raises:
        InputError: see ``compare_reports``.
    """
    if len(sources) < 2:
        raise InputError(f"--compare has {len(sources)} reports: expected at least two")
    seen: dict[Path, str] = {}
    read = []
    for source in sources:
        file = Path(source).expanduser()
        if file.is_dir():
            file = file / "report.json"
        if not file.is_file():
            raise InputError(f"--compare {source} holds no report: {file} does not exist")
        if (place := file.resolve()) in seen:
            raise InputError(f"--compare names one report twice: {seen[place]} and {source}")
        seen[place] = str(source)
        facts = read_json(file)
        if not (isinstance(facts, dict) and facts.get("kind") == REPORT_KIND):
            raise InputError(f"--compare {source} holds no report: {file} is of another kind")
        if not _readable(facts):
            raise InputError(
                f"--compare {source}: {file} has no claims, model or plan: it was written by "
                "another version; run gainlens report again"
            )
        plan = facts["plan"]
        read.append((Path(str(plan.get("model", "?"))).name, file, facts))
    names = [name for name, _, _ in read]
    return [
        NamedReport(
            name if names.count(name) == 1 else f"{name} ({_place(file)})", str(file), facts
        )
        for name, file, facts in read
    ]


def differences(reports: Sequence[NamedReport]) -> list[str]:
    """What differs between the reports besides the model, a sentence each."""
    found = []
    versions = {r.label: (r.facts.get("versions") or {}).get("gainlens", "?") for r in reports}
    if len(set(versions.values())) > 1:
        found.append(f"Versions of gainlens: {_by_label(versions)}.")
    for key, words in SETTINGS.items():
        values = {r.label: _shown(r.facts["plan"].get(key, "not in this version")) for r in reports}
        if len(set(values.values())) > 1:
            found.append(f"{words[0].upper()}{words[1:]}: {_by_label(values)}.")
    weights: dict[str, list[str]] = {}
    for report in reports:
        weights.setdefault(str(report.facts["model"].get("fingerprint")), []).append(report.label)
    if len(weights) > 1:
        found.append(
            "Models: a loss is in nats per token of the model's own tokenizer, and two tokenizers "
            "cut one text into different tokens. Compare verdicts and signs before nats."
        )
    found += [
        f"{' and '.join(same)} have the same weights." for same in weights.values() if same[1:]
    ]
    quotes = {quote for r in reports for quote in claims_of(r.facts)}
    for report in reports:
        if lost := sorted(quotes - set(claims_of(report.facts))):
            found.append(f"{report.label} has no verdict on: {'; '.join(lost)}.")
    return found


def _readable(facts: Mapping[str, Any]) -> bool:
    """Whether a report has what no comparison can do without."""
    claims = facts.get("claims")
    return (
        isinstance(facts.get("plan"), dict)
        and isinstance(facts.get("model"), dict)
        and isinstance(claims, list)
        and bool(claims)
        and all(
            isinstance(claim, dict)
            and isinstance(claim.get("verdict"), dict)
            and {"quote", "status"} <= set(claim)
            for claim in claims
        )
    )


def _card(report: NamedReport) -> dict[str, Any]:
    facts = report.facts
    return {
        "label": report.label,
        "source": report.source,
        "made": facts.get("made"),
        "seconds": facts.get("seconds"),
        "model": facts["model"],
        "plan": facts["plan"],
        "intact_loss": facts.get("intact_loss"),
        "versions": facts.get("versions"),
        "machine": facts.get("machine"),
    }


def _page(
    reports: Sequence[NamedReport], differing: Sequence[str], tables: Sequence[PageTable]
) -> str:
    from jinja2 import Environment, StrictUndefined

    place = files("gainlens.report").joinpath("templates")
    source = place.joinpath("compare.html").read_text(encoding="utf-8")
    style = place.joinpath("compare.css").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    named = [(report.label, report.facts) for report in reports]
    claims = [
        {
            "quote": quote,
            "table": claims_table(quote, named),
            "figure": interval_figure(quote, named),
        }
        for quote in dict.fromkeys(q for _, facts in named for q in claims_of(facts))
    ]
    return template.render(
        labels=[report.label for report in reports],
        differences=differing,
        claims=claims,
        tables=tables,
        style=style,
    )


def _by_label(values: Mapping[str, str]) -> str:
    return "; ".join(f"{label} {value}" for label, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).replace(",", ", ")


def _place(file: Path) -> str:
    return file.parent.name if file.name == "report.json" else file.stem
