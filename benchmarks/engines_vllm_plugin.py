"""Slim folders in stock vLLM with the plug-in of ``plugins/vllm``, against gainlens' own engine.

``make engines`` makes vLLM's environment, installs the plug-in into it and runs this. Prompts of
different lengths, half of them with a common opening, go to vLLM all at once: continuous batching,
prefix caching and chunked prefill are on. Greedy tokens and their log-probabilities are compared
with ``generate`` of the same folder, one prompt at a time. Exit status 1 when they differ by more
than the target. Writes ``docs/results/engines_vllm_plugin.json``; rows that are not asked for keep
what an earlier run recorded.

On a machine with a GPU, ``--python`` names an environment with vLLM for CUDA and the plug-in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from engines import compare, transformers_rows
from engines_vllm_http import one_completion

import gainlens as gl
from gainlens.data.document_identity import text_fingerprint
from gainlens.environment import environment
from gainlens.export.modeling import family_of, plan_rotary_dim
from gainlens.files import write_json
from gainlens.model.loading import load_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "plugins/vllm"), str(ROOT / "tests/export")]

from gainlens_vllm.families import REFUSED  # noqa: E402
from gainlens_vllm.plan import read_plan  # noqa: E402
from gainlens_vllm.widths import equal_widths, thin_widths  # noqa: E402
from slim_families import CONFIGS, SMALL, random_keep, random_model, shape_of  # noqa: E402

LOGPROB_TARGET = 1e-3
CUT = Path.home() / ".cache/gainlens/slots/universal-50_32_2.safetensors"
GPU = "python benchmarks/engines_vllm_plugin.py --python ENV/bin/python --out gpu.json"
NOT_RUN = {
    "thin keys on a GPU, rows layer and slots": f"{GPU} --rows layer slots",
    "every family on a GPU": f"{GPU} --rows families",
    "two GPUs": f"{GPU} --rows parallel",
    "torch.compile and CUDA graphs at full size": "vllm serve FOLDER",
}
SETTINGS = {
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 64,
    "block_size": 32,
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--cut", type=Path, default=CUT, help="a cut with slots")
    parser.add_argument("--gains", type=Path, help="fisher gains at hand; else 16 × 256 tokens")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--python", type=Path, default=ROOT / ".engines/vllm/bin/python")
    parser.add_argument("--work", type=Path, default=ROOT / ".engines/work/vllm-plugin")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/engines_vllm_plugin.json")
    return parser.parse_args()


def main() -> int:
    """Run the rows, write the record."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text())["rows"] if args.out.is_file() else {}
    for name in args.rows:
        done[name] = ROWS[name](args)
        prompts = prompts_of(args)
        write_json(
            args.out,
            {
                "what": "slim folders of gainlens in vLLM with the plug-in, float32",
                "model": args.model,
                "text": {
                    "name": args.text,
                    "split": "validation",
                    "prompts": len(prompts),
                    "lengths": [len(p) for p in prompts],
                    "fingerprint": text_fingerprint(torch.cat(prompts)[None]),
                },
                "new_tokens": args.new,
                "settings": SETTINGS,
                "targets": {"logprob": LOGPROB_TARGET, "greedy": "the same tokens"},
                "reference": "generate of the same folder in gainlens' own engine",
                "rows": {row: done[row] for row in ROWS if row in done},
                "not_run": {
                    "why": "no GPU on this machine; ENV has vllm for CUDA and plugins/vllm",
                    "commands": NOT_RUN,
                },
                "seed": 0,
                **environment(),
            },
        )
        print(name, json.dumps(done[name], indent=1))
    failed = [name for name in args.rows if not done[name]["passed"]]
    if failed:
        print("differs from gainlens' own engine: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


def prompts_of(args: argparse.Namespace) -> list[torch.Tensor]:
    """Held-out prompts of 32 to 152 tokens; every second one opens with the same 96 tokens."""
    model = gl.load_model(args.model)
    tokens = gl.load_tokens(
        args.text, model, n_docs=args.prompts + 1, length=160, split="validation"
    )
    opening, rows = tokens[0, :96], tokens[1:]
    prompts = []
    for number, row in enumerate(rows):
        own = row[: 24 + (number * 37) % 131] if number % 2 else row[: 8 + number]
        prompts.append(own if number % 2 else torch.cat([opening, own]))
    return prompts


def layer(args: argparse.Namespace) -> dict[str, Any]:
    """Half of the pairs of each layer, heads with sets of their own; values full."""
    model = gl.load_model(args.model)
    if args.gains is not None:
        gains = gl.KeyGains.load(args.gains)
    else:
        calibration = gl.load_tokens(args.text, model, n_docs=16, length=256, split="calibration")
        gains = gl.probe_gains(model, calibration, scores=("fisher",), progress=False)
    mask = gl.KeyMask.quietest(gains, 0.5, "fisher", "layer")
    return measured(args, "layer", gl.slim(model, mask))


def slots(args: argparse.Namespace) -> dict[str, Any]:
    """One set of slots for all heads, whose frequencies are the plan's."""
    if not args.cut.is_file():
        return {"passed": False, "not_run": f"no cut at {args.cut}: benchmarks/slots.py fits one"}
    model = gl.load_model(args.model)
    return measured(args, "slots", gl.slim(model, gl.load_cut(args.cut)))


def measured(args: argparse.Namespace, name: str, slim: Any) -> dict[str, Any]:
    """Export, serve, compare."""
    folder = exported(args, name, slim, load_tokenizer(args.model))
    prompts = prompts_of(args)
    expected = expected_rows(folder, prompts, args.new)
    answer = run(args, "engines_vllm.py", job(folder, prompts, args.new, SETTINGS))
    return {
        **compared(expected, answer),
        "prompts_with_cached_opening": sum(bool(r["cached_tokens"]) for r in answer["rows"]),
        "cached_tokens": sum(r["cached_tokens"] for r in answer["rows"]),
        **widths(slim),
    }


def widths(slim: Any) -> dict[str, Any]:
    """Widths of the folder's heads, and the share of the cache that each device keeps."""
    config, family = slim.config, family_of(slim.config)
    shape = (int(config.num_hidden_layers), family.n_kv_heads(config), family.d_head(config))
    stored = json.loads(json.dumps(config.gainlens))
    rotary = plan_rotary_dim(family, config, gl.export.plan_of(config))
    plan = read_plan(stored, shape, rotary)
    cpu, gpu = equal_widths(plan, shape[2], (32, 64, 80, 96, 112, 128)), thin_widths(plan, shape[2])
    return {
        "key_widths": sorted({x.key_width for x in plan.layers}),
        "value_widths": sorted({x.value_width for x in plan.layers}),
        "cache_share_cpu": cpu.share,
        "cache_share_gpu": gpu.share,
        "gpu_key_widths": sorted(set(gpu.keys)),
    }


def families(args: argparse.Namespace) -> dict[str, Any]:
    """Every family with random weights and heads that keep sets of different sizes."""
    jobs, expected = [], {}
    refused = {config_class for config_class, _ in REFUSED.values()}
    for name, (make, rotary) in CONFIGS.items():
        if type(make()).__name__ in refused:
            continue
        folder, prompts = small(args, name, random_model(name), rotary)
        expected[name] = expected_rows(folder, prompts, 16)
        jobs.append(job(folder, prompts, 16, {**SETTINGS, "max_num_batched_tokens": 16}))
    answers = run(args, "engines_vllm.py", {"jobs": jobs})["answers"]
    rows = {n: compared(expected[n], a) for n, a in zip(expected, answers, strict=True)}
    return {"passed": all(r["passed"] for r in rows.values()), "families": rows}


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """A small Llama compiled by ``torch.compile``, which is vLLM's default."""
    folder, prompts = small(args, "compiled", random_model("llama"), CONFIGS["llama"][1])
    asked = job(folder, prompts, 16, {**SETTINGS, "enforce_eager": False})
    answer = run(args, "engines_vllm.py", asked)
    return compared(expected_rows(folder, prompts, 16), answer)


def small(
    args: argparse.Namespace, name: str, model: Any, rotary: int
) -> tuple[Path, list[torch.Tensor]]:
    """A random model's folder and eight prompts."""
    keep = random_keep(shape_of(model), rotary)
    folder = exported(args, name, gl.slim(model, gl.KeyMask(keep)), None)
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 9, 14, 20, 33, 40, 7, 3)
    return folder, [torch.randint(3, 96, (n,), generator=generator) for n in lengths]


