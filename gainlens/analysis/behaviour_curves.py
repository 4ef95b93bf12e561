"""Behaviours that barely affect the loss: induction, copying over a distance, agreement.

Most tokens in a mean loss need no long-range attention. These curves measure behaviours that only
attention can produce, over the same fractions, each next to its chance level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from gainlens.ablation.cut import Cut
from gainlens.ablation.key_mask import Scope, check_something_stays
from gainlens.analysis.damage_by_position import PositionRise, in_order, position_rise
from gainlens.analysis.sweep.evaluator import Evaluator, evaluator_of
from gainlens.analysis.sweep.judging_text import check_judge
from gainlens.analysis.sweep.points import Point, check_fractions
from gainlens.analysis.sweep.run import given_point
from gainlens.data.batches import Tokens
from gainlens.data.document_identity import text_fingerprint
from gainlens.data.texts import groups_for
from gainlens.errors import InputError
from gainlens.files import FORMAT
from gainlens.frames import data_frame
from gainlens.model.fingerprint import model_fingerprint
from gainlens.model.hooks import check_intact
from gainlens.model.tokens import model_documents
from gainlens.plots.notebook import Display, Displayed
from gainlens.probes.gains import KeyGains, check_same_weights

CANDIDATES = 8
"""A copied value competes with seven other tokens of the prompt, so chance is 1/8."""


@dataclass(frozen=True)
class BehaviourRow:
    """One measured value.

    Attributes:
        behaviour: ``induction``, ``copying``, ``agreement`` (shares, 0 to 1), ``kl`` or ``loss``
            (nats per token); the loss is for comparison.
        fraction: share of key dimensions cut; 0 is the intact model.
        order: order of the cut, as in a sweep; ``given`` for cuts passed in.
        seed: seed of a random order, else None.
        distance: tokens between the pair and its second key (``copying`` only).
        value: the measured value. Lower is better for ``kl`` and ``loss``, else higher.
        standard_error: standard error over sequences or documents, in the same units.
        chance: the value for a model without the behaviour.
        label: name of a given cut, else None.
    """

    behaviour: str
    fraction: float
    order: str
    seed: int | None
    distance: int | None
    value: float
    standard_error: float
    chance: float
    label: str | None = None


@dataclass(frozen=True, eq=False)
class Behaviours(Displayed):
    """Curves of behaviours over fractions.

    Attributes:
        rows: all measured values.
        facts: model, seed, sizes.
        by_position: rise of the loss by position in the documents, of every cut.
    """

    rows: list[BehaviourRow]
    facts: dict[str, Any]
    by_position: PositionRise | None = None

    def table(self) -> list[dict[str, Any]]:
        """One plain row per measured value."""
        return [dict(vars(row)) for row in self.rows]

    def find(self, **wanted: Any) -> list[BehaviourRow]:
        """Rows with these values, e.g. ``behaviour="copying", distance=32``."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rise = None if self.by_position is None else self.by_position.to_json()
        return {
            "format": FORMAT,
            "kind": "behaviours",
            "facts": self.facts,
            "rows": self.table(),
            "by_position": rise,
        }

    def to_dataframe(self) -> Any:
        """The rows of ``table``; see ``BehaviourRow`` for the units.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def plot(self, ax: Any = None) -> Any:
        """One panel per behaviour, with its chance level; returns the axes without showing.

        Args:
            ax: matplotlib axes, one per panel; new ones by default.
        """
        from gainlens.plots.curves import plot_behaviours

        return plot_behaviours(self, ax)

    def __repr__(self) -> str:
        kinds = list(dict.fromkeys(row.behaviour for row in self.rows))
        fractions = sorted({row.fraction for row in self.rows})
        cuts = ", ".join(f"{f:.0%}" for f in fractions)
        return f"Behaviours({', '.join(kinds)}; {len(self.rows)} figures at {cuts} cut)"

    def _display(self) -> Display:
        from gainlens.plots.markup.results import behaviour_panels

        panels = len({(row.behaviour, row.distance) for row in self.rows})
        return Display(
            "Behaviours of the model against the share of key dimensions cut, each with its "
            "chance level.",
            lambda alt: behaviour_panels(self, alt),
            size=(3.2 * panels, 3),
            panels=(1, panels),
        )


def behaviours(
    model: Any,
    tokens: Tokens,
    gains: KeyGains,
    fractions: Sequence[float] = (0.25, 0.5, 0.8),
    *,
    score: str = "qk",
    scope: Scope = "head",
    orders: Sequence[str] = ("quietest", "random"),
    cuts: Mapping[str, Cut] | None = None,
    distances: Sequence[int] = (4, 16, 64),
    n_sequences: int = 16,
    repeat: int = 32,
    seed: int = 0,
    evaluator: Evaluator | None = None,
    progress: bool = True,
) -> Behaviours:
    """Measure behaviours of the intact and the cut model.

    Args:
        model: a TransformerBridge or HookedTransformer.
        tokens: validation text for loss, agreement and KL; random sequences draw tokens from it
            too.
        gains: calibration gains, which choose what is cut.
        fractions: shares of key dimensions to cut, below 1. The intact model is always measured.
        score, scope, orders: how cuts are made; see ``surgery``.
        cuts: further cuts by name.
        distances: tokens between a key–value pair and the second occurrence of its key, 2 or
            more.
        n_sequences: random sequences per figure.
        repeat: length of the repeated random sequence for induction.
        seed: seed of the random sequences and the random order.
        evaluator: an ``Evaluator`` of this model, to share between calls.
        progress: show a progress bar over cuts.

    Raises:
        InputError: fractions or sizes out of range, prompts beyond the context, gains of another
            model, text that was also used to choose the cut, or has too few distinct tokens.

    Example:
        >>> found = gl.behaviours(model, validation, gains, (0.5,), n_sequences=4, distances=(4,))
        >>> sorted({row.behaviour for row in found.rows})
    """
    check_fractions(tuple(fractions))
    check_intact(model, "behaviours")
    documents = model_documents(model, tokens)
    check_same_weights(gains.model, model_fingerprint(model))
    check_judge(documents, gains, (cuts or {}).values(), getattr(model, "tokenizer", None))
    pool = torch.unique(torch.cat(documents))
    longest = max(2 * repeat, max(distances, default=2) + CANDIDATES + 2)
    context = int(getattr(model.cfg, "n_ctx", longest) or longest)
    if min(distances, default=2) < 2 or n_sequences < 2 or repeat < 2 or longest > context:
        raise InputError(
            f"distances={tuple(distances)}, n_sequences={n_sequences}, repeat={repeat}: expected "
            f"2 or more each, and prompts of at most {context} tokens"
        )
    if len(pool) < max(repeat, longest):
        raise InputError(f"tokens has {len(pool)} distinct ids: expected at least {longest}")
    generator = torch.Generator().manual_seed(seed)
    repeated = random_rows(pool, n_sequences, repeat, generator).repeat(1, 2)
    prompts = {
        n: copying_prompts(random_rows(pool, n_sequences, n + CANDIDATES + 2, generator), n)
        for n in distances
    }
    evaluator = evaluator_of(model, evaluator)
    reference = [evaluator.logits(d[None])[0].log_softmax(-1) for d in documents]
    todo: list[tuple[Point | None, Cut | None]] = [(None, None)]
    for order in orders:
        for fraction in fractions:
            drawn = seed if order in ("random", "matched") else None
            point = Point(score, scope, "pair", "zero", order, fraction, drawn)
            mask = point.mask(gains)
            check_something_stays(mask, fraction)
            todo.append((point, mask))
    todo += [(given_point(name, cut), cut) for name, cut in (cuts or {}).items()]
    chance = _chances(reference, documents, len(pool))
    rows: list[BehaviourRow] = []
    by_token: dict[str, list[torch.Tensor]] = {}
    shares: dict[str, float] = {}
    for at, cut in tqdm(todo, desc="behaviours", unit="cut", disable=not progress):

        def add(
            what: str,
            values: torch.Tensor,
            level: float,
            distance: int | None = None,
            at: Point | None = at,
        ) -> None:
            where = (0.0, "intact", None) if at is None else (at.fraction, at.order, at.seed)
            spread = float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0
            mean = float(values.double().mean())
            label = None if at is None else at.label
            rows.append(BehaviourRow(what, *where, distance, mean, spread, level, label))

        add(
            "induction", induction_score(evaluator.logits(repeated, cut), repeated), chance["token"]
        )
        for n, (prompt, candidates) in prompts.items():
            last = evaluator.logits(prompt, cut)[:, -1]
            add("copying", copying_score(last, candidates), 1 / CANDIDATES, n)
        same, divergence, losses = [], [], []
        name = "intact" if at is None else at.label or f"{at.order}, {at.fraction:.0%}"
        shares[name] = 0.0 if at is None else at.fraction
        for document, wanted in zip(documents, reference, strict=True):
            got = evaluator.logits(document[None], cut)[0].log_softmax(-1)
            same.append((got.argmax(-1) == wanted.argmax(-1)).double().mean())
            divergence.append((wanted.exp() * (wanted - got)).sum(-1).double().mean())
            by_token.setdefault(name, []).append(_token_losses(got, document)[None])
            losses.append(by_token[name][-1].mean())
        add("agreement", torch.stack(same), chance["agreement"])
        add("kl", torch.stack(divergence), chance["kl"])
        add("loss", torch.stack(losses), chance["loss"])
    facts = {
        "model": gains.model.fingerprint,
        "seed": seed,
        "n_sequences": n_sequences,
        "repeat": repeat,
        "n_documents": len(documents),
    }
    intact = by_token.pop("intact")
    rise = None
    if by_token:
        rise = position_rise(
            [document[None] for document in documents],
            {name: (shares[name], in_order(losses)) for name, losses in by_token.items()},
            in_order(intact),
            groups=groups_for(tokens, None, len(documents)),
            text=text_fingerprint(documents),
            progress=False,
        )
    return Behaviours(rows, facts, rise)


def random_rows(
    pool: Int[torch.Tensor, " token"], rows: int, length: int, generator: torch.Generator
) -> Int[torch.Tensor, "row pos"]:
    """Rows of distinct tokens from ``pool``, in random order."""
    drawn = [pool[torch.randperm(len(pool), generator=generator)[:length]] for _ in range(rows)]
    return torch.stack(drawn)


def copying_prompts(
    rows: Int[torch.Tensor, "row pos"], distance: int
) -> tuple[Int[torch.Tensor, "row prompt_pos"], Int[torch.Tensor, "row candidate"]]:
    """Prompts that end in a key whose pair is ``distance`` tokens earlier, and the candidates.

    The first candidate is the value of the pair. The others are tokens from before the pair.
    """
    prompt = rows[:, : CANDIDATES + distance + 1].clone()
    key_at = prompt.shape[1] - 1 - distance
    prompt[:, -1] = prompt[:, key_at]
    others = prompt[:, : CANDIDATES - 1]
    return prompt, torch.cat([prompt[:, key_at + 1 : key_at + 2], others], dim=1)


def induction_score(
    logits: Float[torch.Tensor, "row pos vocab"], tokens: Int[torch.Tensor, "row pos"]
) -> Float[torch.Tensor, " row"]:
    """Share of the repeated half (after its first token) predicted exactly, per row."""
    half = tokens.shape[1] // 2
    hits = logits[:, half:-1].argmax(-1) == tokens[:, half + 1 :]
    return hits.float().mean(1)


def copying_score(
    last: Float[torch.Tensor, "row vocab"], candidates: Int[torch.Tensor, "row candidate"]
) -> Float[torch.Tensor, " row"]:
    """1 if the value has the largest logit of all candidates, per row."""
    return (last.gather(1, candidates).argmax(1) == 0).float()


def _token_losses(
    logp: Float[torch.Tensor, "pos vocab"], document: Int[torch.Tensor, " pos"]
) -> Float[torch.Tensor, " next_pos"]:
    """Next-token losses in nats, from log-probabilities; float64 on the CPU."""
    return -logp[:-1].gather(1, document[1:, None].to(logp.device))[:, 0].double().cpu()


def _chances(
    reference: list[torch.Tensor], documents: list[torch.Tensor], n_pool: int
) -> dict[str, float]:
    """Chance levels: agreement, KL and loss of intact predictions for other positions."""
    same, divergence, losses = [], [], []
    for logp, document in zip(reference, documents, strict=True):
        other = logp.roll(max(1, len(logp) // 2), 0)
        same.append((logp.argmax(-1) == other.argmax(-1)).double().mean())
        divergence.append((logp.exp() * (logp - other)).sum(-1).double().mean())
        losses.append(_token_losses(other, document).mean())
    return {
        "token": 1 / n_pool,
        "agreement": float(torch.stack(same).mean()),
        "kl": float(torch.stack(divergence).mean()),
        "loss": float(torch.stack(losses).mean()),
    }
