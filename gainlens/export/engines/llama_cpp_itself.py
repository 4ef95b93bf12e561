"""Run a written GGUF file in llama.cpp itself, where its Python package is installed.

llama.cpp runs in a process of its own: a file that it can't read may end that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"
PROMPT, NEW = 12, 8
TOLERANCE = {"f32": 5e-3, "f16": 5e-2, "q8_0": 2e-1}
"""Largest difference of a log-probability; products are rounded otherwise than here."""
SECONDS = 600


def installed() -> bool:
    """Whether llama.cpp can be run from this Python."""
    return find_spec(PACKAGE) is not None


def fault(file: Path, model: Any, precision: str) -> str | None:
    """What is wrong with a file when llama.cpp runs it; None if nothing is.

    Args:
        file: the GGUF file, with a vocabulary.
        model: a transformers model of the same weights.
        precision: of the file.

    Returns:
        One line: llama.cpp does not load it, or its greedy tokens have other log-probabilities.
    """
    import torch  # not above: the process that runs llama.cpp does without

    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, int(model.config.vocab_size), (PROMPT,), generator=generator).tolist()
    question = json.dumps({"file": str(file), "prompt": prompt, "new": NEW})
    command = [sys.executable, str(Path(__file__)), question]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"llama.cpp did not answer within {SECONDS} s"
    answer = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not answer[0].startswith("["):
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        return f"llama.cpp does not run it: {(said or ['it ended'])[-1].strip()[:200]}"
    steps = json.loads(answer[0])
    text = torch.tensor([prompt + [token for token, _ in steps]])
    with torch.no_grad():
        logprobs = model(text, use_cache=False).logits[0].double().log_softmax(-1)
    for n, (token, logprob) in enumerate(steps):
        ours = float(logprobs[PROMPT - 1 + n, token])
        if not abs(ours - logprob) <= TOLERANCE[precision]:
            return (
                f"llama.cpp gives token {token} the log-probability {logprob:.4f} where the slim "
                f"model gives {ours:.4f}"
            )
    return None


def answer(question: dict[str, Any]) -> list[tuple[int, float]]:
    """Greedy tokens with their log-probabilities, keys and values cached in float32."""
    import xllamacpp as xlc

    settings = xlc.CommonParams()
    settings.model.path = question["file"]
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.cache_ram_mib = 0
    settings.cache_type_k = settings.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.warmup = False
    settings.verbosity = 0
    server = xlc.Server(settings)
    found = server.handle_completions(
        {
            "prompt": question["prompt"],
            "n_predict": question["new"],
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "ignore_eos": True,
            "n_probs": 1,
        }
    )
    found = json.loads(found) if isinstance(found, str) else found
    steps = found["choices"][0]["logprobs"]["content"]
    return [(int(step["id"]), float(step["logprob"])) for step in steps]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.loads(sys.argv[1]))) + "\n")