def parallel(args: argparse.Namespace) -> dict[str, Any]:
    """Two ranks: key heads divided (two of them) and on both ranks (one)."""
    two = transformers.LlamaConfig(**SMALL, head_dim=16)
    one = transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=16)
    rows = {}
    for name, config in (("divided", two), ("replicated", one)):
        folder, prompts = small(args, f"parallel-{name}", wide(config), 16)
        asked = job(folder, prompts, 16, {"tensor_parallel_size": 2})
        more = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        answer = run(args, "engines_vllm.py", asked, more)
        rows[name] = compared(expected_rows(folder, prompts, 16), answer)
    return {"passed": all(r["passed"] for r in rows.values()), "tensor_parallel_size": 2, **rows}


def wide(config: Any) -> Any:
    """A model whose logits depend on its keys: weights much wider than at initialisation."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model


def triton(args: argparse.Namespace) -> dict[str, Any]:
    """The GPU attention in Triton's interpreter and compiled for a GPU, on no GPU."""
    interpreted, off = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}
    found = run(args, "engines_vllm_triton.py", {}, interpreted)
    plain = transformers.LlamaConfig(**SMALL, head_dim=64)
    windows = transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=64,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    result: dict[str, Any] = {**found, **run(args, "engines_vllm_triton.py", {}, off)}
    result["engines"] = {
        "llama": in_the_interpreter(args, "triton-llama", plain),
        "gemma3, layers with and without a window": in_the_interpreter(args, "triton", windows),
    }
    rows = [*found["kernels"], found["grouped"], found["window"]]
    result["largest_error"] = max(e for row in rows for e in row["errors"].values())
    result["passed"] = result["largest_error"] <= 1e-5 and all(
        row["passed"] for row in result["engines"].values()
    )
    return result


