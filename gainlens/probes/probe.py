"""Gather key gains with hooks on every key and query site, in constant memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from gainlens.data.batches import TOKENS_PER_BATCH, Tokens
from gainlens.data.document_identity import TextHasher
from gainlens.data.overlap import document_identities
from gainlens.errors import InputError, SilentSiteError
from gainlens.model.finding_sites import key_sites
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.forward import forward_layers
from gainlens.model.hooks import Hook, HookFn, attached, is_cut
from gainlens.model.running import held, model_device
from gainlens.model.tokens import model_batches
from gainlens.probes.backward import forward_backward
from gainlens.probes.gains import KeyGains, ModelCard
from gainlens.probes.scores import get_score
from gainlens.probes.statistics import STATISTICS

DEFAULT_SCORES = ("rms", "std", "qk")


class KeyGainProbe:
    """Gather gains inside your own loop: ``with KeyGainProbe(model) as probe: model(tokens)``.

    Memory does not grow with the number of tokens: only float64 sums of shape
    ``[layer, kv_head, d_head]`` are kept. Every forward pass inside the ``with`` counts, including
    padding, so pass documents without padding.

    Args:
        model: a TransformerBridge or HookedTransformer.
        scores: scores that the gains must support. For ``fisher``, run a loss summed over
            documents and its backward pass inside the ``with``.

    Raises:
        UnsupportedModelError: the model's keys can't be probed.
        SilentSiteError: on exit, if the hooks of some layer fired less often than others, or no
            hook fired.

    Example:
        >>> with gl.KeyGainProbe(model) as probe:
        ...     logits = model(calibration)
        >>> probe.gains().n_documents == len(calibration)
        True
    """

    def __init__(self, model: Any, scores: Sequence[str] = DEFAULT_SCORES) -> None:
        self._model = model
        self.sites = key_sites(model)
        self._fingerprint = model_fingerprint(model)  # raises before any work is done
        names = {name for score in scores for name in get_score(score).statistics}
        self._statistics = [s for name, s in STATISTICS.items() if name in names]
        if not self._statistics:
            raise InputError("scores is empty: expected at least one score")
        self._device = model_device(model)
        # Apple GPUs have no float64, so their sums are kept on the CPU.
        home = "cpu" if self._device.type == "mps" else self._device
        self._sums = {
            array: torch.zeros(self.sites.shape, dtype=torch.float64, device=home)
            for statistic in self._statistics
            for array in statistic.arrays(self.sites)
        }
        self._tokens = [0] * self.sites.n_layers
        self._documents = 0
        self._stack = ExitStack()
        self._texts: list[str] = []
        self._marks: list[str] = []
        self._names: list[str] = []
        self._fires: list[int] = []

    def __repr__(self) -> str:
        names = ", ".join(statistic.name for statistic in self._statistics)
        return (
            f"KeyGainProbe({self.sites.architecture}, statistics of {names}, "
            f"{self._documents} documents, {max(self._tokens)} tokens so far)"
        )

    @property
    def needs_backward(self) -> bool:
        """Whether a backward pass of the loss is needed (``fisher``)."""
        return any(statistic.backward for statistic in self._statistics)

    def hooks(self) -> list[Hook]:
        """The forward hooks, for ``run_with_hooks``; the ``with`` form attaches them itself."""
        found: list[Hook] = [
            (self.sites.key_hook(layer, "projected"), partial(self._count, layer=layer))
            for layer in range(self.sites.n_layers)
        ]
        for statistic in self._statistics:
            found += statistic.hooks(self.sites, self._sums)
        # Hooks that only follow the rotation fill no sum and may fire once per alias.
        follows = [name.endswith(".hook_resid_pre") for name, _ in found]
        self._names = [n for (n, _), skip in zip(found, follows, strict=True) if not skip]
        self._fires = self._fires or [0] * len(self._names)
        numbers = iter(range(len(self._names)))
        return [
            (name, fn if skip else partial(self._fired, run=fn, index=next(numbers)))
            for (name, fn), skip in zip(found, follows, strict=True)
        ]

    def _fired(self, x: torch.Tensor, hook: Any, *, run: HookFn, index: int) -> torch.Tensor | None:
        self._fires[index] += 1
        return run(x, hook=hook)

    def _count(self, keys: torch.Tensor, hook: Any, *, layer: int) -> None:
        self._tokens[layer] += keys.shape[0] * keys.shape[1]
        if layer == 0:
            self._documents += keys.shape[0]

    def __enter__(self) -> KeyGainProbe:
        self._stack.enter_context(attached(self._model, self.hooks()))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stack.close()
        if kind is None:
            self._check_fired()

    def note_text(self, fingerprint: str, marks: Sequence[str] = ()) -> None:
        """Record which text was run, to be stored with the gains.

        Args:
            fingerprint: fingerprint of the whole text.
            marks: identities of its documents, see ``gainlens.data.overlap``.
        """
        self._texts.append(fingerprint)
        self._marks += marks

    def _check_fired(self) -> None:
        expected = max(self._tokens)
        silent = [layer for layer, n in enumerate(self._tokens) if n < expected or n == 0]
        if silent:
            raise SilentSiteError(
                f"the key hooks of layer(s) {silent} saw fewer tokens than the others "
                f"({min(self._tokens)} of {expected}); was a full forward pass run inside the "
                "probe, without stop_at_layer and without reset_hooks?"
            )
        quiet = sorted(
            {n for n, c in zip(self._names, self._fires, strict=True) if c < max(self._fires)}
        )
        if quiet:
            raise SilentSiteError(
                f"hook(s) {', '.join(quiet[:3])} fired less often than the others, so scores that "
                "need them have incomplete data; was a full forward pass run?"
            )

    def check_tokens(self, passed: int) -> None:
        """Raise unless every layer processed exactly the tokens that were passed in.

        Args:
            passed: number of tokens passed in.

        Raises:
            InputError: another thread ran the model in the meantime.
        """
        if set(self._tokens) != {passed}:
            raise InputError(
                f"model processed {max(self._tokens)} tokens while {passed} were probed: another "
                "thread ran it; use a separate model in each thread"
            )

    def _check_backward(self) -> None:
        for name, value in self._sums.items():
            if name.startswith("fisher_documents") and not bool((value == self._documents).all()):
                raise SilentSiteError(
                    f"score 'fisher' saw the gradients of {int(value.min())} of "
                    f"{self._documents} documents: inside the probe, run the loss and its backward "
                    "pass with gradients enabled, or use probe_gains"
                )

    def gains(self) -> KeyGains:
        """The gains gathered so far.

        Raises:
            SilentSiteError: a site did not fire.
            InputError: the statistics are not finite (NaN in the weights or activations).
        """
        self._check_fired()
        self._check_backward()
        sums = {name: value.detach().cpu().clone() for name, value in self._sums.items()}
        for name, value in sums.items():
            bad = ~torch.isfinite(value)
            if bool(bad.any()):
                layer = int(bad.nonzero()[0, 0])
                raise InputError(
                    f"model: {name} of layer {layer} is not finite; expected weights and "
                    "activations without NaN or infinity"
                )
        return KeyGains(
            model=ModelCard.of(self.sites, self._fingerprint),
            sums=sums,
            n_tokens=self._tokens[0],
            n_documents=self._documents,
            texts=tuple(self._texts),
            documents=tuple(self._marks),
            frequencies=self.sites.frequencies.clone(),
        )


def probe_gains(
    model: Any,
    tokens: Tokens,
    scores: Sequence[str] = DEFAULT_SCORES,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> KeyGains:
    """Gather the gains of every key dimension over a text, in one streaming pass.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: long ``[document, position]``, a sequence of documents of any length, or an
            iterable of batches; read once.
        scores: scores that the gains must support.
        tokens_per_batch: upper bound on tokens per forward pass.
        progress: show a progress bar.

    Raises:
        InputError: there is no document, a document has fewer than two tokens, ids are outside the
            vocabulary, or weights are not finite.
        UnsupportedModelError, SilentSiteError: see ``KeyGainProbe``.

    Example:
        >>> gains = gl.probe_gains(model, calibration)
        >>> tuple(gains.score("qk").shape)
        (4, 2, 32)
    """
    # A backward pass is impossible inside the caller's inference mode.
    if is_cut(model):
        warnings.warn(
            "probe_gains inside gainlens.ablate: these are the gains of the model as cut, but they "
            "have the fingerprint of the intact model",
            stacklevel=2,
        )
    with torch.inference_mode(False), held(model):
        probe = KeyGainProbe(model, scores)
        total = len(tokens) if isinstance(tokens, Sequence | torch.Tensor) else None
        hasher, marks, passed = TextHasher(), list[str](), 0
        with probe, tqdm(total=total, desc="probe", unit="doc", disable=not progress) as bar:
            for batch in model_batches(model, tokens, tokens_per_batch):
                hasher.update(batch)
                passed += batch.numel()
                marks += document_identities([batch], getattr(model, "tokenizer", None))
                if probe.needs_backward:
                    forward_backward(model, batch)
                else:
                    forward_layers(model, batch)
                bar.update(len(batch))
        probe.check_tokens(passed)
        probe.note_text(hasher.hexdigest(), marks)
        return probe.gains()
