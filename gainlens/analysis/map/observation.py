"""One pass over a text for statistics that gains do not contain: keys by position, attention to the
first positions, each unit's part in the preference for the first key, and the tokens of each unit.

Memory does not grow with the text: positions are binned by powers of two, and only the largest few
tokens per unit are kept.
"""

from __future__ import annotations

import heapq
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.analysis.map.units import Units
from gainlens.brief import brief
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import TextHasher
from gainlens.errors import SilentSiteError, UnsupportedModelError
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached, hook_point
from gainlens.model.recorder import query_key_hooks
from gainlens.model.sites import KeySites, Stage
from gainlens.model.tokens import model_batches
from gainlens.probes.gains import KeyGains

FIRST = 4
"""Number of first positions whose attention mass is recorded separately."""
N_TOKENS = 8
CONTEXT = 6
"""Tokens of context kept before a token with a large value."""


@dataclass(frozen=True, eq=False)
class KeyObservation:
    """The statistics of one pass; all arrays are float64.

    Attributes:
        bins: first position of each bin: 0, 1, 2, 4, 8, …
        rms: root mean square of each unit's key by position, ``[layer, bin, kv_head, unit]``; for
            a pair, that of its norm over √2, which is the same before and after the rotation.
        first_rms, first_mean: rms and norm of the mean of the key at position 0 (over √2 for a
            pair), ``[layer, kv_head, unit]``.
        mass: mean attention to positions 0 … 3 of queries from position 1 on,
            ``[layer, head, position]``.
        uniform: the attention to one position if it were spread evenly.
        advantage: mean over queries of a unit's part of the logit of position 0, minus its mean
            part over the other keys visible to the query; nats, ``[layer, kv_head, unit]``.
        tokens: for each unit the tokens after position 0 with the largest keys, measured by the
            squared norm relative to the head's mean, averaged over all heads.
        n_documents, n_tokens: size of the text.
        text: fingerprint of the text.
    """

    bins: Int[np.ndarray, " bin"]
    rms: Float[np.ndarray, "layer bin kv_head unit"]
    first_rms: Float[np.ndarray, "layer kv_head unit"]
    first_mean: Float[np.ndarray, "layer kv_head unit"]
    mass: Float[np.ndarray, "layer head position"]
    uniform: float
    advantage: Float[np.ndarray, "layer kv_head unit"]
    tokens: list[list[dict[str, Any]]]
    n_documents: int
    n_tokens: int
    text: str

    __repr__ = brief


