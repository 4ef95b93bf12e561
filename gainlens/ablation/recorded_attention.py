"""Queries and keys of the intact model on calibration text, and how each layer attends with them.

One pass over the text records every layer: all keys, and the queries at some of the positions.
What is recorded stays in memory while it is small and goes into a temporary folder beyond that, so
memory does not grow with the text; a fit reads it back layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from gainlens.data.batches import TOKENS_PER_BATCH
from gainlens.errors import UnsupportedModelError
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, attached
from gainlens.model.recorder import query_key_hooks
from gainlens.model.rotation import Turn
from gainlens.model.running import is_exact
from gainlens.model.sites import KeySites, Stage

PATTERN_TOLERANCE, HALF_TOLERANCE = 2e-3, 5e-2
"""Largest difference in an attention output that rounding explains, in float32 and below it; its
values are of size 1."""

IN_MEMORY = 1 << 30
"""Bytes of recorded queries and keys beyond which they go to disk."""


@dataclass(frozen=True)
class Attention:
    """How a layer turns query-key products into attention.

    Attributes:
        scale: what a product is multiplied by.
        window: how many keys a query sees, itself included; None for all before it.
        soft_cap: c of c·tanh(logit / c), in nats; None without.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def visible(
        self, at: Int[torch.Tensor, "*doc query_pos"], n_keys: int
    ) -> Bool[torch.Tensor, "*doc query_pos key_pos"]:
        """Which keys of positions 0 … ``n_keys`` - 1 the queries at ``at`` see."""
        distance = at[..., None] - torch.arange(n_keys)
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)

    def pattern(
        self,
        logits: Float[torch.Tensor, "*rest query_pos key_pos"],
        seen: Bool[torch.Tensor, "*doc query_pos key_pos"],
    ) -> Float[torch.Tensor, "*rest query_pos key_pos"]:
        """Attention weights of scaled products."""
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits.masked_fill(~seen, -torch.inf).softmax(-1)


Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rotated queries ``[query_pos, head, d_head]``, keys ``[pos, kv_head, d_head]`` of a document, and
the positions of the queries."""


class RecordedAttention:
    """What ``record_attention`` found; a context manager, since it may hold a temporary folder.

    Attributes:
        sites: of the model.
        attention: per layer.
        at: positions of the recorded queries, per document.
        lengths: of the documents.
    """

    def __init__(
        self,
        sites: KeySites,
        attention: Sequence[Attention],
        at: list[Int[torch.Tensor, " _"]],
        lengths: list[int],
    ) -> None:
        self.sites, self.attention, self.at, self.lengths = sites, list(attention), at, lengths
        per_token = sites.n_layers * sites.d_head * 4
        n_bytes = per_token * sum(
            n * sites.n_kv_heads + len(rows) * sites.n_heads
            for n, rows in zip(lengths, at, strict=True)
        )
        self._folder = TemporaryDirectory() if n_bytes > IN_MEMORY else None
        self._documents: list[dict[str, torch.Tensor] | Path] = []
        self._turns: dict[tuple[int, int], Turn] = {}

    def __enter__(self) -> RecordedAttention:
        return self

    def __exit__(self, *error: object) -> None:
        self._documents.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, document: dict[str, torch.Tensor]) -> None:
        """Take the tensors ``q.LAYER`` and ``k.LAYER`` of the next document."""
        if self._folder is None:
            self._documents.append(document)
            return
        path = Path(self._folder.name) / f"{len(self._documents)}.safetensors"
        save_file(document, path)
        self._documents.append(path)

    def wants_turn(self, layer: int, n_pos: int) -> bool:
        """Whether the rotation of documents of this length is yet to be added."""
        return (layer, n_pos) not in self._turns and n_pos == self._read_at(n_pos)

    def add_turn(self, layer: int, n_pos: int, turn: Turn) -> None:
        """Take the rotation of a layer in documents of ``n_pos`` tokens."""
        self._turns[layer, n_pos] = turn

    def turn(self, layer: int, n_pos: int) -> Turn:
        """The rotation that a layer had in documents of ``n_pos`` tokens."""
        found = self._turns[layer, self._read_at(n_pos)]
        return found.at(torch.arange(n_pos))

    def _read_at(self, n_pos: int) -> int:
        """Frequencies that hold for every length are read once, on the longest documents."""
        return max(self.lengths) if self.sites.rotation.plain else n_pos

    def layer(self, layer: int) -> Iterator[Seen]:
        """The documents' queries and keys in one layer, in order."""
        for document, at in zip(self._documents, self.at, strict=True):
            if isinstance(document, dict):
                yield document[f"q.{layer}"], document[f"k.{layer}"], at
                continue
            with safe_open(document, "pt") as file:
                yield file.get_tensor(f"q.{layer}"), file.get_tensor(f"k.{layer}"), at