def in_the_interpreter(args: argparse.Namespace, name: str, config: Any) -> dict[str, Any]:
    """A whole engine whose layers cache keys of 16, 40 and 24 dimensions, values of 64."""
    model = wide(config)
    keep = torch.zeros(3, 2, 64, dtype=torch.bool)
    for number, pairs in enumerate((8, 20, 12)):
        keep[number, :, :pairs] = keep[number, :, 32 : 32 + pairs] = True
    folder = exported(args, name, gl.slim(model, gl.KeyMask(keep)), None)
    prompts = [torch.arange(3, 3 + n) for n in (21, 4)]
    asked = {**SETTINGS, "max_num_batched_tokens": 16, "attention_backend": "TRITON_ATTN_DIFFKV"}
    served = job(folder, prompts, 4, asked) | {"interpreted": True}
    answer = run(args, "engines_vllm.py", served, {"TRITON_INTERPRET": "1"})
    return compared(expected_rows(folder, prompts, 4), answer)


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """``vllm serve FOLDER`` answers one request over HTTP."""
    folder = args.work / "layer"
    if not folder.is_dir():
        raise SystemExit("row serve takes the folder of row layer: run that first")
    said = "The state of the union is"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(said, return_tensors="pt").input_ids[0]
    wanted = tokenizer.decode(expected_rows(folder, [ids], 16)[0]["greedy"])
    more = ["--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
    log = args.work / "serve.log"
    got, ready = one_completion(args.python, folder, more, said, log, process_environment())
    lines = [x for x in log.read_text().splitlines() if "gainlens: " in x]
    return {
        "passed": got == wanted,
        "command": "vllm serve FOLDER " + " ".join(more),
        "prompt": said,
        "answer": got,
        "reference": wanted,
        "seconds_until_ready": round(ready, 1),
        "log": lines[0].partition("gainlens: ")[2] if lines else None,
    }


def exported(args: argparse.Namespace, name: str, slim: Any, tokenizer: Any) -> Path:
    """The folder of a slim model."""
    folder: Path = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    gl.export_model(slim, folder, tokenizer=tokenizer)
    return folder


def expected_rows(folder: Path, prompts: list[torch.Tensor], new: int) -> list[dict[str, Any]]:
    """What gainlens' own engine generates, one prompt at a time."""
    model = gl.load_slim(folder, dtype=torch.float32)
    return [row for p in prompts for row in transformers_rows(model, p[None], new)]


def job(
    folder: Path, prompts: list[torch.Tensor], new: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """What ``engines_vllm.py`` is asked; log-probabilities of prompts would switch caching off."""
    lists = [p.tolist() for p in prompts]
    return {
        "model": str(folder),
        "prompts": lists,
        "n_new": new,
        "contexts": [],
        "max_length": max(map(len, lists)) + new + 1,
        "settings": settings,
        "prompt_logprobs": False,
    }


def compared(expected: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    """``engines.compare``, and whether it is within the target."""
    found = compare(expected, answer["rows"])
    within = found["largest_logprob_difference"] <= LOGPROB_TARGET
    return {"passed": within and not found["different_rows"], **found, "version": answer["engine"]}


def process_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a process of vLLM."""
    ours = ("PYTHONPATH", "TRITON_INTERPRET")
    plain = {key: value for key, value in os.environ.items() if key not in ours}
    fixed = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return {**plain, **fixed, **(more or {})}


def run(
    args: argparse.Namespace, script: str, asked: dict[str, Any], more: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a script in vLLM's environment."""
    question, answer = args.work / "job.json", args.work / "answer.json"
    question.write_text(json.dumps(asked))
    log = args.work / "log.txt"
    with log.open("w") as out:
        done = subprocess.run(
            [str(args.python), str(HERE / script), str(question), str(answer)],
            stdout=out, stderr=subprocess.STDOUT, check=False, env=process_environment(more),
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "layer": layer,
    "slots": slots,
    "serve": serve,
    "families": families,
    "compiled": compiled,
    "parallel": parallel,
    "triton": triton,
}

if __name__ == "__main__":
    sys.exit(main())
