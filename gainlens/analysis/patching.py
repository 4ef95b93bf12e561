"""Activation patching of single key units, and its estimate from one backward pass.

The corrupted prompt is run with the key of one unit taken from the clean prompt, and the change
in a metric of the logits is recorded: one value per layer × key head × unit. A change in layer l
does not affect the layers below it, so those are not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_cache import KeyCache, one_length
from gainlens.analysis.patch_effects import PatchEffects
from gainlens.analysis.skipped_layers import Prefix
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.errors import InputError
from gainlens.model.fast_copy import Edit
from gainlens.model.finding_sites import key_sites
from gainlens.model.hooks import Hook, attached
from gainlens.model.running import measures, model_device
from gainlens.model.sites import KeySites
from gainlens.probes.gains import UNITS

Metric = Callable[[torch.Tensor], Any]
"""Maps logits ``[document, pos, vocab]`` of the patched run to one number."""


def unit_dims(sites: KeySites, unit: str) -> list[list[int]]:
    """The dimensions of each unit."""
    if unit not in UNITS:
        raise InputError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if unit == "dim":
        return [[d] for d in range(sites.d_head)]
    return [sorted({d, int(p)}) for d, p in enumerate(sites.partner) if d <= int(p)]


@measures
def patch_keys(
    model: Any,
    clean: Tokens | KeyCache,
    corrupted: Tokens,
    *,
    metric: Metric,
    unit: str = "pair",
    layers: Sequence[int] | None = None,
    cut: Cut | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> PatchEffects:
    """Run ``corrupted`` with each unit's key from ``clean``, at all positions.

    Args:
        model: a TransformerBridge or HookedTransformer.
        clean: tokens ``[document, pos]``, or their ``KeyCache`` (``PatchEffects.clean`` is then
            NaN).
        corrupted: tokens ``[document, pos]`` of the same shape.
        metric: maps logits ``[document, pos, vocab]`` to one number.
        unit: ``pair`` (both dimensions of a rotary pair at once) or ``dim``.
        layers: which layers; by default all.
        cut: applied in every run, also of the clean prompt, to study the cut model.
        tokens_per_batch: upper bound on tokens per forward pass; units are batched together.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar over units.

    Raises:
        InputError: prompts of different shape, an unknown unit or layer, or a metric that does not
            return one finite number.

    Example:
        >>> answer, other = 5, 7  # token ids
        >>> effects = gl.patch_keys(
        ...     model, calibration[:1, :16], validation[:1, :16], layers=[1],
        ...     metric=lambda logits: logits[0, -1, answer] - logits[0, -1, other],
        ... )
        >>> effects.effect.shape  # layer, key head, pair
        (4, 2, 16)
    """
    sites = key_sites(model)
    groups = unit_dims(sites, unit)
    prompt = one_length(corrupted, int(model.cfg.d_vocab), "corrupted")
    if not isinstance(clean, KeyCache):
        clean = one_length(clean, int(model.cfg.d_vocab), "clean")
    with _made(model, cut, prompt):
        cache = clean if isinstance(clean, KeyCache) else KeyCache.run(model, clean)
    _check_cache(cache, prompt, sites)
    wanted = _layer_list(layers, sites)
    prompt = prompt.to(model_device(model))
    effect = np.full((sites.n_layers, sites.n_kv_heads, len(groups)), np.nan)
    todo = [(head, number) for head in range(sites.n_kv_heads) for number in range(len(groups))]
    at_once = max(1, tokens_per_batch // prompt.numel())
    runner = _Runner(evaluator_of(model, evaluator), prompt, cut)
    end = float("nan")
    if not isinstance(clean, KeyCache):
        end = _number(metric(runner.intact(clean)), metric, "the clean prompt")
    start = _number(metric(runner.intact(prompt)), metric, "the corrupted prompt")
    with tqdm(
        total=len(wanted) * len(todo), desc="patch", unit="unit", disable=not progress
    ) as bar:
        for layer in wanted:
            for first in range(0, len(todo), at_once):
                chosen = todo[first : first + at_once]
                take = torch.zeros(len(chosen), sites.n_kv_heads, sites.d_head, dtype=torch.bool)
                for row, (head, number) in enumerate(chosen):
                    take[row, head, groups[number]] = True
                logits = runner.patched(layer, cache.keys[layer], take)
                for (head, number), one in zip(chosen, logits, strict=True):
                    where = f"layer {layer}, head {head}, dims {groups[number]}"
                    effect[layer, head, number] = _number(metric(one), metric, where) - start
                bar.update(len(chosen))
    return PatchEffects(effect, end, start, tuple(g[0] for g in groups), unit, "exact")


@measures
def attribution_patching(
    model: Any,
    clean: Tokens | KeyCache,
    corrupted: Tokens,
    *,
    metric: Metric,
    unit: str = "pair",
) -> PatchEffects:
    """The first-order estimate of ``patch_keys``: (clean key - corrupted key) · d metric / d key.

    One forward and one backward pass for all units together (Nanda 2023). Arguments as for
    ``patch_keys``; ``metric`` must be differentiable.

    Raises:
        InputError: as for ``patch_keys``, or a metric that does not depend on the logits.
    """
    sites = key_sites(model)
    groups = unit_dims(sites, unit)
    prompt = one_length(corrupted, int(model.cfg.d_vocab), "corrupted")
    if not isinstance(clean, KeyCache):
        clean = one_length(clean, int(model.cfg.d_vocab), "clean")
    cache = clean if isinstance(clean, KeyCache) else KeyCache.run(model, clean)
    _check_cache(cache, prompt, sites)
    prompt = prompt.to(model_device(model))
    value, keys, gradients = _key_gradients(model, prompt, metric, sites)
    effect = np.empty((sites.n_layers, sites.n_kv_heads, len(groups)))
    for layer, (k, gradient) in enumerate(zip(keys, gradients, strict=True)):
        share = ((cache.keys[layer].to(k) - k) * gradient).sum((0, 1)).double().cpu().numpy()
        for number, dims in enumerate(groups):
            effect[layer, :, number] = share[:, dims].sum(1)
    if not np.isfinite(effect).all():
        layer = int(np.argwhere(~np.isfinite(effect))[0, 0])
        raise InputError(
            f"metric={_name(metric)} has no finite gradient at the keys of layer {layer}: "
            "attribution patching needs one"
        )
    end = float("nan")
    if not isinstance(clean, KeyCache):
        with torch.inference_mode():
            end = _number(metric(model(clean, return_type="logits")), metric, "the clean prompt")
    return PatchEffects(effect, end, value, tuple(g[0] for g in groups), unit, "attribution")


class _Runner:
    """Forward passes of the corrupted prompt from a given layer on, several patches at once."""

    def __init__(self, evaluator: Evaluator, prompt: torch.Tensor, cut: Cut | None) -> None:
        self.model, self.prompt, self.cut = evaluator.model, prompt, cut
        self.sites = evaluator.sites
        self.fast_copy = evaluator.fast_copy
        self.hooked = not hasattr(self.model, "original_model")
        self.residuals: list[torch.Tensor] = []
        self.prefix = None if self.hooked else Prefix(self.model)

    @torch.inference_mode()
    def intact(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of a prompt; stores the input of each layer for the last prompt run."""
        tokens = tokens.to(self.prompt.device)
        if self.fast_copy is not None:
            with self.fast_copy.edited(self._edit(tokens)):
                self.residuals = self.fast_copy.residuals(tokens)
                return self.fast_copy.logits(self.fast_copy.hidden(tokens))
        if self.prefix is not None:
            with _made(self.model, self.cut, tokens):
                return self.prefix.read(tokens)
        found: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor, hook: Any, *, layer: int) -> None:
            found[layer] = x

        # The output of a block, so that hooks on the input of the next one act in the partial run.
        hooks: list[Hook] = [
            (f"blocks.{layer - 1}.hook_resid_post", partial(keep, layer=layer))
            for layer in range(1, self.sites.n_layers)
        ]
        with _made(self.model, self.cut, tokens), attached(self.model, hooks):
            logits: torch.Tensor = self.model(tokens, return_type="logits")
        self.residuals = [tokens, *(found[layer] for layer in sorted(found))]
        return logits

    def _edit(self, tokens: torch.Tensor) -> Edit | None:
        return None if self.cut is None else self.cut.edit(self.model, tokens)

    @torch.inference_mode()
    def patched(
        self, layer: int, clean: torch.Tensor, take: torch.Tensor
    ) -> Float[torch.Tensor, "patch document pos vocab"]:
        """Logits with the taken dimensions of ``layer`` from ``clean``, per row of ``take``."""
        n, rows = len(take), len(self.prompt)
        taken = take.repeat_interleave(rows, 0)[:, None].to(self.prompt.device)
        source = clean.expand(rows, *clean.shape[1:]).repeat(n, 1, 1, 1)
        tokens = self.prompt.repeat(n, 1)
        if self.fast_copy is not None:
            made = self._edit(tokens)

            def edit(
                q: torch.Tensor, k: torch.Tensor, at: int
            ) -> tuple[torch.Tensor, torch.Tensor]:
                q, k = (q, k) if made is None else made(q, k, at)
                return q, torch.where(taken, source.to(k), k) if at == layer else k

            with self.fast_copy.edited(edit):
                residual = self.residuals[layer].repeat(n, 1, 1)
                hidden = self.fast_copy.hidden_from(layer, residual, tokens)
            logits = self.fast_copy.logits(hidden)
        else:
            stage = self.sites.hook_stage("rotated")
            following = self.sites.rotation.follow()

            def put(k: torch.Tensor, hook: Any) -> torch.Tensor:
                if stage == "rotated" or not self.sites.rotary_dim:
                    return torch.where(taken, source.to(k), k)
                turn = following.turn("k", layer, k.shape[1])
                turned = torch.where(taken, source.to(k), turn.heads(k))
                return turn.heads(turned, inverse=True)

            patch: list[Hook] = [*following.hooks(), (self.sites.key_hook(layer, stage), put)]
            with _made(self.model, self.cut, tokens), attached(self.model, patch):
                if self.prefix is None and layer:
                    residual = self.residuals[layer].repeat(n, 1, 1)
                    logits = self.model(residual, start_at_layer=layer, return_type="logits")
                elif self.prefix is not None and self.prefix.residuals:
                    with self.prefix.skipped(layer, n):
                        logits = self.model(tokens, return_type="logits")
                else:
                    logits = self.model(tokens, return_type="logits")
        return logits.reshape(n, rows, *logits.shape[1:])


