"""Controls for a cut of keys: the same cut in queries and values, the complement, and random cuts.

A claim that key dimensions can be cut raises three questions:

- *Is it about keys?* Zeroing a key dimension and zeroing the same query dimension remove the same
  product from every logit, so the two are the same cut (in the table as a sanity check). The
  real control cuts the units that are quiet in queries alone. Values live in another space: cutting
  the same indices from values should cost no less than cutting random indices.
- *Are the kept units sufficient, and the cut ones not?* The complement, which keeps what was cut
  and cuts what was kept, is run too.
- *Would any other units work as well?* Equally many units drawn at random are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from gainlens.ablation.key_mask import KeyMask
from gainlens.analysis.sweep.judging_text import check_judge
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens, batches
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import forward_layers, token_losses
from gainlens.model.hooks import Hook, attached, hook_point
from gainlens.model.rotation import Following
from gainlens.model.running import model_device
from gainlens.model.sites import KeySites
from gainlens.probes.gains import KeyGains
from gainlens.stats.intervals import t_interval

Cut = Bool[torch.Tensor, "layer head dim"]


@dataclass(frozen=True, eq=False)
class SideControls:
    """The cost of a cut of keys and of its controls.

    Attributes:
        rows: per run the cut side (``key``, ``query``, ``value``), the cut units (``given``,
            ``quietest queries``, ``complement``, ``random``), the seed of random units, the share
            cut, the rise of the loss in nats per token and its 95% interval.
        rises: rise per document, ``[row, document]``.
        intact: loss of each document without a cut.
        without: runs that were skipped because this model lacks the hooks, with the reason.
    """

    rows: list[dict[str, Any]]
    rises: Float[np.ndarray, "row document"]
    intact: Float[np.ndarray, " document"]
    without: dict[str, str]

    def __repr__(self) -> str:
        shown = ", ".join(f"{r['side']} {r['units']} {r['rise']:+.3f}" for r in self.rows)
        return f"SideControls({shown}; nats, {len(self.intact)} documents)"

    def table(self) -> list[dict[str, Any]]:
        """One row per run."""
        return self.rows

    def difference(
        self, a: tuple[str, str], b: tuple[str, str]
    ) -> tuple[float, tuple[float, float]]:
        """Mean and 95% interval of the paired loss difference between two runs, nats per token.

        Args:
            a, b: side and units of each, e.g. ``("value", "given")``; seeds are averaged.

        Raises:
            InputError: the run does not exist.
        """
        found = []
        for run in (a, b):
            at = [i for i, r in enumerate(self.rows) if (r["side"], r["units"]) == run]
            if not at:
                runs = sorted({(r["side"], r["units"]) for r in self.rows})
                raise InputError(f"run={run!r} does not exist: expected one of {runs}")
            found.append(self.rises[at].mean(0))
        difference = found[0] - found[1]
        return float(difference.mean()), t_interval(difference)


def side_controls(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    mask: KeyMask,
    *,
    seeds: Sequence[int] = (0, 1),
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> SideControls:
    """Evaluate a cut and its controls on one text, by zeroing (queries and keys: after rotation).

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text.
        gains: calibration gains of this model, with the statistics for ``qk``.
        mask: the cut of keys that is claimed to be harmless.
        seeds: seeds of the random units.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        InputError: a mask of another shape or one that cuts nothing, or text that was used to
            choose the cut.
        SilentSiteError: a layer was not cut.

    Example:
        >>> mask = gl.KeyMask.quietest(gains, 0.5)
        >>> side_controls(model, validation, gains, mask).table()
    """
    sites = key_sites(model)
    if mask.shape != sites.shape or gains.shape != sites.shape:
        raise InputError(
            f"mask and gains have shapes {mask.shape} and {gains.shape}: this model "
            f"({sites.architecture}) has [layer, kv_head, d_head] = {sites.shape}"
        )
    if bool(mask.keep.all()):
        raise InputError("mask keeps every key dimension: expected one that cuts something")
    documents = list(batches(tokens, int(model.cfg.d_vocab), tokens_per_batch))
    check_judge(documents, gains, (mask,))
    without = _no_values(model, sites, documents[0])
    runs = list(_runs(sites, gains, ~mask.keep, seeds, values=not without))
    losses = []
    total = (1 + len(runs)) * len(documents)
    with tqdm(total=total, desc="controls", unit="run", disable=not progress) as bar:
        for run in [None, *runs]:
            losses.append(
                np.concatenate([_losses(model, sites, batch, run) for batch in documents])
            )
            bar.update(len(documents))
    rises = np.stack(losses[1:]) - losses[0]
    rows = [
        {
            **facts,
            "fraction": float(cut.double().mean()),
            "rise": float(rise.mean()),
            "interval": list(t_interval(rise)),
        }
        for (facts, cut), rise in zip(runs, rises, strict=True)
    ]
    return SideControls(rows, rises, losses[0], without)


def _runs(
    sites: KeySites, gains: KeyGains, cut: Cut, seeds: Sequence[int], values: bool
) -> Iterator[tuple[dict[str, Any], Cut]]:
    def row(side: str, units: str, seed: int | None = None) -> dict[str, Any]:
        return {"side": side, "units": units, "seed": seed}

    yield row("key", "given"), cut
    yield row("query", "given"), cut
    yield row("query", "quietest queries"), _quietest_queries(sites, gains, cut)
    yield row("key", "complement"), ~cut
    for seed in seeds:
        yield row("key", "random", seed), _random(cut, seed, sites.partner)
    if values:
        yield row("value", "given"), cut
        for seed in seeds:
            yield row("value", "random", seed), _random(cut, seed, sites.partner)


def _quietest_queries(sites: KeySites, gains: KeyGains, cut: Cut) -> Cut:
    """As many dimensions per head as in ``cut``, in whole pairs, quietest queries first."""
    stage = "rotated" if sites.rotary_dim else "projected"
    name = f"q_sq.{stage}"
    if name not in gains.sums:
        raise InputError(
            "gains have no query statistics: expected gains probed with the score 'qk'"
        )
    energy = gains.sums[name]
    return _lowest(energy + energy[..., sites.partner], cut)


def _random(cut: Cut, seed: int, partner: torch.Tensor) -> Cut:
    noise = torch.rand(cut.shape, generator=torch.Generator().manual_seed(seed))
    return _lowest(noise + noise[..., partner], cut)


def _lowest(values: torch.Tensor, cut: Cut) -> Cut:
    """The dimensions with the lowest values, as many per head as are cut.

    The two dimensions of a pair have equal values, so a stable sort keeps them together.
    """
    places = values.argsort(dim=-1, stable=True).argsort(dim=-1)
    return places < cut.sum(-1, keepdim=True)


def _no_values(model: Any, sites: KeySites, batch: torch.Tensor) -> dict[str, str]:
    """Why values cannot be cut at the indices of keys, if so; tested on a few tokens."""
    shapes: list[tuple[int, ...]] = []
    names = [f"blocks.{layer}.attn.hook_v" for layer in range(sites.n_layers)]
    for name in names:
        if hook_point(model, name) is None:
            return {"value": f"{name} does not exist on this model"}

    def see(x: torch.Tensor, hook: Any) -> None:
        shapes.append(tuple(x.shape[2:]))

    with attached(model, [(name, see) for name in names]):
        forward_layers(model, batch[:1, :4])
    if len(shapes) < sites.n_layers:
        return {"value": "hook_v does not fire on this model"}
    if set(shapes) != {sites.shape[1:]}:
        return {"value": f"values have [head, dim] = {shapes[0]}, keys {sites.shape[1:]}"}
    return {}


def _losses(
    model: Any,
    sites: KeySites,
    batch: torch.Tensor,
    run: tuple[dict[str, Any], Cut] | None,
) -> Float[np.ndarray, " document"]:
    """Mean loss of each document with one side cut, or intact."""
    fires = [0] * sites.n_layers
    with attached(model, [] if run is None else _hooks(model, sites, *run, fires)):
        found = token_losses(model, batch).double().mean(1).numpy()
    if run is not None and 0 in fires:
        silent = [layer for layer, n in enumerate(fires) if n == 0]
        raise SilentSiteError(f"the {run[0]['side']} hooks of layer(s) {silent} did not fire")
    losses: Float[np.ndarray, " document"] = found
    return losses


def _hooks(
    model: Any, sites: KeySites, facts: dict[str, Any], cut: Cut, fires: list[int]
) -> list[Hook]:
    side = facts["side"]
    at = sites.hook_stage("rotated")
    # Zeroing whole pairs commutes with the rotation; half a pair must be rotated first.
    partner = sites.partner
    split = side != "value" and at == "projected" and not torch.equal(cut, cut[..., partner])
    device = model_device(model)
    following = sites.rotation.follow() if split else None
    found: list[Hook] = [] if following is None else following.hooks()
    for layer in range(sites.n_layers):
        if side == "value":
            name = f"blocks.{layer}.attn.hook_v"
        else:
            name = (sites.key_hook if side == "key" else sites.query_hook)(layer, at)
        cut_here = cut[layer].to(device)
        if side == "query":
            cut_here = cut_here.repeat_interleave(sites.group_size, 0)
        letter = "q" if side == "query" else "k"
        fn = partial(
            _zero, cut=cut_here, layer=layer, letter=letter, fires=fires, following=following
        )
        found.append((name, fn))
    return found


def _zero(
    x: torch.Tensor,
    hook: Any,
    *,
    cut: torch.Tensor,
    layer: int,
    fires: list[int],
    letter: str,
    following: Following | None,
) -> torch.Tensor:
    fires[layer] += 1
    if following is None:
        return x.masked_fill(cut, 0)
    turn = following.turn(letter, layer, x.shape[1])
    return turn.heads(turn.heads(x).masked_fill(cut, 0), inverse=True)
