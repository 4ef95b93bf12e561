# %% [markdown]
# # 6 From a question to a paper figure
#
# An induction head looks for the last time that the current token occurred and attends to the token
# after it. It compares content, at whatever distance. **Which rotary pairs does it use for that, does
# this depend on the distance, and what happens when they go?** This notebook answers the question for
# one head and ends with a figure that can be put into a paper, with its data beside it.
#
# **What you will see**
#
# 1. The head is found by a score with a known answer, and a control text on which it must be near zero.
# 2. The logit of a head is a sum over rotary pairs, so each pair has a share of it.
# 3. The shares are measured at several distances.
# 4. The pairs with the largest shares are cut, and as many drawn at random, and as many of the smallest.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import gainlens as gl

NAME = os.environ.get("GAINLENS_TUTORIAL_MODEL", "tiny")
model = gl.load_model(NAME)
sites = gl.model.key_sites(model)
sites

# %% [markdown]
# ## 1 The head
#
# Random tokens, then the same again: the only way to predict the second half is to look back. A head's
# induction score is the attention from each token of the second half to the token after its first
# occurrence. On tokens that do not repeat, the same places are the control. (The small model has no
# induction head: its best head is no better than the control, and the rest shows only the steps.)

# %%
N, DISTANCES = 8, (8, 16, 32)


def repeated(distance, seed=0):  # [document, 2 · distance], of tokens that repeat after `distance`
    draw = torch.Generator().manual_seed(seed)
    low, high = model.cfg.d_vocab // 20, model.cfg.d_vocab  # beyond the special tokens
    half = torch.randint(low, high, (N, distance), generator=draw)
    return torch.cat([half, half], 1)


def attention_back(tokens, distance):  # mean attention to the token after the first occurrence
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(sites.n_layers)]
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    rows = torch.arange(distance, 2 * distance - 1)
    return torch.stack(
        [cache[name][:, :, rows, rows - distance + 1].mean((0, 2)) for name in names]
    )


found = attention_back(repeated(32), 32)
control = attention_back(torch.cat([repeated(32, 1)[:, :32], repeated(32, 2)[:, :32]], 1), 32)
layer, head = divmod(int(found.argmax()), sites.n_heads)
key_head = head // sites.group_size
print(f"layer {layer}, query head {head} (key head {key_head})")
print(
    f"attention back: {found[layer, head]:.2f}, on tokens that do not repeat: {control[layer, head]:.2f}"
)

# %% [markdown]
# ## 2 Its pairs, at several distances
#
# After the rotation, the logit between a query and a key is the dot product of the two, times a scale: a
# sum over rotary pairs. A pair's share is its part of the logit at the key that induction wants, minus
# its mean over all other keys. What is the same for all keys cancels in the softmax, so the mean goes.

# %%
pairs = [(d, int(p)) for d, p in enumerate(sites.partner) if d < int(p)]
first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))


def shares(distance):  # nats per pair, mean over the tokens of the second half
    got = {}
    hooks = [
        (sites.query_hook(layer, "rotated"), lambda x, hook: got.update(q=x[:, :, head].double())),
        (
            sites.key_hook(layer, "rotated"),
            lambda x, hook: got.update(k=x[:, :, key_head].double()),
        ),
    ]
    with torch.inference_mode():
        model.run_with_hooks(repeated(distance), fwd_hooks=hooks)
    rows = torch.arange(distance, 2 * distance - 1)
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for row in rows.tolist():
        parts = got["q"][:, row, None] * got["k"][:, : row + 1]  # [document, key, dimension]
        parts = parts[..., first] + parts[..., second]
        wanted = row - distance + 1
        others = (parts.sum(1) - parts[:, wanted]) / row
        total += (parts[:, wanted] - others).mean(0)
    return total / len(rows) * sites.logit_scale[layer]


by_distance = torch.stack([shares(distance) for distance in DISTANCES])
order = by_distance.mean(0).argsort(descending=True)
wavelengths = 2 * np.pi / sites.frequencies[layer].double()
table = pd.DataFrame(by_distance.T.numpy(), columns=[f"distance {d}" for d in DISTANCES])
table.insert(0, "wavelength", wavelengths.numpy())
table.loc[order[:5].tolist()].round(2)

# %% [markdown]
# Does the head use the same pairs near and far? The rank correlation of the shares at two distances says
# so. Two halves of the random documents at *one* distance would give the ceiling.

