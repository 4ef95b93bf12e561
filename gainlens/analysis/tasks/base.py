"""What a task is, and how its prompts get their exact length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Int

from gainlens.errors import InputError

Group = Literal["contextual", "parametric"]

CHOICES = 8
"""Answers among which the right one must be the most likely; chance is 1/8 unless a task says."""

NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""The filler of RULER's plain needle task, after Mohtashami and Jaggi (2023)."""


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt with its answer.

    Attributes:
        prompt: token ids.
        answer: token ids that follow it.
        at: position in the answer at which it departs from the wrong answers.
        choices: the token there, of the right answer first, then of each wrong one; all differ.
        depth: of a needle, as the share of filler in front of it, 0 to 1; None without a needle.
    """

    prompt: Int[torch.Tensor, " prompt_pos"]
    answer: Int[torch.Tensor, " answer_pos"]
    at: int
    choices: Int[torch.Tensor, " choice"]
    depth: float | None = None

    @property
    def tokens(self) -> Int[torch.Tensor, " pos"]:
        """Prompt and answer."""
        return torch.cat([self.prompt, self.answer])


Make = Callable[[Any, int, int, int], list[Example]]
"""From a tokenizer, the length of prompt and answer in tokens, the number of prompts and a seed."""


@dataclass(frozen=True)
class Task:
    """A task whose answers are known.

    Attributes:
        name: for ``score_tasks`` and the rows.
        group: ``contextual`` where the answer stands in the prompt, ``parametric`` where only the
            weights can know it.
        make: the examples; may give fewer than asked where a task has no more.
        meaning: what it asks, in one line.
    """

    name: str
    group: Group
    make: Make
    meaning: str


class Writer:
    """Builds the examples of one task at one length.

    Args:
        task: its name, for messages.
        tokenizer: of the model.
        length: of prompt and answer together, in tokens.
    """

    def __init__(self, task: str, tokenizer: Any, length: int) -> None:
        self.task, self.length = task, length
        self._tokenizer = tokenizer
        self.ids = lru_cache(maxsize=1024)(self._ids)
        plain, full = self.ids("a"), tokenizer("a")["input_ids"]
        # What the tokenizer puts in front of a text: nothing, or a beginning-of-sequence token.
        self.start = full[: len(full) - len(plain)] if full[-len(plain) :] == plain else []

    def _ids(self, text: str) -> list[int]:
        # verbose=False: the warning about the model's context, which prompts never exceed.
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def answer_ids(self, question: str, answer: str) -> list[int]:
        """Tokens of ``answer`` where it follows ``question``."""
        before, whole = self.ids(question), self.ids(question + answer)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise InputError(
                f"tokenizer joins the answer {answer!r} of the task {self.task!r} to the question "
                "before it: expected one that starts a new token at a space"
            )
        return whole[len(before) :]

    def told_apart(self, question: str, answers: Sequence[str], most: int) -> list[str]:
        """The first ``most`` of ``answers`` that differ in their first token that differs at all.

        Raises:
            InputError: the tokenizer does not tell as many apart.
        """
        found: list[str] = []
        for answer in answers:
            if len(found) < most and _departure(self._all(question, [*found, answer])) is not None:
                found.append(answer)
        if len(found) < 2:
            raise InputError(
                f"tokenizer does not tell the answers of the task {self.task!r} apart by one token"
            )
        return found

    def _all(self, question: str, answers: Sequence[str]) -> list[list[int]]:
        return [self.answer_ids(question, answer) for answer in answers]

    def room(self, question: str, answer: str, *fixed: str) -> int:
        """Tokens that are left for the body between the ``fixed`` texts and the question."""
        taken = len(self.start) + sum(len(self.ids(text)) for text in fixed)
        taken += len(self.ids(question)) + len(self.answer_ids(question, answer))
        if taken > self.length:
            raise InputError(
                f"length={self.length} is too short for the task {self.task!r}: expected at least "
                f"{taken} tokens with this tokenizer"
            )
        return self.length - taken

    def in_noise(
        self, header: str, question: str, answer: str, inserted: Sequence[tuple[float, str]]
    ) -> list[str]:
        """The header and as much filler as fits, with sentences at their depths.

        Args:
            header, question, answer: the rest of the example.
            inserted: depth, 0 to 1, and sentence, by ascending depth.
        """
        room = self.room(question, answer, header, *(sentence for _, sentence in inserted))
        noise: list[str] = []
        while len(self.ids(NOISE[len(noise) % len(NOISE)])) <= room:
            noise.append(NOISE[len(noise) % len(NOISE)])
            room -= len(self.ids(noise[-1]))
        body, done = [header], 0
        for depth, sentence in inserted:
            place = round(depth * len(noise))
            body += [*noise[done:place], sentence]
            done = place
        return body + noise[done:]

    def largest(
        self, body: Callable[[int], list[str]], least: int, question: str, answer: str
    ) -> list[str]:
        """The body of the greatest size that fits, of at least ``least``.

        Args:
            body: from a size to texts; of ascending length in tokens.
            least: the smallest size that makes sense.
            question, answer: the rest of the example.

        Raises:
            InputError: not even the smallest fits.
        """
        self.room(question, answer, *body(least))
        room = self.room(question, answer)

        def fits(size: int) -> bool:
            return sum(len(self.ids(text)) for text in body(size)) <= room

        low, high = least, 2 * least
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return body(low)

    def example(
        self,
        body: Sequence[str],
        question: str,
        answers: Sequence[str],
        depth: float | None = None,
    ) -> Example:
        """The example, filled up at its front with the end of repeated filler.

        Args:
            body: texts before the question; each is encoded by itself.
            question: the text that the answer follows.
            answers: the right one first.
            depth: of the needle.

        Raises:
            InputError: it does not fit, or the tokenizer does not tell the answers apart.
        """
        right, *_ = found = self._all(question, answers)
        at = _departure(found)
        if at is None:
            raise InputError(
                f"tokenizer does not tell the answers of the task {self.task!r} apart by one token"
            )
        missing = self.room(question, answers[0], *body)
        noise = [token for sentence in NOISE for token in self.ids(sentence)]
        padding = (noise * (missing // len(noise) + 1))[-missing:] if missing else []
        middle = [token for text in body for token in self.ids(text)]
        prompt = [*self.start, *padding, *middle, *self.ids(question)]
        choices = torch.tensor([ids[at] for ids in found])
        return Example(torch.tensor(prompt), torch.tensor(right), at, choices, depth)


def drawing(task: str, seed: int, number: int) -> Random:
    """Draws for one example; the same at every length and on every machine."""
    return Random(f"{task}:{seed}:{number}")


def spread_depths(n: int) -> list[float]:
    """``n`` depths, evenly over 0 to 1."""
    return [(number + 0.5) / n for number in range(n)]


def _departure(answers: Sequence[Sequence[int]]) -> int | None:
    """The first position where not all agree, if all differ there; for one answer its start."""
    if len(answers) == 1:
        return 0
    at = 0
    while all(at < len(a) and a[at] == answers[0][at] for a in answers):
        at += 1
        if at == min(map(len, answers)):
            return None
    tokens = [answer[at] for answer in answers]
    return at if len(set(tokens)) == len(tokens) else None
