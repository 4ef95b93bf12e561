"""The model card of an exported folder: what was cut, what it saves, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gainlens.environment import environment
from gainlens.export.after_norm import map_weights
from gainlens.export.engines import Engine
from gainlens.export.family import WHOLE
from gainlens.export.modeling import family_of, plan_of, plan_pairs
from gainlens.model.stored_weights import counted
from gainlens.stats.verdicts import Verdict

CARD = "README.md"
LOADING = {
    "gainlens": (
        "python",
        "import gainlens\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        "# or without the import, with gainlens installed (pip install gainlens):\n"
        'model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)\n\n'
        "# in vLLM, with gainlens' plug-in installed (plugins/vllm): vllm serve {folder}",
    ),
    "transformers": (
        "python",
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{folder}")',
    ),
    "vllm": ("sh", "vllm serve {folder}"),
    "llama.cpp": ("sh", "llama-server -m {folder}/model.gguf"),
}
"""Language and code, by engine."""
IDENTITIES = ("documents", "texts", "text", "fingerprint", "monitor")
"""Facts of a plan that are hashes: they are for programs, and stay in the plan's own file."""
NOT_MEASURED = (
    "None was given when this folder was written, so nothing is claimed about its quality: "
    "`curve.verdict(fraction, margin)` of `gainlens.surgery`, or the run of "
    "`gainlens.train_virtual_width`, gives one."
)


def write_card(
    folder: Path,
    slim: Any,
    engine: Engine,
    precision: str,
    *,
    name: str,
    tokenizer: bool,
    verdict: Verdict | None,
    command: str | None,
) -> None:
    """Write ``README.md``.

    Args:
        folder: that holds the checkpoint.
        slim: the slim model that was exported.
        engine: the engine that wrote it.
        precision: format of the weights.
        name: final name of the folder.
        tokenizer: whether the folder has a tokenizer.
        verdict: verdict on the cost of the cut.
        command: the command that made the folder; by default the call of ``export_model``.
    """
    config, plan = slim.config, plan_of(slim.config)
    family = family_of(config)
    n_layers, n_kv_heads, d_head = plan.shape
    widths = plan.key_widths(plan_pairs(family, config, plan))
    values = plan.value_widths or (d_head,) * n_layers
    before = 2 * n_layers * n_kv_heads * d_head * 2
    after = (sum(widths) + sum(values)) * n_kv_heads * 2
    rows = [
        ("original", f"{family.model_class}, weights `{(plan.fingerprint or 'unknown')[:12]}`"),
        ("key dimensions kept", f"{plan.fraction_kept:.1%} ({_span(widths)} of {d_head} per head)"),
        ("value dimensions kept", f"{_span(values)} of {d_head} per head"),
        ("parameters", f"{sum(p.numel() for p in counted(slim)):,}"),
        (
            "cache in half precision",
            f"{before:,} to {after:,} bytes per token ({after / before:.3g})",
        ),
        ("weights", precision),
        ("tokenizer", "beside" if tokenizer else "none: take the original's"),
    ]
    alone = family.saves(config) == "cache alone"
    rows.append(("thin keys save", f"the cache alone: {WHOLE}" if alone else "weights and cache"))
    if added := map_weights(slim):
        rows.append(("maps of queries and keys", f"{added:,} weights, after the norm"))
    language, code = LOADING[engine.name]
    call = command or f'gainlens.export_model(slim, "{name}", engine="{engine.name}")'
    facts = [
        f"- {key}: {_plain(value)}"
        for key, value in sorted(plan.facts.items())
        if key not in IDENTITIES
    ]
    limits = [f"- {note}" for note in engine.notes(slim)]
    version = environment()["versions"]["gainlens"]
    sections = [
        f"---\nlibrary_name: {'gainlens' if engine.name == 'gainlens' else 'transformers'}\n"
        "pipeline_tag: text-generation\ntags:\n- gainlens\n---",
        f"# {name}",
        f"A language model whose attention keys were made narrower by gainlens {version}, for "
        f"{engine.name}.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]),
        "## How it was chosen\n\n" + ("\n".join(facts) or "The plan carries no facts."),
        "## What it costs\n\n" + (NOT_MEASURED if verdict is None else _verdict(verdict)),
        f"## Loading\n\n```{language}\n{code.format(folder=name)}\n```",
        *(["## Limits\n\n" + "\n".join(limits)] if limits else []),
        f"## Made by\n\n```\n{call}\n```",
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _verdict(verdict: Verdict) -> str:
    low, high = verdict.interval
    note = f" {verdict.note}" if verdict.note else ""
    return (
        f'The claim "{verdict.claim}" {verdict.status}: {verdict.estimate:.4g} '
        f"[{low:.4g}, {high:.4g}] against a margin of {verdict.margin:.4g}, on "
        f"{verdict.n_documents} documents.{note}"
    )


def _span(widths: tuple[int, ...]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _plain(value: Any) -> str:
    """Any value as one line of text."""
    if isinstance(value, dict):
        told = {k: v for k, v in value.items() if k not in IDENTITIES and v is not None}
        text = "; ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in told.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(_plain(v) for v in value)
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 300 else text[:297] + "..."
