"""``ablate`` and ``ablation_hooks``: cut key dimensions of a running model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gainlens.ablation.counted_hooks import AblationHooks
from gainlens.ablation.cut import Cut, check_cut
from gainlens.ablation.key_cache import KeyCache
from gainlens.model.hooks import attached
from gainlens.model.sites import Stage
from gainlens.probes.gains import KeyGains


def ablation_hooks(
    model: Any,
    cut: Cut,
    mode: str = "zero",
    *,
    stage: Stage | None = None,
    gains: KeyGains | None = None,
    cache: KeyCache | None = None,
    seed: int = 0,
) -> AblationHooks:
    """Hooks that make a cut in a running model.

    The hooks return a new tensor and never write into the model's own. Where a split rotary pair
    is cut on a model without a hook after its rotation, the rotation of the running pass is
    followed, positions and all.

    Args:
        model: a TransformerBridge or HookedTransformer.
        cut: what goes: a ``KeyMask``, or any other kind of cut of this model.
        mode: what cut dimensions of a mask carry: a row of ``gainlens.ablation.modes.MODES``.
        stage: where a mask is cut; by default after every norm and rotation (``rotated``), also on
            models that fire no hook there: their keys are turned, cut and turned back.
        gains: for the modes that need calibration statistics (``mean``).
        cache: for the modes that need the keys of another run (``resample``, ``patch``).
        seed: which other document gives its value in ``resample``.

    Raises:
        InputError: a cut of another model, gains of another model, an unknown mode or stage, a
            mode without what it needs, a mode for a kind of cut that has none.
        UnsupportedModelError: a cut at ``projected`` on a model with a norm after it.

    Example:
        >>> hooks = gl.ablation_hooks(model, mask, mode="zero")
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    """
    chosen = check_cut(cut).in_mode(mode, stage=stage, gains=gains, cache=cache, seed=seed)
    return chosen.hooks(model)


@contextmanager
def ablate(
    model: Any,
    cut: Cut,
    mode: str = "zero",
    *,
    stage: Stage | None = None,
    gains: KeyGains | None = None,
    cache: KeyCache | None = None,
    seed: int = 0,
) -> Iterator[AblationHooks]:
    """Cut inside a ``with``; the model is as before on leaving, also after an exception.

    Arguments and errors as for ``ablation_hooks``; hooks of the user's own stay.

    Raises:
        SilentSiteError: on leaving, if no forward pass went through every layer.

    Example:
        >>> with gl.ablate(model, mask, mode="mean", gains=gains):
        ...     logits = model(tokens)
    """
    hooks = ablation_hooks(model, cut, mode, stage=stage, gains=gains, cache=cache, seed=seed)
    with attached(model, hooks, cut=True):
        yield hooks
    hooks.check_fired()