def observe_keys(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    units: Units,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> KeyObservation:
    """Run a text and gather a ``KeyObservation``.

    Args:
        model: a TransformerBridge or HookedTransformer that computes attention eagerly.
        tokens: as for ``probe_gains``.
        gains: gains of this model; keys are compared with their mean squares.
        units: the units of the map.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: the model exposes no attention pattern.
        SilentSiteError: the hooks of a layer did not fire.
    """
    observer = _Observer(model, key_sites(model), gains, units)
    hasher = TextHasher()
    with ExitStack() as stack, tqdm(desc="observe", unit="doc", disable=not progress) as bar:
        stack.enter_context(attached(model, observer.hooks()))
        for batch in model_batches(model, tokens, tokens_per_batch):
            hasher.update(batch)
            observer.start(batch)
            forward_layers(model, batch)
            observer.finish()
            bar.update(len(batch))
    return observer.result(hasher.hexdigest())


class _Observer:
    """Hooks and sums. Queries and keys of a layer are held until its pattern arrives."""

    def __init__(self, model: Any, sites: KeySites, gains: KeyGains, units: Units) -> None:
        self.model, self.sites, self.units = model, sites, units
        self.n_bins = 1
        layers, heads, d = sites.shape
        rms = gains.score("rms", unit="pair" if units.kind == "pair" else "dim")
        first = [dims[0] for dims in units.dims]
        self.mean_square = rms[..., first].double().square().clamp_min(1e-30)
        bins = 2 + int(getattr(model.cfg, "n_ctx", 1 << 20)).bit_length()
        self.k_sq = torch.zeros(layers, bins, heads, d, dtype=torch.float64)
        self.k_first = torch.zeros(layers, heads, d, dtype=torch.float64)
        self.count = torch.zeros(bins, dtype=torch.float64)
        self.mass = torch.zeros(layers, sites.n_heads, FIRST, dtype=torch.float64)
        self.advantage = torch.zeros(layers, heads, d, dtype=torch.float64)
        self.even = 0.0
        self.queries = 0
        self.documents = self.n_tokens = 0
        self.largest: list[list[tuple[float, int, dict[str, Any]]]] = [[] for _ in units.dims]
        self.serial = 0
        self.held: dict[str, torch.Tensor] = {}
        self.seen = [0] * layers

    def hooks(self) -> list[Hook]:
        found = query_key_hooks(self.sites, self._hold)
        for layer in range(self.sites.n_layers):
            pattern = f"blocks.{layer}.attn.hook_pattern"
            if hook_point(self.model, pattern) is None:
                raise UnsupportedModelError(f"{pattern} does not exist on this model")
            found.append((pattern, partial(self._add, layer=layer)))
        return found

    def start(self, batch: Int[torch.Tensor, "document pos"]) -> None:
        self.batch = batch
        self.relative = torch.zeros(*batch.shape, len(self.units), dtype=torch.float64)
        n_pos = batch.shape[1]
        positions = torch.arange(n_pos)
        self.bin = torch.where(positions == 0, 0, 1 + positions.clamp_min(1).log2().floor().long())
        self.n_bins = max(self.n_bins, int(self.bin.max()) + 1)
        self.count += torch.bincount(self.bin, minlength=len(self.count)) * len(batch)
        self.even += len(batch) * float((1 / (1 + positions[1:].double())).sum())
        self.queries += len(batch) * (n_pos - 1)

    def _hold(self, letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        self.held[letter] = x

    def _add(self, pattern: torch.Tensor, hook: Any, *, layer: int) -> None:
        if set(self.held) != {"q", "k"}:
            raise SilentSiteError(f"the key or query hook of layer {layer} did not fire")
        q, k = self.held.pop("q").float(), self.held.pop("k").float()
        self.seen[layer] += 1
        square = k.square().sum(0).double().cpu()
        self.k_sq[layer].index_add_(0, self.bin, square)
        self.k_first[layer] += k[:, 0].sum(0).double().cpu()
        first = pattern.detach()[:, :, 1:, :FIRST].double().sum((0, 2)).cpu()
        self.mass[layer, :, : first.shape[-1]] += first
        self.advantage[layer] += self._preference(q, k) * self.sites.logit_scale[layer]
        energy = self._of_units(k.square().double().cpu()) / self._dims()
        self.relative += (energy / self.mean_square[layer]).mean(2)

    def _preference(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Σ over queries i ≥ 1 of q_i·k_0 minus the mean of q_i·k_j over 1 ≤ j ≤ i, per dim."""
        b, s, heads, d = k.shape
        seen = torch.arange(1, s, device=k.device, dtype=k.dtype)[None, :, None, None]
        others = k[:, 1:].cumsum(1) / seen
        grouped = q[:, 1:].reshape(b, s - 1, heads, -1, d).mean(3)
        return ((grouped * (k[:, :1] - others)).sum((0, 1))).double().cpu()

    def _of_units(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the dimensions of each unit."""
        return torch.stack([x[..., list(dims)].sum(-1) for dims in self.units.dims], dim=-1)

    def _dims(self) -> torch.Tensor:
        return torch.tensor([float(len(dims)) for dims in self.units.dims], dtype=torch.float64)

    def finish(self) -> None:
        """Keep the largest tokens of the current batch."""
        values = self.relative / self.sites.n_layers
        values[:, 0] = -1.0
        top = min(N_TOKENS, values.shape[0] * values.shape[1])
        best, where = values.flatten(0, 1).topk(top, dim=0)
        for unit, heap in enumerate(self.largest):
            for value, flat in zip(best[:, unit].tolist(), where[:, unit].tolist(), strict=True):
                row, pos = divmod(flat, values.shape[1])
                self.serial += 1
                entry = {
                    "value": value,
                    "token": int(self.batch[row, pos]),
                    "document": self.documents + row,
                    "position": pos,
                    "before": self.batch[row, max(0, pos - CONTEXT) : pos].tolist(),
                }
                heapq.heappush(heap, (value, -self.serial, entry))
                if len(heap) > N_TOKENS:
                    heapq.heappop(heap)
        self.documents += len(self.batch)
        self.n_tokens += self.batch.numel()

    def result(self, text: str) -> KeyObservation:
        if min(self.seen) == 0 or len(set(self.seen)) > 1:
            silent = [layer for layer, n in enumerate(self.seen) if n < max(self.seen) or n == 0]
            raise SilentSiteError(
                f"hook_pattern of layer(s) {silent} did not fire: attention is computed without "
                "it (load the model with eager attention)"
            )
        bins = self.n_bins
        mean = self.k_sq[:, :bins] / self.count[:bins].clamp_min(1)[None, :, None, None]
        first = (self.k_first / self.documents).square()
        decode = getattr(getattr(self.model, "tokenizer", None), "decode", None)
        return KeyObservation(
            bins=np.array([0] + [1 << i for i in range(bins - 1)], dtype=np.int64),
            rms=(self._of_units(mean) / self._dims()).sqrt().numpy(),
            first_rms=(self._of_units(mean[:, 0]) / self._dims()).sqrt().numpy(),
            first_mean=(self._of_units(first) / self._dims()).sqrt().numpy(),
            mass=(self.mass / self.queries).numpy(),
            uniform=self.even / self.queries,
            advantage=self._of_units(self.advantage / self.queries).numpy(),
            tokens=[
                [_spelled(entry, decode) for _, _, entry in sorted(heap, reverse=True)]
                for heap in self.largest
            ],
            n_documents=self.documents,
            n_tokens=self.n_tokens,
            text=text,
        )


def _spelled(entry: dict[str, Any], decode: Any) -> dict[str, Any]:
    if decode is not None:
        entry["text"] = decode([entry["token"]])
        entry["before"] = decode(entry["before"])
    return entry
