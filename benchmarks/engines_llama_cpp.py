"""Run a job in llama.cpp (in its own environment): greedy tokens, their log-probabilities, times.

Called by ``benchmarks/engines.py`` as ``python engines_llama_cpp.py JOB.json RESULT.json``. Tokens
are compared with keys and values cached in float32 and flash attention off, since both would
round, unless the job says ``rounded``. Times are taken with what the engine does by itself (a cache
in float16, its fused attention), since that is the best form of the full model.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the job, run it, write the answer."""
    job = json.loads(Path(sys.argv[1]).read_text())
    import xllamacpp as xlc

    server = xlc.Server(settings_of(xlc, job, exact=not job.get("rounded")))

    def run(ids: list[int], new: int, n_probs: int) -> dict[str, Any]:
        request = {
            "prompt": ids,
            "n_predict": new,
            "temperature": 0.0,
            "top_k": 1,
            "samplers": ["top_k"],
            "ignore_eos": True,
            "cache_prompt": False,
            "n_probs": n_probs,
            "return_tokens": True,
        }
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "error" in answer or (answer.get("code") and "message" in answer):
            raise RuntimeError(str(answer))
        return answer

    rows = []
    for ids in job["prompts"]:
        answer = run(ids, job["n_new"], 1)
        steps = answer["choices"][0]["logprobs"]["content"]
        rows.append(
            {
                "prompt_logprobs": None,
                "greedy": [int(step["id"]) for step in steps],
                "greedy_logprobs": [float(step["logprob"]) for step in steps],
            }
        )
    times = []
    if job["contexts"]:
        del server
        server = xlc.Server(settings_of(xlc, job, exact=False))
    for context in job["contexts"]:
        answer = run(job["filler"][:context], job["timed_tokens"], 0)
        spent = answer["timings"]
        times.append(
            {
                "context": context,
                "decode_ms": spent["predicted_per_token_ms"],
                "prefill_s": spent["prompt_ms"] / 1e3,
            }
        )
    result = {"engine": f"xllamacpp {version('xllamacpp')}", "rows": rows, "times": times}
    Path(sys.argv[2]).write_text(json.dumps(result))


def settings_of(xlc: Any, job: dict[str, Any], *, exact: bool) -> Any:
    """What the server is told: by itself it rounds the cache and fuses the attention."""
    settings = xlc.CommonParams()
    settings.model.path = job["model"]
    settings.n_ctx = job["max_length"]
    settings.n_parallel = 1
    settings.n_batch = settings.n_ubatch = 512
    settings.cache_prompt = False
    settings.cache_ram_mib = 0
    if exact:
        settings.cache_type_k = settings.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = job["threads"]
    settings.warmup = False
    settings.verbosity = 0
    return settings


if __name__ == "__main__":
    main()
