# %% [markdown]
# # 2 Surgery and patching: what breaks when the quiet ones go?
#
# A gain says how loud a dimension is. Whether the model needs it can only be found out by taking it
# away. Here you will cut key dimensions with ordinary TransformerLens hooks, sweep the cut with its
# controls, get a verdict, and then go the other way and patch single units back in.
#
# **What you will see**
#
# 1. One call, `run_with_hooks`, on a `HookedTransformer` and on a bridge: the same loss.
# 2. Whole pairs may be cut before or after the rotation; half pairs may not.
# 3. A sweep beside random and loudest-first cuts, and what it takes to say "nothing is lost".
# 4. When zeroing and mean-ablation are the same cut, and when they are not.
# 5. Which units carry a copied token, by patching, checked against its own estimate.

# %%
import os

import torch

import gainlens as gl

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")
model = gl.load_model(NAME)
# Two sets of speeches that share no document: one chooses the cut, the other judges it.
calibration = gl.load_tokens("sotu", model, n_docs=8, length=128, split="calibration")
validation = gl.load_tokens("sotu", model, n_docs=8, length=128, split="validation")
gains = gl.probe_gains(model, calibration, progress=False)
mask = gl.KeyMask.quietest(gains, fraction=0.5, score="qk", scope="head")
mask

# %% [markdown]
# ## 1 The cut is a list of hooks
#
# `ablation_hooks` gives `(name, function)` pairs for `fwd_hooks`, one per layer. transformer-lens 3.9
# has both `HookedTransformer` and the bridge; from 4.0 on there is the bridge alone. The same call
# serves both, and where both are installed they must agree.

# %%
losses = {}
for kind in ("bridge", "hooked"):
    try:
        one = model if kind == "bridge" else gl.load_model(NAME, kind="hooked")
    except gl.GainlensError as error:
        print(f"{kind}: not here ({error})")
        continue
    hooks = gl.ablation_hooks(one, mask)
    with torch.inference_mode():
        intact = one(validation, return_type="loss")
        cut = one.run_with_hooks(validation, fwd_hooks=hooks, return_type="loss")
    losses[kind] = float(cut)
    print(
        f"{type(one).__name__}: loss {intact:.4f} intact, {cut:.4f} cut; first hook {hooks[0][0]}"
    )
if len(losses) == 2:
    assert abs(losses["bridge"] - losses["hooked"]) < 1e-3

# %% [markdown]
# Nothing more is in it than what you would write by hand. The control of the tool: the same cut as a
# hook of three lines.

# %%
keep = mask.keep


def zero_quiet(keys, hook):  # [document, position, kv_head, d_head]
    layer = int(hook.name.split(".")[1])
    return keys * keep[layer].to(keys)


by_hand = [(f"blocks.{i}.attn.hook_rot_k", zero_quiet) for i in range(len(keep))]
with torch.inference_mode():
    loss = float(model.run_with_hooks(validation, fwd_hooks=by_hand, return_type="loss"))
print(f"by hand {loss:.6f}, by ablation_hooks {losses['bridge']:.6f}")
assert abs(loss - losses["bridge"]) < 1e-4

# %% [markdown]
# ## 2 Before or after the rotation
#
# Zeroing a whole pair and rotating can be swapped. Zeroing one dimension of a pair can't: the
# rotation mixes the other into its place. So for whole pairs the loss must be the same at `hook_k`
# and at `hook_rot_k`; `KeyMask.split`, which cuts half pairs, is the control.

# %%
halves = gl.KeyMask.split(gains, fraction=0.5)
for name, chosen in (("whole pairs", mask), ("half pairs", halves)):
    found = []
    for site in ("hook_k", "hook_rot_k"):
        hooks = [
            (
                f"blocks.{i}.attn.{site}",
                lambda k, hook, i=i, chosen=chosen: k * chosen.keep[i].to(k),
            )
            for i in range(len(keep))
        ]
        with torch.inference_mode():
            loss = model.run_with_hooks(validation, fwd_hooks=hooks, return_type="loss")
        found.append(float(loss))
    print(f"{name}: {found[0]:.5f} at hook_k, {found[1]:.5f} at hook_rot_k")

# %% [markdown]
# ## 3 A sweep with its controls
#
# One loss after one cut says little: is a rise of 0.1 much? `surgery` runs the quietest-first cut
# at several fractions, beside **random** cuts of the same size (is the ranking worth anything?) and
# **loudest-first** cuts (does the measurement see damage at all?), on documents that had no say in
# the choice. Differences are taken document by document, so each has an interval.

# %% alt="Rise of the loss against the share of key dimensions cut: quietest first lowest, random and loudest first above it, with 95% intervals and the margin of 0.02 nats as a dashed line."
curve = gl.surgery(model, validation, gains, fractions=(0.25, 0.5, 0.8), seeds=(0, 1))
curve.plot(margin=0.02)

# %%
columns = ["order", "fraction", "seed", "loss", "delta", "low", "high"]
curve.to_dataframe()[columns].round(3)

# %% [markdown]
# "The loss stays flat" is a claim that nothing is there, and no finite text can show that. What can
# be shown is "less than a margin", with the margin named before looking. The claim *holds* if the
# whole interval is below the margin, *fails* if it is above, and is *undecided* otherwise.

