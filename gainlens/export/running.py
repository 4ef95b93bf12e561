"""Run a written folder: generate text, and score it on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gainlens.errors import InputError
from gainlens.model.context import context_of
from gainlens.model.loading import load_hf, load_tokenizer

GGUF = "model.gguf"


def open_folder(folder: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint folder, slim or not (a model name also works).

    Args:
        folder: written by ``export_model`` for any engine but llama.cpp, or by ``train``.
        device: device of the model.

    Raises:
        InputError: no model, no tokenizer, or only a GGUF file, which llama.cpp runs.
    """
    path = Path(folder)
    if path.is_dir() and (path / GGUF).is_file() and not (path / "config.json").is_file():
        raise InputError(f"folder {str(folder)!r} holds {GGUF} alone, which llama.cpp runs")
    return load_hf(str(folder), device=device), load_tokenizer(str(folder))


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Generate text after a prompt; the result does not include the prompt.

    Args:
        model, tokenizer: from ``open_folder``.
        prompt: text to continue.
        max_new_tokens: upper bound; fewer if the context ends before.
        temperature: sampling temperature; 0 takes the most likely token.
        seed: seed of sampling.

    Raises:
        InputError: an empty prompt, or one that fills the model's context.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    context = context_of(model) or 10**9
    if not ids.shape[1] or ids.shape[1] >= context:
        raise InputError(
            f"prompt has {ids.shape[1]} tokens: expected at least 1 and fewer than the context of "
            f"{context}"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, context - ids.shape[1]),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **(sampling or {"do_sample": False}),
        )
    written: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return written


def harness_scores(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Scores of lm-evaluation-harness, by task and metric.

    Args:
        model, tokenizer: from ``open_folder``.
        tasks: names that the harness knows.
        limit: examples of each task; all by default.

    Raises:
        InputError: the harness is not installed, or refuses a task.
    """
    if find_spec("lm_eval") is None:
        raise InputError("tasks of lm-evaluation-harness need: pip install lm-eval")
    harness = import_module("lm_eval")
    wrap = import_module("lm_eval.models.huggingface").HFLM
    try:
        found = harness.simple_evaluate(
            model=wrap(pretrained=model, tokenizer=tokenizer), tasks=list(tasks), limit=limit
        )
    except Exception as error:
        raise InputError(f"tasks={','.join(tasks)}: lm-eval says {error}") from error
    return {
        task: {name: float(x) for name, x in row.items() if isinstance(x, int | float)}
        for task, row in found["results"].items()
    }
