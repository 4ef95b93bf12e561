"""``Trainer``: the training loop of a run or of one round."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.data.batches import batches
from gainlens.data.document_identity import tensor_digest, text_fingerprint
from gainlens.errors import GainlensError
from gainlens.stats.stopping import skew_interval
from gainlens.training.checkpoint import load_checkpoint, save_checkpoint
from gainlens.training.objectives import attention_divergence, get_objective
from gainlens.training.plans import plan_digest
from gainlens.training.processes import Processes
from gainlens.training.settings import Settings
from gainlens.training.student import QueriesKeys, Student

CHECKED = 256
"""Number of tokens on which weights are checked before they are saved."""
HEAD_ROWS = 128
"""Number of positions whose logits are in memory at a time."""


class TrainingError(GainlensError, RuntimeError):
    """Training cannot continue; the message names the step. The last good checkpoint is kept."""


class Trainer:
    """The training loop, identical on every process.

    ``earlier`` has ``plan`` (a digest) and ``steps`` of each earlier round. The text continues
    where those rounds ended.
    """

    def __init__(
        self,
        student: Student,
        settings: Settings,
        documents: list[Int[torch.Tensor, " _"]],
        watched: list[Int[torch.Tensor, "_ _"]],
        tokens_per_batch: int,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.student, self.settings, self.documents = student, settings, documents
        self.earlier = [dict(row) for row in earlier]
        self.steps_before = sum(int(row["steps"]) for row in self.earlier)
        self.watched, self.tokens_per_batch = watched, tokens_per_batch
        self.objective = get_objective(settings.objective)
        self.processes = Processes.here()
        groups: dict[str, list[torch.Tensor]] = {"qk": [], "other": [], "frequencies": []}
        for part in student.slices:
            if part.leaf is not None:
                groups[part.group].append(part.leaf)
        self.leaves = [leaf for some in groups.values() for leaf in some]
        self.optimizer = settings.make_optimizer(list(groups.items()))
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.n_tokens = 0
        self.stopped = "steps"
        self.bytes: dict[str, int] = {}
        self._intact: Float[np.ndarray, " document"] | None = None
        self._texts = (text_fingerprint(documents), text_fingerprint(watched))

    def header(self) -> dict[str, Any]:
        """What must be unchanged for a run to resume, in the order in which it is reported."""
        student, maps = self.student, self.student.plan.maps
        before = {"earlier rounds": self.earlier} if self.earlier else {}
        return {
            "model": student.fingerprint,
            "plan": plan_digest(student.plan),
            **before,
            "maps": None if maps is None else tensor_digest([maps.queries, maps.keys]),
            "text": self._texts[0],
            "monitored text": self._texts[1],
            "seed": self.settings.seed,
            "settings": self.settings.to_json(),
            "processes": self.processes.count,
        }

    def facts(self) -> dict[str, Any]:
        """Facts about the training for the result."""
        active = sum(leaf.numel() * leaf.element_size() for leaf in self.leaves)
        return {
            "architecture": self.student.architecture,
            "fingerprint_before": self.student.fingerprint,
            "settings": self.settings.to_json(),
            "refit": None if self.student.plan.maps is None else dict(self.student.plan.maps.facts),
            "text": self._texts[0],
            "monitor": self._texts[1],
            "n_documents": len(self.documents),
            "steps": self.curve[-1]["step"] if self.curve else 0,
            "tokens": self.n_tokens,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "processes": self.processes.count,
            "fused_attention": self.student.fast_copy is not None,
            "active_parameters": sum(leaf.numel() for leaf in self.leaves),
            "active_bytes": active,
            **self.bytes,
        }

    @torch.enable_grad()  # a notebook may have turned gradients off for good
    def run(self, checkpoint: Path | None, save_every: int, progress: bool) -> None:
        """Train from the last checkpoint, or the start, to the end."""
        first = 0
        if checkpoint is not None and checkpoint.exists():
            found = load_checkpoint(checkpoint, self.student.slices, self.optimizer, self.header())
            first, self.curve = int(found["step"]), list(found["curve"])
            self.n_tokens, self.seconds = int(found["tokens"]), float(found["seconds"])
            self.stopped, self.bytes = str(found["stopped"]), dict(found["bytes"])
        settings = self.settings
        if not self.curve:
            self.curve.append({"step": 0, "tokens": 0, "loss": None, **self._watch(first)})
        with tqdm(
            total=settings.steps,
            initial=first,
            desc="training",
            unit="step",
            disable=not (progress and self.processes.first),
        ) as bar:
            for step in range(first, settings.steps):
                if self.stopped == "margin":
                    break
                start = time.perf_counter()
                loss = self.step(step)
                self.seconds += time.perf_counter() - start
                row: dict[str, Any] = {"step": step + 1, "tokens": self.n_tokens, "loss": loss}
                last = step + 1 == settings.steps
                if last or (step + 1) % settings.check_every == 0:
                    row |= self._watch(step + 1)
                    limit = settings.stop_margin
                    interval = row.get("interval")
                    if limit is not None and interval is not None and interval[1] < limit:
                        self.stopped = "margin"
                self.curve.append(row)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", **self._last_rise())
                saving = checkpoint is not None and (step + 1) % save_every == 0
                if last or saving or self.stopped == "margin":
                    self._check_good(step + 1)
                    if checkpoint is not None:
                        self._save(checkpoint, step + 1)
        self.processes.wait()

    def step(self, step: int) -> float:
        """One optimiser step; the mean loss per position, nats.

        Raises:
            TrainingError: the loss or the gradient is not finite.
        """
        chosen = self._chosen(step)
        shift = 0 if self.objective.teacher else 1
        count = sum(len(row) - shift for row in chosen)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        mine = self.processes.share(chosen)
        parts = list(batches(mine, self.student.vocabulary, self.tokens_per_batch)) if mine else []
        idle = self._idle(len(parts))
        for batch in parts:
            total += self._backward(batch, count, len(batch) / len(chosen))
        for _ in range(idle):
            self._backward(chosen[0][None, :2], math.inf, 0.0)
        for leaf in self.leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        self.processes.sum_([total, *(leaf.grad for leaf in self.leaves if leaf.grad is not None)])
        self.n_tokens += sum(len(row) for row in chosen)
        clip = self.settings.clip
        norm = torch.nn.utils.clip_grad_norm_(self.leaves, clip if clip is not None else torch.inf)
        loss = float(total)
        if not np.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise TrainingError(
                _not_finite(step + 1, f"loss {loss} and gradient norm {float(norm)}")
            )
        share = self.settings.share_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        self.optimizer.step()
        if not self.bytes:
            self._count_bytes()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _idle(self, passes: int) -> int:
        """Number of empty passes after ``passes``: all processes must take part in gathering."""
        return 0 if self.student.shards is None else self.processes.most(passes) - passes

    def _chosen(self, step: int) -> list[Int[torch.Tensor, " _"]]:
        """The documents of a step; each epoch has its own order."""
        n, batch = len(self.documents), min(self.settings.batch, len(self.documents))
        step += self.steps_before
        found = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, at = divmod(place, n)
            found.append(self.documents[int(self._order(epoch)[at])])
        return found

    def _order(self, epoch: int) -> Int[torch.Tensor, " document"]:
        if getattr(self, "_epoch", None) != epoch:
            seed = np.random.SeedSequence([self.settings.seed, epoch]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            self._epoch, self._drawn = (
                epoch,
                torch.randperm(len(self.documents), generator=generator),
            )
        return self._drawn

    def _backward(
        self, batch: Int[torch.Tensor, "document pos"], count: float, share: float
    ) -> float:
        """Add the gradient of some documents to the leaves; returns their part of the loss.

        The output head runs on a few positions at a time, forward and backward, so that not all
        logits are in memory.
        """
        student, objective, settings = self.student, self.objective, self.settings
        matching = settings.attention > 0
        seen: QueriesKeys | None = [] if matching else None
        wanted: QueriesKeys | None = [] if matching else None
        weights = student.full()
        hidden = student.hidden(batch, weights, cut=True, seen=seen)
        # No tensor of the intact model takes a gradient, so no graph is kept of it.
        teacher = None
        if objective.teacher or matching:
            teacher = student.hidden(batch, [], cut=False, seen=wanted).detach().flatten(0, 1)
        targets = batch.to(student.device)
        flat = hidden
        if not objective.teacher:
            flat, targets = hidden[:, :-1], targets[:, 1:]
        flat, targets = flat.flatten(0, 1), targets.flatten()
        ends = flat.detach().requires_grad_()
        total = 0.0
        for start in range(0, len(ends), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            given = None
            if objective.teacher:
                assert teacher is not None
                given = student.logits(teacher[rows], [])
            got = student.logits(ends[rows], weights)
            loss = objective.loss(got, given, targets[rows]) / count
            torch.autograd.backward([loss])
            total += float(loss.detach())
        roots, gradients = [flat], [ends.grad]
        if seen is not None and wanted is not None:
            family, config, layers = student.family, student.config, range(len(seen))
            divergence = attention_divergence(
                seen,
                wanted,
                [family.scaling(config, layer) for layer in layers],
                [family.window(config, layer) for layer in layers],
            )
            loss = settings.attention * share * divergence
            roots.append(loss)
            gradients.append(torch.ones_like(loss))
            total += float(loss.detach())
        torch.autograd.backward(roots, gradients)
        if student.shards is not None:
            student.shards.free()
        return total

    def _check_good(self, step: int) -> None:
        """Check the weights before they replace the last good checkpoint or those of the model.

        The loss of the last step belongs to the weights before that step.

        Raises:
            TrainingError: a weight, or a loss with it, is not finite.
        """
        some = self.documents[0][None, :CHECKED]
        finite = _all_finite(self.leaves) and bool(np.isfinite(self.student.losses(some)).all())
        if finite:
            hidden = self.student.hidden(some, self.student.full(), cut=True)
            finite = _all_finite(torch.autograd.grad(hidden.sum(), self.leaves, allow_unused=True))
        if not finite:
            raise TrainingError(
                _not_finite(step, "the weights after it give no finite loss and gradient")
            )

    def _watch(self, step: int) -> dict[str, Any]:
        """Rise of the loss on the monitored documents after ``step``, with its interval."""
        if not self.watched:
            return {}
        if self._intact is None:
            self._intact = self._watched_losses(intact=True)
        differences = self._watched_losses(intact=False) - self._intact
        if not np.isfinite(differences).all():
            raise TrainingError(_not_finite(step, "the monitored loss after it is not finite"))
        interval = skew_interval(differences, 0.95)
        plain = list(interval) if np.isfinite(interval).all() else None
        return {"rise": float(differences.mean()), "interval": plain}

    def _watched_losses(self, *, intact: bool) -> Float[np.ndarray, " document"]:
        share = self.processes.share(list(enumerate(self.watched)))
        idle = self._idle(len(share))
        mine = {number: self.student.losses(batch, intact=intact) for number, batch in share}
        for _ in range(idle):
            self.student.losses(self.watched[0][:1, :2], intact=intact)
        found: dict[int, Any] = {}
        for part in self.processes.gathered(mine):
            found |= part
        return np.concatenate([found[number] for number in sorted(found)])

    def _last_rise(self) -> dict[str, str]:
        rises = [row["rise"] for row in self.curve if row.get("rise") is not None]
        return {"rise": f"{rises[-1]:.4f}"} if rises else {}

    def _count_bytes(self) -> None:
        def size(tensors: Sequence[Any]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors if t is not None)

        state = [
            value
            for row in self.optimizer.state.values()
            for value in row.values()
            if isinstance(value, torch.Tensor)
        ]
        stored = [p.grad for p in self.student.root.parameters()]
        shards = self.student.shards
        whole = {id(p): p.untyped_storage().nbytes() for p in self.student.root.parameters()}
        self.bytes = {
            "weight_bytes": sum(whole.values()) + (0 if shards is None else shards.held_bytes),
            "gradient_bytes": size([leaf.grad for leaf in self.leaves]) + size(stored),
            "optimizer_bytes": size(state),
        }

    def _save(self, path: Path, step: int) -> None:
        if self.processes.first:
            save_checkpoint(
                path,
                self.student.slices,
                self.optimizer,
                self.header(),
                {
                    "step": step,
                    "curve": self.curve,
                    "tokens": self.n_tokens,
                    "seconds": self.seconds,
                    "stopped": self.stopped,
                    "bytes": self.bytes,
                },
            )
        self.processes.wait()


def _not_finite(step: int, what: str) -> str:
    return (
        f"step {step}: {what}, expected finite numbers; the model and the last good checkpoint "
        "are as they were (a lower lr, or precision='float32', may help)"
    )


def _all_finite(tensors: Sequence[torch.Tensor | None]) -> bool:
    return all(t is None or bool(torch.isfinite(t).all()) for t in tensors)
