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
    """Make the hooks that apply a cut in a running model.

    The hooks return a new tensor and never modify the model's tensors in place. If a split rotary
    pair is cut on a model without a hook after its rotation, the hooks use the rotation of the
    running pass, including its positions.

    Args:
        model: a TransformerBridge or HookedTransformer.
        cut: a ``KeyMask`` or any other kind of cut of this model.
        mode: replacement values for a mask: a row of ``gainlens.ablation.modes.MODES``.
        stage: where a mask is applied; by default after all norms and the rotation (``rotated``).
            On models without a hook there, keys are rotated, cut and rotated back.
        gains: calibration statistics, for the modes that need them (``mean``).
        cache: keys of another run, for the modes that need them (``resample``, ``patch``).
        seed: selects the other document whose values ``resample`` uses.

    Raises:
        InputError: a cut or gains of another model, an unknown mode or stage, a mode without the
            arguments that it needs, or a mode that this kind of cut does not support.
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
    """Context manager that cuts the model and restores it on exit, also after an exception.

    The user's own hooks stay attached.

    Args:
        model: a TransformerBridge or HookedTransformer.
        cut: the cut, of any kind.
        mode: name of the mode; see ``ablation_hooks``.
        stage: where the cut acts; the stage of the mode if None.
        gains: means and variances, for the modes that need them.
        cache: cached keys, for the modes that patch.
        seed: seed of the modes that draw at random.

    Raises:
        InputError: see ``ablation_hooks``.
        SilentSiteError: on exit, if no forward pass went through every layer.

    Example:
        >>> with gl.ablate(model, mask, mode="mean", gains=gains):
        ...     logits = model(tokens)
    """
    hooks = ablation_hooks(model, cut, mode, stage=stage, gains=gains, cache=cache, seed=seed)
    with attached(model, hooks, cut=True):
        yield hooks
    hooks.check_fired()