def _made(model: Any, cut: Cut | None, tokens: torch.Tensor) -> AbstractContextManager[None]:
    return nullcontext() if cut is None else attached(model, cut.hooks(model, tokens))


def _key_gradients(
    model: Any, prompt: torch.Tensor, metric: Metric, sites: KeySites
) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """The metric, and per layer the rotated keys and its gradient with respect to them."""
    stage = sites.hook_stage("rotated")
    at_site: dict[int, torch.Tensor] = {}
    following = sites.rotation.follow()

    def begin(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.detach().requires_grad_()

    def keep(k: torch.Tensor, hook: Any, *, layer: int) -> torch.Tensor:
        at_site[layer] = k
        return k

    hooks: list[Hook] = [*following.hooks(), ("blocks.0.hook_resid_pre", begin)]
    for layer in range(sites.n_layers):
        hooks.append((sites.key_hook(layer, stage), partial(keep, layer=layer)))
    with torch.inference_mode(False), torch.enable_grad(), attached(model, hooks):
        value = metric(model(prompt.clone(), return_type="logits"))
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            raise InputError("metric does not depend on the logits in a differentiable way")
        start = _number(value, metric, "the corrupted prompt")
        keys = [at_site[layer] for layer in range(sites.n_layers)]
        gradients = list(torch.autograd.grad(value.sum(), keys))
    keys = [k.detach() for k in keys]
    if stage == "projected" and sites.rotary_dim:
        for layer in range(sites.n_layers):
            turn = following.turn("k", layer, keys[layer].shape[1])
            keys[layer], gradients[layer] = turn.heads(keys[layer]), turn.gradient(gradients[layer])
    return start, keys, gradients


def _check_cache(cache: KeyCache, prompt: torch.Tensor, sites: KeySites) -> None:
    if cache.stage != "rotated":
        raise InputError(f"clean was recorded at stage={cache.stage!r}: expected 'rotated'")
    shape = (cache.n_documents, cache.n_pos)
    if cache.n_pos != prompt.shape[1] or cache.n_documents not in (1, prompt.shape[0]):
        raise InputError(
            f"clean has [document, position] = {shape}: corrupted has {tuple(prompt.shape)}, "
            "expected the same, so that positions match"
        )
    if len(cache.keys) != sites.n_layers or cache.keys[0].shape[2:] != sites.shape[1:]:
        raise InputError("clean is the cache of another model")


def _layer_list(layers: Sequence[int] | None, sites: KeySites) -> list[int]:
    chosen = list(range(sites.n_layers)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 0 <= layer < sites.n_layers]
    if wrong or not chosen:
        raise InputError(f"layers={layers!r}: expected some of 0 to {sites.n_layers - 1}")
    return chosen


def _number(value: Any, metric: Metric, where: str) -> float:
    name = _name(metric)
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"metric={name} gave {type(value).__name__} for {where}: expected one number"
        ) from None
    if not np.isfinite(number):
        raise InputError(f"metric={name} gave {number} for {where}: expected a finite number")
    return number


def _name(metric: Metric) -> str:
    return str(getattr(metric, "__name__", repr(metric)))