# %% alt="The rise of the loss at 50% cut with its interval, and the margin of 0.02 nats beside it."
verdict = curve.verdict(fraction=0.5, margin=0.02)
print(verdict)
verdict.plot()

# %% [markdown]
# A tool that always says "fails" would be worthless, so the control is a cut of nothing: with
# nothing cut the claim must hold.

# %%
nothing = gl.KeyMask(torch.ones_like(mask.keep))
check = gl.surgery(
    model, validation, gains, fractions=(), cuts={"nothing": nothing}, progress=False
)
print(check.verdict(fraction=0.0, margin=0.02, order="given"))

# %% [markdown]
# The text that chose may not judge. gainlens remembers which text the gains saw:

# %%
try:
    gl.surgery(model, calibration, gains, fractions=(0.5,), progress=False)
except gl.InputError as error:
    print("InputError:", error)

# %% [markdown]
# **What to conclude.** On SmolLM2 the claim fails at a half: the interval is far above 0.02 nats.
# It still beats the random cut by a lot, so the ranking is right and the claim is wrong. On the small
# model, whose loss is high on this text to begin with, cutting a half does no harm. A verdict is
# about one model and one text; the tool's job is to say which.

# %% [markdown]
# ## 4 What is put in place of a key?
#
# A key dimension that is the same at every position adds the same number to all logits of a query,
# and the softmax does not see it. So *after* the rotation, zero and the mean (or any constant) are
# the same cut: both take away all that the dimension says. *Before* the rotation a constant is still
# a signal: the rotation turns it by position, so the model keeps the distance that it encodes. Mean
# ablation at `stage="projected"` therefore asks something else: what does the *content* of the
# dimension carry, with its position signal left in place?

# %%
for mode, stage in (("zero", "rotated"), ("mean", "rotated"), ("mean", "projected")):
    cut = gl.ablate(model, mask, mode=mode, stage=stage, gains=gains)
    with cut, torch.inference_mode():
        loss = float(model(validation, return_type="loss"))
    print(f"{mode} at {stage}: {loss - float(intact):+.4f} nats")

# %% [markdown]
# **What to conclude.** The first two agree, as they must: that is the control. How far the third is
# from them says how much of the damage was lost position, not lost content.

# %% [markdown]
# ## 5 Patching: which units carry a copied token?
#
# Take a piece of text *s*, then its beginning again: a model that copies expects *s* to go on. In
# the corrupted prompt *s* is another piece, so the right continuation is another token. The metric
# is the logit of the clean continuation less that of the corrupted one. Each unit of the clean run's
# keys is then put, alone, into the corrupted run.

# %%
length, again = 12, 4
clean_text, other_text = validation[0, 20 : 20 + length], validation[1, 20 : 20 + length]
start = clean_text[:again]
clean = torch.cat([clean_text, start])[None]
corrupted = torch.cat([start, other_text[again:], start])[None]
wanted, instead = int(clean_text[again]), int(other_text[again])


def metric(logits):  # [document, position, vocabulary] to one number
    return (logits[:, -1, wanted] - logits[:, -1, instead]).mean()


layers = range(0, len(keep), max(1, len(keep) // 8))
exact = gl.patch_keys(model, clean, corrupted, metric=metric, layers=layers)
estimate = gl.attribution_patching(model, clean, corrupted, metric=metric)
print(exact)
print(
    f"correlation of the one-pass estimate with exact patching: {exact.correlation(estimate):.2f}"
)

# %% alt1="Exact patching: change of the metric by layer, key head and pair." alt2="The one-pass estimate of the same changes."
exact.plot()
estimate.plot()

# %% [markdown]
# Controls: patching a run with its own keys changes nothing, and the largest units found here
# should matter more than units picked at random.

# %%
own = gl.patch_keys(model, corrupted, corrupted, metric=metric, layers=layers[:1], progress=False)
print(f"own keys: largest change {abs(own.effect[layers[0]]).max():.1e}")
top = exact.to_dataframe().dropna()
top["size"] = top.effect.abs()
print(f"ten largest: mean {top.nlargest(10, 'size')['size'].mean():.3f}", end="; ")
print(f"ten at random: mean {top.sample(10, random_state=0)['size'].mean():.3f}")
top.nlargest(5, "size")[["layer", "kv_head", "dim", "effect"]].round(3)

# %% [markdown]
# **What to conclude.** Exact patching costs one run per unit, the estimate one backward pass for all
# of them. Where their correlation is high, the estimate is good enough to search with, and the exact
# figure is for the few units that you then write about.

# %% [markdown]
# ## Exercises
#
# 1. Take `score="rms"` and `scope="layer"` in the sweep. Does the choice of ranking matter more than
#    random against quietest?
# 2. `KeyMask.matched` is a random cut that keeps how many units go at each rotary frequency. Add it
#    (`orders=("quietest", "matched", "random")`). How much of the ranking's worth is frequency alone?
# 3. The loss is made of many tokens that need no far-reaching attention. `gl.behaviours(model,
#    validation, gains)` measures induction and copying. Do they break before the loss does?
# 4. Halve the validation text. What becomes of the interval, and of the verdict?
#
# Next: [do all layers use the same dimensions?](03_map.md)
