"""``Student``: one set of weights that runs intact (the teacher) or at virtual width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from gainlens.data.batches import Tokens, batches
from gainlens.errors import InputError, SilentSiteError
from gainlens.export.adapters import check_no_adapters
from gainlens.export.after_norm import maps_follow
from gainlens.export.plan import SlicePlan
from gainlens.export.slim_model import check_maps, plan_value_paths
from gainlens.export.sources import open_source
from gainlens.model.context import context_of
from gainlens.model.fast_copy import FastCopy, build_fast_copy
from gainlens.model.finding_sites import key_sites
from gainlens.model.forward import cross_entropy, hooked_head
from gainlens.model.hooks import Hook, attached
from gainlens.model.recorder import query_key_hooks
from gainlens.model.running import evaluating
from gainlens.model.sites import Stage
from gainlens.training.find import find_slices
from gainlens.training.halves import Halves
from gainlens.training.norm_maps import NormMaps
from gainlens.training.plans import check_plan, thin_values
from gainlens.training.processes import Processes
from gainlens.training.sharding import Shards, check_whole, sharded
from gainlens.training.slices import (
    Slice,
    frozen,
    leaves,
    shown,
    swapped,
)
from gainlens.training.slot_turns import SlotTurns

SAME_LOGITS = 1e-3
"""Largest difference from the logits of the model at which the fast copy is used, float32."""
PRECISIONS = ("float32", "bfloat16")

QueriesKeys = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, queries ``[batch, pos, head, d_head]`` and keys, after every norm and rotation."""


