# %% [markdown]
# # 2 Surgery and patching: what breaks when the quiet ones go?
#
# A gain says how large a dimension is. Whether the model needs it is known only after it is removed.
# Here you cut key dimensions with ordinary TransformerLens hooks, sweep the cut with its controls, get
# a verdict, and then patch single units back in.
#
# **What you will see**
#
# 1. The same `run_with_hooks` call gives the same loss on a `HookedTransformer` and on a bridge.
# 2. Whole pairs can be cut before or after the rotation, half pairs cannot.
# 3. A sweep beside random and loudest-first cuts, and what it takes to say "nothing is lost".
# 4. The same cut on code, and by position in the text.
# 5. When zeroing and mean ablation are the same cut, and when they differ.
# 6. Which units carry a copied token, by exact patching and by a one-pass estimate.

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
# `ablation_hooks` returns `(name, function)` pairs for `fwd_hooks`, one per layer. transformer-lens 3.9
# has `HookedTransformer` and the bridge; 4.0 and later have only the bridge. The same call works for
# both. Where both are installed, they must agree.

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
# The hooks do nothing that you could not write by hand. As a control, here is the same cut as a hook
# of three lines.

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
# Zeroing a whole pair commutes with the rotation. Zeroing one dimension of a pair does not, because
# the rotation mixes the other one into its place. So for whole pairs the loss must be the same at
# `hook_k` and at `hook_rot_k`. The control is `KeyMask.split`, which cuts half pairs.

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
# One loss after one cut says little. Is a rise of 0.1 much? `surgery` cuts the quietest units first, at
# several fractions. Beside them it runs **random** cuts of the same size (is the ranking worth
# anything?) and **loudest-first** cuts (does the measurement see damage at all?). It uses documents
# that did not choose the cut. Differences are paired by document, so each one has an interval.

# %% alt="Rise of the loss against the share of key dimensions cut: quietest first lowest, random and loudest first above it, with 95% intervals and the margin of 0.02 nats as a dashed line."
curve = gl.surgery(model, validation, gains, fractions=(0.25, 0.5, 0.8), seeds=(0, 1))
curve.plot(margin=0.02)

# %%
columns = ["order", "fraction", "seed", "loss", "delta", "low", "high"]
curve.to_dataframe()[columns].round(3)

# %% [markdown]
# No finite text can show that the loss does not rise at all. It can show that the rise is smaller than a
# margin, if the margin is set before looking. The claim *fails* if the whole interval is above the margin.
# It *holds* if the whole interval is below it and there are at least 72 documents: a harm in one document
# of ten is easily missed by fewer. Otherwise it is *undecided*, and the verdict says how many more
# documents might decide it.

# %% alt="The rise of the loss at 50% cut with its interval, and the margin of 0.02 nats beside it."
verdict = curve.verdict(fraction=0.5, margin=0.02)
print(verdict)
verdict.plot()

# %% [markdown]
# A tool that always says "fails" would be worthless. So the control is a cut of nothing: the interval must
# lie below the margin. Eight documents are still too few to say *holds*.

# %%
nothing = gl.KeyMask(torch.ones_like(mask.keep))
check = gl.surgery(
    model, validation, gains, fractions=(), cuts={"nothing": nothing}, progress=False
)
control = check.verdict(fraction=0.0, margin=0.02, order="given")
print(control)
assert control.interval[1] < 0.02
assert control.status == "undecided"

# %% [markdown]
# A text that chose a cut must not judge it. gainlens remembers which text the gains saw:

# %%
try:
    gl.surgery(model, calibration, gains, fractions=(0.5,), progress=False)
except gl.errors.InputError as error:
    print("InputError:", error)

# %% [markdown]
# **Conclusion.** On SmolLM2 the claim fails at 50%: the interval is far above 0.02 nats. The cut is still
# far better than a random one, so the ranking works and the claim is wrong. The small model has a high
# loss on this text anyway, and cutting half of its pairs does no harm. A verdict is about one model and
# one text, at the length that was measured.

# %% [markdown]
# ## 4 Another text, and further from the start
#
# The speeches chose the cut. Code did not, and a short text has no distant keys. Several texts in one
# name are judged one by one, and the worst decides:

