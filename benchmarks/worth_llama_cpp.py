"""Decoding speed in llama.cpp (in its own environment), one cell of the worth ledger.

Called by ``benchmarks/worth.py`` as ``python worth_llama_cpp.py JOB.json RESULT.json``. One prompt
is read into the first slot; the others load its cache from a file, so that a context of 8,192
tokens in many slots costs one prefill. Then all slots decode at once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

CACHES = {"f16": "GGML_TYPE_F16", "f32": "GGML_TYPE_F32", "q8_0": "GGML_TYPE_Q8_0"}


def main() -> None:
    """Read the job, run it, write the answer."""
    job = json.loads(Path(sys.argv[1]).read_text())
    import xllamacpp as xlc

    with tempfile.TemporaryDirectory() as folder:
        found = decode(xlc, job, folder)
    found["engine"] = f"xllamacpp {version('xllamacpp')}"
    found["built_for"] = xlc.get_system_info()
    Path(sys.argv[2]).write_text(json.dumps(found))


def decode(xlc: Any, job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Tokens per second of all slots together, and the seconds of one prefill."""
    batch, context, new = job["batch"], job["context"], job["new"]
    server = xlc.Server(settings_of(xlc, job, folder))
    request = {
        "prompt": job["filler"][:context],
        "temperature": 0.0,
        "top_k": 1,
        "samplers": ["top_k"],
        "ignore_eos": True,
        "cache_prompt": True,
    }

    def ask(slot: int, n: int) -> dict[str, Any]:
        answer = server.handle_completions({**request, "id_slot": slot, "n_predict": n})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if "timings" not in answer:
            raise RuntimeError(str(answer)[:300])
        return answer

    begun = time.perf_counter()
    first = ask(0, 1)
    prefill = time.perf_counter() - begun
    if batch > 1:
        address = server.listening_address
        slots(address, 0, "save")
        for slot in range(1, batch):
            slots(address, slot, "restore")
    with ThreadPoolExecutor(batch) as pool:
        answers = list(pool.map(lambda slot: ask(slot, new), range(batch)))
    spent = [answer["timings"] for answer in answers]
    again = max(t["prompt_n"] for t in spent)
    if again > 64:
        raise RuntimeError(f"a slot read {again} tokens of its prompt again: no cache was kept")
    slowest = max(t["predicted_ms"] for t in spent)
    return {
        "tokens_per_second": 1e3 * sum(t["predicted_n"] for t in spent) / slowest,
        "prefill_s": prefill,
        "prompt_n": first["timings"]["prompt_n"],
    }


def slots(address: str, slot: int, action: str) -> None:
    """Save or restore the cache of a slot; the server keeps the file in its own folder."""
    asked = urllib.request.Request(
        f"{address}/slots/{slot}?action={action}",
        data=json.dumps({"filename": "filled.bin"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked) as answer:
        answer.read()


def settings_of(xlc: Any, job: dict[str, Any], folder: str) -> Any:
    """The engine's own choices but for the cache's type, the slots and the threads."""
    settings = xlc.CommonParams()
    settings.model.path = job["model"]
    settings.n_parallel = job["batch"]
    settings.n_ctx = job["batch"] * (job["context"] + job["new"] + 32)
    settings.cache_ram_mib = 0
    settings.slot_save_path = folder + "/"
    kind = getattr(xlc.ggml_type, CACHES[job["cache"]])
    settings.cache_type_k = settings.cache_type_v = kind
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = job["threads"]
    settings.warmup = False
    settings.verbosity = 0
    return settings


if __name__ == "__main__":
    main()