class Student:
    """The model in training and the intact model, in one object.

    Forward passes use a fast copy with fused attention (``gainlens.model.fast_copy``) if one gives
    the same logits as the model, otherwise the model itself.

    Args:
        model: a TransformerBridge, a HookedTransformer or a transformers model.
        plan: the active units; its maps are first folded into the active rows, or act after the
            norm on queries and keys where there is one.
        train: which weights to train; see ``gainlens.training.find.TRAINABLE``.
        precision: ``float32``, or ``bfloat16`` for matrix products in bfloat16 with weights,
            residual stream, gradients and optimiser in float32. While a run lasts, matrices that
            are not trained are held in bfloat16 as well.
        text: needed for a plan that cuts values: thin values start from the best ones for it.

    Attributes:
        slices: the active slices of each parameter.
        train: names of the trained weights.
        n_heads: number of query heads.
        maps: those of the plan that act after a norm; None where there are none, or they fold.
        paths: thin values by layer, where training started from; empty if values are whole.
        shards: the parts of the layer weights, if processes divide them.

    Raises:
        InputError: the plan is of another model, in another basis, or cuts values without a text;
            see ``find_slices``.
        UnsupportedModelError: this family cannot be made slim.
    """

    def __init__(
        self,
        model: Any,
        plan: SlicePlan,
        train: tuple[str, ...] = ("q", "k"),
        precision: str = "float32",
        text: Tokens | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
        check_whole(model)
        check_no_adapters(model, "trained at virtual width")
        source = open_source(model)
        check_plan(plan)
        plan.check_model(source.shape, source.fingerprint, source.architecture)
        plan.check_pairs(source.family.pairs(source.config))
        check_maps(plan, source)
        paths = plan_value_paths(source, plan, text) if thin_values(plan) else []
        self.paths = [None if path is None else path.orthonormal for path in paths]
        self.model, self.plan, self.precision = model, plan, precision
        self.train = tuple(train)
        self.family, self.config = source.family, source.config
        self.fingerprint, self.architecture = source.fingerprint, source.architecture
        self.n_heads = int(source.config.num_attention_heads)
        self.vocabulary = int(source.config.vocab_size)
        self.device = source.device
        lens = hasattr(model, "hook_dict")
        bridge = lens and hasattr(model, "original_model")
        self._longest: int | None = None
        if lens and not bridge:
            self._longest = int(model.cfg.n_ctx)
        elif not self.family.rotary_dim(self.config):
            self._longest = context_of(source)
        # A bridge trains separate parts of a joint matrix, which a fast copy does not use.
        joint = bridge and source.family.layout.joint
        self.fast_copy = (
            None if joint or (lens and not bridge) else self._verified_fast_copy(bridge)
        )
        if self.fast_copy is None and not lens:
            raise InputError(
                f"model={type(model).__name__}: this transformers model can't be run by gainlens; "
                "wrap it as a TransformerBridge"
            )
        root: Any = model if self.fast_copy is None else self.fast_copy.model
        kind = "huggingface" if self.fast_copy is not None else "bridge" if bridge else "hooked"
        self.root = root
        self.shards: Shards | None = None
        pairing = self.family.pairs(self.config).pairing
        self._slots: SlotTurns | None = None
        if plan.frequencies is not None:
            own = source.rotary_frequencies()
            self._slots = SlotTurns(plan.frequencies, own, pairing, plan.keep)
            if "frequencies" in train:
                self._slots.to(self.device)
        self.maps: NormMaps | None = None
        if plan.maps is not None and maps_follow(self.family, self.config, plan.maps):
            own = source.rotary_frequencies()
            self.maps = NormMaps(plan.maps, own, pairing, next(root.parameters()))
        self.slices: list[Slice] = find_slices(
            root,
            kind,
            self.family,
            self.config,
            plan,
            self.train,
            self.maps,
            self.paths,
            self._slots,
        )
        norm = self.family.key_norm(self.config)
        self._keep = None if norm is None else plan.keep.to(self.device)
        self._halves: Halves | None = None
        self._hooks: list[Hook] = []
        if self.fast_copy is None and self._keep is not None:
            self._hooks = self._rotated_hooks()
        elif self.fast_copy is None and self._slots is not None:
            self._hooks = self._slots.hooks()

    def _verified_fast_copy(self, bridge: bool) -> FastCopy | None:
        inner = self.model.original_model if bridge else self.model
        shim = SimpleNamespace(
            original_model=inner, cfg=SimpleNamespace(n_layers=self.plan.shape[0])
        )
        fast_copy = build_fast_copy(shim)
        if fast_copy is None:
            return None
        generator = torch.Generator().manual_seed(0)
        length = min(12, context_of(self) or 12)
        tokens = torch.randint(0, self.vocabulary, (2, length), generator=generator)
        tokens = tokens.to(self.device)
        try:
            with torch.no_grad(), evaluating(self.model):
                own = (
                    self.model(tokens, return_type="logits")
                    if bridge
                    else self.model(tokens, use_cache=False).logits
                )
                got = fast_copy.logits(fast_copy.hidden(tokens))
        except Exception:  # a family that can't be run this way; the model itself does the work
            return None
        size = float(own.abs().max().clamp_min(1.0))
        tolerance = SAME_LOGITS if fast_copy.exact else 5e-2
        return fast_copy if float((own - got).abs().max()) <= tolerance * size else None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The trained tensors, in order."""
        return leaves(self.slices)

    def full(self) -> list[tuple[Slice, torch.Tensor]]:
        """Full-width tensors of the present weights, part of the graph where grad is enabled."""
        return [(part, part.full()) for part in shown(self.slices)]

    def intact(self) -> list[tuple[Slice, torch.Tensor]]:
        """The weights before training; nothing needs to stand in before they are written."""
        return [(part, part.intact()) for part in shown(self.slices) if part.before is not None]

    def write(self) -> None:
        """Put the active rows into the model's own parameters."""
        for part in self.slices:
            part.write()

    def frequencies(self) -> Float[torch.Tensor, "layer kv_head rotary_pair"] | None:
        """Those of the plan's slots as last written, radians per token; None without slots."""
        return None if self._slots is None else self._slots.frequencies()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around all forward passes of a run: no stored parameter takes a gradient."""
        with evaluating(self.root), frozen(self.root):
            outer, self._halves = self._halves, self._halves or self._untrained()
            try:
                yield
            finally:
                self._halves = outer

    def _untrained(self) -> Halves | None:
        if self.fast_copy is None:
            return None
        return Halves(self.root, {id(part.stored) for part in self.slices})

    @contextmanager
    def sharded(self, processes: Processes) -> Iterator[None]:
        """Inside the ``with``, processes divide the layers' weights that are not trained.

        Raises:
            InputError: a model that only its own code runs.
        """
        if self.fast_copy is None:
            raise InputError(
                f"shard=True: {self.architecture} as {type(self.model).__name__} keeps weights "
                "that can't be divided; expected a transformers model"
            )
        trained = {id(part.stored) for part in self.slices}
        try:
            with sharded(self.fast_copy._layers, trained, processes) as self.shards:
                yield
        finally:
            self.shards = None

    def hidden(
        self,
        tokens: Int[torch.Tensor, "document pos"],
        weights: list[tuple[Slice, torch.Tensor]],
        *,
        cut: bool,
        seen: QueriesKeys | None = None,
    ) -> Float[torch.Tensor, "document pos width"]:
        """What the output head reads (logits, of a bridge without a fast copy).

        Args:
            tokens: the text.
            weights: from ``full`` or ``intact``.
            cut: whether ghosts are masked (or maps act) after a norm on keys, and slots turn.
            seen: takes the queries and keys of each layer.
        """
        with swapped(weights), self._autocast():
            return self._hidden(tokens.to(self.device), cut, seen)

    def logits(
        self,
        hidden: Float[torch.Tensor, "row width"],
        weights: list[tuple[Slice, torch.Tensor]],
    ) -> Float[torch.Tensor, "row vocab"]:
        """The output head on some positions, float32."""
        with swapped(weights), self._autocast():
            if self.fast_copy is not None:
                found = self.fast_copy.logits(hidden[None])[0]
            elif hasattr(self.model, "original_model"):
                found = hidden
            else:
                found = hooked_head(self.model, hidden[None])[0]
            return found.to(torch.promote_types(found.dtype, torch.float32))

    def losses(
        self, tokens: Int[torch.Tensor, "document pos"], *, intact: bool = False
    ) -> Float[np.ndarray, " document"]:
        """Mean next-token loss of each document, nats per token; in float32 throughout."""
        losses: Float[np.ndarray, " document"] = (
            self.token_losses(tokens, intact=intact).double().mean(1).numpy()
        )
        return losses

    def token_losses(
        self, tokens: Int[torch.Tensor, "document pos"], *, intact: bool = False
    ) -> Float[torch.Tensor, "document next_pos"]:
        """Next-token loss at each position, nats, on the CPU; in float32 throughout."""
        was, self.precision = self.precision, "float32"
        try:
            with torch.no_grad(), self.running():
                weights = self.intact() if intact else self.full()
                hidden = self.hidden(tokens, weights, cut=not intact)
                found = cross_entropy(
                    lambda part: self.logits(part[0], weights)[None],
                    hidden,
                    tokens.to(self.device),
                )
        finally:
            self.precision = was
        return found.cpu()

    def batches(
        self, tokens: Tokens, name: str = "tokens"
    ) -> Iterator[Int[torch.Tensor, "document pos"]]:
        """Checked batches of a text.

        Args:
            tokens: documents of any length.
            name: what an error calls them.

        Raises:
            InputError: see ``gainlens.data.batches``; a document beyond learned positions.
        """
        for batch in batches(tokens, self.vocabulary):
            if self._longest is not None and batch.shape[1] > self._longest:
                raise InputError(
                    f"{name} holds a document of {batch.shape[1]} tokens: this model reads at "
                    f"most {self._longest}"
                )
            yield batch

    def document_losses(
        self, tokens: Tokens, *, intact: bool = False
    ) -> Float[np.ndarray, " document"]:
        """As ``losses``, of any number of documents of any length."""
        found = [self.losses(batch, intact=intact) for batch in self.batches(tokens)]
        return np.concatenate(found)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        on = self.precision == "bfloat16"
        halves = self._halves if on and self.shards is None else None
        casting = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)
        with casting, nullcontext() if halves is None else halves.swapped():
            yield

    def _hidden(self, tokens: torch.Tensor, cut: bool, seen: QueriesKeys | None) -> torch.Tensor:
        if self.fast_copy is not None:

            def edit(
                queries: torch.Tensor, keys: torch.Tensor, layer: int
            ) -> tuple[torch.Tensor, torch.Tensor]:
                if cut:
                    queries, keys = self._cut(queries, "q", layer), self._cut(keys, "k", layer)
                if seen is not None:
                    seen.append((queries, keys))
                return queries, keys

            with self.fast_copy.edited(edit):
                found = self.fast_copy.hidden(tokens)
            if not self.fast_copy.complete:
                raise SilentSiteError("a layer ran without calling its attention function")
            return found
        hooks = list(self._hooks) if cut else []
        if seen is not None:
            hooks += self._recorders(seen)
        with attached(self.model, hooks):
            if hasattr(self.model, "original_model"):
                logits: torch.Tensor = self.model(tokens, return_type="logits")
                return logits
            last = int(self.model.cfg.n_layers)
            hidden: torch.Tensor = self.model(tokens, return_type=None, stop_at_layer=last)
            return hidden

    def _cut(
        self, x: Float[torch.Tensor, "batch pos head d_head"], letter: str, layer: int
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """What the plan does to rotated queries or keys that no projection has taken in."""
        if self.maps is not None:
            x = self.maps(x, letter, layer)
        elif self._keep is not None and letter == "k":
            x = x * self._keep[layer]
        return x if self._slots is None else self._slots(x, layer)

    def _rotated_hooks(self) -> list[Hook]:
        """The same as hooks, of a model with a norm on its keys."""
        sites = key_sites(self.model)

        def at(x: torch.Tensor, hook: Any, *, letter: str, layer: int) -> torch.Tensor:
            return self._cut(x, letter, layer)

        return [
            (name(layer, "rotated"), partial(at, letter=letter, layer=layer))
            for letter, name in (("q", sites.query_hook), ("k", sites.key_hook))
            for layer in range(sites.n_layers)
        ]

    def _recorders(self, seen: QueriesKeys) -> list[Hook]:
        sites = key_sites(self.model)
        found: dict[int, torch.Tensor] = {}

        def record(letter: str, layer: int, stage: Stage, x: torch.Tensor) -> None:
            if letter == "q":
                found[layer] = x
            else:
                seen.append((found[layer], x))

        return query_key_hooks(sites, record, detach=False)
