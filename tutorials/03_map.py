# %% [markdown]
# # 3 The coordinate map: do all layers use the same dimensions?
#
# A tempting claim: "the gains of all layers have a cosine above 0.99, so there is one universal set
# of loud dimensions". Here you will see why that number alone shows nothing, what has to stand
# beside it, and what this model's map says.
#
# **What you will see**
#
# 1. Vectors that share nothing can have a cosine of 0.99.
# 2. A map that finds what is there and finds nothing where nothing is: two planted models.
# 3. The map of the real model, with two nulls.
# 4. What sharing one index set costs, which is what decides whether the map matters.

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
# Gains are positive, so two gain vectors point roughly the same way whatever they are. For
# independent vectors with coefficient of variation CV (standard deviation over mean) the expected
# cosine is about 1 / (1 + CV²). Draw some:

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
# Nearly flat gains (CV 0.1) give 0.99 with nothing shared. So gainlens never shows a cosine without
# its CV, its null (the same after shuffling the units of a layer) and its centred value (the mean
# taken out first; 0 for independent vectors).
#
# ## 2 Controls first: two planted models
#
# `coordinate_map` takes any non-negative array `[layer, kv_head, unit]`. Give it one in which all
# layers share a quarter of loud units, and one in which every layer has its own. The second is flat
# enough for a cosine near 0.99.

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
# The cosine of the private model is *higher* than that of the shared one, and yet nothing is shared.
# The centred value and the null tell them apart.
#
# ## 3 The map of this model

# %% alt="Four panels: cosine between layers; what is left above the null, with dots where significant; gain of every pair by layer with wavelengths; pairs ranked by how present they are among the loudest."
cmap = gl.coordinate_map(gains, score="qk")
cmap.plot()

# %%
print(cmap.verdict())  # the claim "cosine above 0.99: one coordinate system"
print(cmap.verdict(claim="shared"))  # the weaker claim "layers use the same units"

# %% [markdown]
# There are two nulls. The plain one shuffles all units of a layer. The band null shuffles only units
# of neighbouring rotary frequency: if layers agree merely because slow pairs are loud everywhere,
# that agreement survives the shuffle and does not count.

# %%
cmap.to_dataframe("measures").round(3)

# %%
cmap.to_dataframe("units")[
    ["unit", "wavelength", "presence", "p_plain", "p_band", "universal"]
].head(8).round(3)

# %% [markdown]
# **What to conclude.** `answer` has three values: *universal* (the layers agree beyond both nulls and
# strongly), *partly shared* (beyond chance, but weakly), *not shared*. On both models of this
# notebook the layers are partly shared: likeness well beyond chance, and far from one coordinate
# system. Compare `value` and `chance` in the table: more than half of the raw cosine is what
# shuffles within a band give.
#
# Does the answer depend on the definition of a gain? It may, and then a claim about "the" gains is
# not a claim about the model:

# %%
for score in gains.scores:
    other = gl.coordinate_map(gains, score=score, n_permutations=299)
    s = other.summary()
    print(
        f"{score:4} CV {s['cv']:.2f}  cosine {s['cosine']:.3f}  null {s['null_cosine']:.3f}  "
        f"centred {s['centred_cosine']:.3f}  {other.answer}"
    )

# %% [markdown]
# ## 4 The price of sharing
#
# A likeness becomes an engineering fact when one shared index set can replace a set per head. So cut
# the same share three ways and compare the loss on text that did not choose; a random shared set is
# the control.

# %% alt="Rise of the loss at each cut for a set per head, a set per layer, one shared set and a random shared set, with 95% intervals."
cmap = gl.with_evidence(
    cmap,
    model,
    gains,
    calibration[:4],
    validation[:4],
    parts=("sinks", "price"),
    fractions=(0.25, 0.5),
)
cmap.plot(part="price")

# %%
print(cmap.verdict(claim="price"))
cmap.sinks

# %% [markdown]
# **What to conclude.** If the shared set costs about what a set per head costs, use it: stock engines
# can run it (tutorial 5). If it costs much more, the map is a picture and not a plan. On SmolLM2 the
# shared set is far dearer; on the small model the difference is small.

# %% [markdown]
# ## Exercises
#
# 1. Multiply one layer's gains by 10. What changes in the map? What does `layer_profiles` do first?
# 2. Plant a model in which only half of the layers share a set. What is the answer, and which figure
#    shows it?
# 3. `gl.compare_maps(a, b)` compares two maps. Probe two texts (`"sotu"` and `"stdlib"`) and compare.
#    Is the map a fact about the model or about the text?
# 4. Set `parts=("red_line",)`. How many pairs must stay for a rise below 0.05 nats?
#
# Next: [healing what a cut broke](04_healing.md).