# %%
both = gl.load_tokens("sotu,stdlib", model, n_docs=12, length=128, split="validation")
wider = gl.surgery(model, both, gains, fractions=(0.5,), orders=("quietest",), progress=False)
(point,) = wider.find(order="quietest", fraction=0.5)
for text, one in wider.verdicts(point, margin=0.02).items():
    low, high = one.interval
    print(f"{text:7} {one.status}: {one.estimate:+.3f} nats [{low:+.3f}, {high:+.3f}]")

# %% [markdown]
# Longer documents show where in a text the loss rises. The first bucket is the control for the others:
# the cut is the same, only the keys are further away.

# %% alt="Rise of the loss against the position in the text with half of the key dimensions cut, with 95% intervals, on speeches and on code together."
longer = gl.load_tokens(
    "sotu,stdlib", model, n_docs=8, length=min(512, model.cfg.n_ctx), split="validation"
)
by_position = gl.analysis.rise_by_position(
    model, longer, mask, buckets=(0, 32, 64, 128, 256), progress=False
)
by_position.plot()

# %%
by_position.to_dataframe()[["first", "last", "rise", "low", "high", "n_documents"]].round(3)

# %% [markdown]
# **Conclusion.** A cut is worth what it costs on the text and at the positions where the model is used.
# If the rows of the two texts or the first and the last bucket differ, one number for all would be wrong.

# %% [markdown]
# ## 5 What replaces a key?
#
# A rotated key dimension that is the same at every position adds the same number to all logits of a
# query, and the softmax ignores it. So *after* the rotation, zero and the mean (or any constant) are
# the same cut: both remove everything that the dimension carries. *Before* the rotation a constant is
# still a signal, because the rotation turns it by an angle that depends on the position. So mean
# ablation at `stage="projected"` asks another question: what does the *content* of the dimension
# carry, if its position signal stays?

# %%
for mode, stage in (("zero", "rotated"), ("mean", "rotated"), ("mean", "projected")):
    cut = gl.ablate(model, mask, mode=mode, stage=stage, gains=gains)
    with cut, torch.inference_mode():
        loss = float(model(validation, return_type="loss"))
    print(f"{mode} at {stage}: {loss - float(intact):+.4f} nats")

# %% [markdown]
# **Conclusion.** The first two agree, as they must; that is the control. The distance of the third says
# how much of the damage was lost position and not lost content.

# %% [markdown]
# ## 6 Patching: which units carry a copied token?
#
# Take a piece of text *s*, followed by its beginning again. A model that copies expects *s* to
# continue. In the corrupted prompt *s* is another piece, so the right continuation is another token.
# The metric is the logit of the clean continuation minus the logit of the corrupted one. Each unit of
# the clean run's keys is then inserted alone into the corrupted run.

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
estimate = gl.analysis.attribution_patching(model, clean, corrupted, metric=metric)
print(exact)
print(
    f"correlation of the one-pass estimate with exact patching: {exact.correlation(estimate):.2f}"
)

# %% alt1="Exact patching: change of the metric by layer, key head and pair." alt2="The one-pass estimate of the same changes."
exact.plot()
estimate.plot()

# %% [markdown]
# Controls: patching a run with its own keys must change nothing, and the units with the largest effect
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
# **Conclusion.** Exact patching costs one run per unit; the estimate costs one backward pass for all
# units. Where their correlation is high, search with the estimate and use exact patching for the few
# units that you write about.

# %% [markdown]
# ## Exercises
#
# 1. Use `score="rms"` and `scope="layer"` in the sweep. Which matters more: the choice of score, or
#    quietest against random?
# 2. `KeyMask.matched` is a random cut with as many units at each rotary frequency. Add it
#    (`orders=("quietest", "matched", "random")`). How much of the ranking's worth is frequency alone?
# 3. Most tokens of a text need no long-range attention. `gl.behaviours(model, validation, gains)`
#    measures induction and copying. Do they break before the loss rises?
# 4. Halve the validation text. What happens to the interval and to the verdict?
#
# ## A question for you
#
# How much can be cut on the text that *you* use? Choose the mask on your text as well
# (`gl.load_tokens("sotu,stdlib,mine.jsonl", …)`), run `surgery` at a few fractions and read
# `curve.verdicts`. Which text decides, and at which position does the rise begin?
#
# Next: [do all layers use the same dimensions?](03_map.md)