def record_attention(
    model: Any,
    documents: list[Int[torch.Tensor, " _"]],
    stride: int,
    hooks: Sequence[Hook] = (),
    attention: Sequence[Attention] | None = None,
    progress: bool = False,
) -> RecordedAttention:
    """Run the text once and keep every layer's keys, and the queries of every ``stride`` positions.

    Args:
        model: a TransformerBridge or HookedTransformer.
        documents: token ids, of any lengths.
        stride: where the queries are kept; each document starts at another offset, so that all
            positions are covered alike.
        hooks: those of a cut; queries and keys are recorded before they change them, so each layer
            is recorded as the cut layers before it leave it.
        attention: of each layer, if known already.
        progress: show a progress bar over tokens.

    Raises:
        UnsupportedModelError: attention that is more than causal with one scale, a window and a
            soft cap (position biases), found on the longest document.
    """
    sites = key_sites(model)
    if attention is None:
        attention = check_attention(model, max(documents, key=len))
    lengths = [len(d) for d in documents]
    at = [
        torch.arange(
            min((stride - 1 + int(0.618 * n * stride)) % stride, length - 1), length, stride
        )
        for n, length in enumerate(lengths)
    ]
    found = RecordedAttention(sites, attention, at, lengths)
    waiting: dict[str, torch.Tensor] = {}
    following = sites.rotation.follow()

    def record(letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        waiting[f"{letter}.{layer}"] = x.float().cpu()
        if found.wants_turn(layer, x.shape[1]):
            found.add_turn(layer, x.shape[1], following.turn(letter, layer, x.shape[1]).alone())

    with (
        attached(model, [*query_key_hooks(sites, record, following=following), *hooks]),
        tqdm(total=sum(lengths), desc="record", unit="token", disable=not progress) as bar,
    ):
        first = 0
        while first < len(documents):
            most = max(1, TOKENS_PER_BATCH // lengths[first])
            last = first + 1
            while last < min(first + most, len(documents)) and lengths[last] == lengths[first]:
                last += 1
            forward_layers(model, torch.stack(documents[first:last]))
            for row in range(last - first):
                found.add(
                    {
                        name: (x[row][at[first + row]] if name[0] == "q" else x[row]).clone()
                        for name, x in waiting.items()
                    }
                )
            waiting.clear()
            bar.update(sum(lengths[first:last]))
            first = last
    return found


def check_attention(model: Any, document: Int[torch.Tensor, " pos"]) -> list[Attention]:
    """How each layer attends, checked on the model itself over a whole document.

    The values are replaced by random signs, one vector per position, so that a layer's attention
    output tells whether its weights are those of the queries and keys that were seen.

    Raises:
        UnsupportedModelError: of no scale, window and soft cap that the configuration names.
    """
    sites = key_sites(model)
    tolerance = PATTERN_TOLERANCE if is_exact(model) else HALF_TOLERANCE
    at = torch.arange(len(document))
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, torch.Tensor] = {}
    found: dict[int, Attention | None] = {}

    def record(letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
        seen[letter] = x[0].float().cpu().transpose(0, 1)

    def mark(values: torch.Tensor, hook: Any) -> torch.Tensor:
        if "signs" not in seen:
            shape = (values.shape[1], values.shape[-1])
            seen["signs"] = torch.randint(0, 2, shape, generator=generator).float() * 2 - 1
        signs = seen["signs"].to(values)
        return signs[None, :, None, :].expand(values.shape).clone()

    def read(z: torch.Tensor, hook: Any, *, layer: int) -> None:
        given = z[0].detach().float().cpu().reshape(len(document), sites.n_heads, -1)
        found[layer] = None
        for attention in _candidates(model, sites, layer):
            visible = attention.visible(at, len(at))
            worst = 0.0
            for head in range(sites.n_heads):
                keys = seen["k"][head // sites.group_size]
                weights = attention.pattern(attention.scale * seen["q"][head] @ keys.T, visible)
                worst = max(worst, float((weights @ seen["signs"] - given[:, head]).abs().max()))
            if worst <= tolerance:
                found[layer] = attention
                break

    hooks = query_key_hooks(sites, record)
    for layer in range(sites.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_v", mark))
        hooks.append((f"blocks.{layer}.attn.hook_z", partial(read, layer=layer)))
    with attached(model, hooks):
        forward_layers(model, document[None])
    chosen = []
    for layer in range(sites.n_layers):
        attention = found.get(layer)
        if attention is None:
            raise UnsupportedModelError(
                f"{sites.architecture}: attention of layer {layer} is more than causal attention "
                "with one scale, a window and a soft cap (a position bias?), which refit does not "
                "describe"
            )
        chosen.append(attention)
    return chosen


def _candidates(model: Any, sites: KeySites, layer: int) -> list[Attention]:
    """Every way to attend that the configuration names, the plainest first."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    scale = sites.logit_scale[layer]
    windows: list[int | None] = [None]
    caps: list[float | None] = [None]
    window = getattr(config, "sliding_window", None) or getattr(model.cfg, "window_size", None)
    if isinstance(window, int) and window > 0:
        windows.append(window)
    cap = getattr(config, "attn_logit_softcapping", None)
    cap = cap or getattr(model.cfg, "attn_scores_soft_cap", None)
    if cap and cap > 0:
        caps.insert(0, float(cap))
    return [Attention(scale, window, cap) for window, cap in product(windows, caps)]