# %%
ranks = by_distance.argsort(-1).argsort(-1).double()
print(np.corrcoef(ranks.numpy()).round(2))

# %% [markdown]
# ## 3 What happens when they go
#
# Cut a quarter of the head's pairs: those with the largest shares, the smallest, or some at random. The
# cut takes them out of one key head only; all else stays. The outcome is the loss on the second half.

# %%
some = len(pairs) // 4


def cut_of(chosen):
    keep = torch.ones(sites.shape, dtype=torch.bool)
    keep[layer, key_head, first[chosen]] = keep[layer, key_head, second[chosen]] = False
    return gl.KeyMask(keep)


draw = torch.Generator().manual_seed(0)
cuts = {
    "largest shares": cut_of(order[:some]),
    "at random": cut_of(torch.randperm(len(pairs), generator=draw)[:some]),
    "smallest shares": cut_of(order[-some:]),
}


def second_half(distance, cut=None):  # loss and attention back, with the cut
    tokens = repeated(distance, seed=7)  # not the documents that chose the pairs
    hooks = gl.ablation_hooks(model, cut) if cut is not None else []
    pattern = {}
    hooks = [*hooks, (f"blocks.{layer}.attn.hook_pattern", lambda x, hook: pattern.update(p=x))]
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    loss = torch.nn.functional.cross_entropy(
        logits[:, distance:-1].transpose(1, 2), tokens[:, distance + 1 :], reduction="none"
    )
    rows = torch.arange(distance, 2 * distance - 1)
    return loss.mean(1), pattern["p"][:, head, rows, rows - distance + 1].mean(1)


rows = []
for distance in DISTANCES:
    intact, attended = second_half(distance)
    rows.append(("intact", distance, 0.0, 0.0, float(attended.mean())))
    for name, cut in cuts.items():
        loss, after = second_half(distance, cut)
        rise = loss - intact
        rows.append(
            (name, distance, float(rise.mean()), float(rise.std() / N**0.5), float(after.mean()))
        )
outcome = pd.DataFrame(
    rows, columns=["cut", "distance", "rise", "standard error", "attention back"]
)
outcome.round(3)

# %% [markdown]
# ## 4 The figure
#
# Three panels, one per part of the question, with the control in the last one. The data goes beside the
# figure, so that a reader can draw it again.

# %% alt="Three panels. Left: heat map of a pair's share of the induction head's logit, by pair and distance. Middle: the same shares against the pair's wavelength. Right: attention back after cutting a quarter of the pairs with the largest shares, at random, and the smallest."
figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
end = float(by_distance.abs().max())
image = axes[0].imshow(by_distance, aspect="auto", cmap="RdBu_r", vmin=-end, vmax=end)
axes[0].set(xlabel="rotary pair", ylabel="distance (tokens)", title="share of the logit (nats)")
axes[0].set_yticks(range(len(DISTANCES)), DISTANCES)
figure.colorbar(image, ax=axes[0])
for distance, share in zip(DISTANCES, by_distance, strict=True):
    axes[1].plot(wavelengths, share, marker="o", markersize=3, label=f"{distance} tokens")
axes[1].set(xscale="log", xlabel="wavelength (tokens)", ylabel="share (nats)", title="which pairs")
axes[1].axhline(0, color="black", linewidth=0.8)
axes[1].legend(fontsize=8)
for name, group in outcome.groupby("cut", sort=False):
    axes[2].plot(group["distance"], group["attention back"], marker="o", label=name)
axes[2].set(
    xlabel="distance (tokens)", ylabel="attention back", title=f"{some} of {len(pairs)} pairs cut"
)
axes[2].set_ylim(bottom=0)
axes[2].legend(fontsize=8)
folder = Path(tempfile.mkdtemp())
figure.savefig(folder / "induction_pairs.pdf")
outcome.to_csv(folder / "induction_pairs.csv", index=False)

# %% [markdown]
# **How to read it.** The claim that the head works through a few pairs would be supported if the first cut
# lowers the attention back far more than the random one at every distance, and the last hardly at all. One
# draw of random pairs is a weak control for a paper: use twenty. Documents are independent draws here, so
# the standard error over them is the right one.
#
# ## A question for you
#
# Does the head's *key head* serve other query heads too (`sites.group_size`)? Cut the same pairs and
# measure `gl.behaviours(model, validation, gains, (), cuts=cuts)` on text: which behaviour breaks first,
# and is it the one that you expected from the figure?
