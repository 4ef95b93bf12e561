"""What models score on tasks whose answers are known: a row per task, length and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gainlens.files import FORMAT
from gainlens.frames import data_frame

INTACT = "intact"


@dataclass(frozen=True)
class TaskRow:
    """One model on one task at one length.

    Attributes:
        task: its name.
        group: ``contextual``, the answer stands in the prompt, or ``parametric``.
        length: of prompt and answer, in tokens.
        label: of the cut, or ``intact``.
        log_probability: of the right answer, mean over its tokens and over prompts, nats per
            token.
        difference: from the intact model on the same prompts; below 0 the cut makes the right
            answer less likely.
        interval: of the difference, 95%, bootstrap-t over prompts.
        exact_match: share of prompts after which greedy decoding gives the whole answer.
        choice: share of prompts after which the right answer is more likely than each wrong one,
            at the first token in which they differ.
        chance: ``choice`` of a model that does not know.
        shows: whether the intact model's ``choice`` is above chance (one-sided binomial test at
            1%); if not, the row says nothing about the cut.
        n: number of prompts.
    """

    task: str
    group: str
    length: int
    label: str
    log_probability: float
    difference: float
    interval: tuple[float, float]
    exact_match: float
    choice: float
    chance: float
    shows: bool
    n: int


@dataclass(frozen=True)
class GroupRow:
    """One cut on all prompts of the tasks of a group that show something.

    Attributes:
        group, length, label, difference, interval: as in ``TaskRow``.
        tasks: those that show something.
        n: number of prompts.
    """

    group: str
    length: int
    label: str
    tasks: tuple[str, ...]
    difference: float
    interval: tuple[float, float]
    n: int


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What ``score_tasks`` found.

    Attributes:
        rows: one per task, length and model, the intact one first.
        groups: contextual and parametric tasks, per length and cut; without the tasks that show
            nothing.
        facts: model, seed, number of prompts asked for.
    """

    rows: tuple[TaskRow, ...]
    groups: tuple[GroupRow, ...]
    facts: dict[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """One plain row per task, length and model."""
        return [dict(vars(row)) for row in self.rows]

    def find(self, **wanted: Any) -> list[TaskRow]:
        """Rows with these values, e.g. ``task="needle", length=1024``."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "kind": "task_scores",
            "facts": self.facts,
            "rows": self.table(),
            "groups": [dict(vars(row)) for row in self.groups],
        }

    def to_dataframe(self) -> Any:
        """The rows of ``table``; see ``TaskRow`` for the units.

        Raises:
            InputError: pandas is not installed.
        """
        return data_frame(self.table())

    def summary(self) -> str:
        """One line per row; a task on which the intact model is at chance shows nothing."""
        lines = []
        first = self.rows[0].label if self.rows else INTACT
        for row in self.rows:
            if not row.shows:
                if row.label == first:
                    lines.append(
                        f"{row.task} at {row.length:,} tokens shows nothing: the {first} model is "
                        f"at chance ({row.choice:.0%} right of {row.n}, chance {row.chance:.0%})"
                    )
                continue
            line = f"{row.task} at {row.length:,} tokens, {row.label}: {row.exact_match:.0%} exact"
            if row.label != first:
                low, high = row.interval
                line += f", {row.difference:+.3f} [{low:+.3f}, {high:+.3f}] nats per answer token"
            lines.append(line)
        return "\n".join(lines)

    def __repr__(self) -> str:
        tasks = {(row.task, row.length): row.shows for row in self.rows}
        labels = list(dict.fromkeys(row.label for row in self.rows))
        shown = sum(tasks.values())
        return f"TaskScores({', '.join(labels)}; {shown} of {len(tasks)} tasks show something)"
