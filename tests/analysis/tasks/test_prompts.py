"""Every prompt is read again by a plain parser that knows nothing of how it was made."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import gainlens as gl
from gainlens.analysis.tasks import TASKS
from gainlens.analysis.tasks.base import NOISE
from gainlens.analysis.tasks.capitals import CAPITALS
from gainlens.analysis.tasks.elements import SYMBOLS
from gainlens.analysis.tasks.words import WORDS
from gainlens.model.loading import load_tokenizer

pytestmark = pytest.mark.one_env
NEEDLE = re.compile(r"The magic number of (\S+) is (\d{7})\.")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def read(tokenizer, example):
    """Context, question and answer as text."""
    context, question = tokenizer.decode(example.prompt.tolist()).rsplit("\n", 1)
    if question.startswith("Answer:"):
        context, asked = context.rsplit("\n", 1)
        question = asked + "\n" + question
    return context, question, tokenizer.decode(example.answer.tolist()).strip()


def noise_in(text):
    return sum(text.count(sentence.strip()) for sentence in NOISE)


def needles(context, question):
    """All needles of a text, and the key that is asked for."""
    return NEEDLE.findall(context), re.search(r"magic number of (\S+)\?", question)[1]


def solve_needle(context, question):
    found, key = needles(context, question)
    assert len(found) == 1
    return dict(found)[key]


def solve_needle_keys(context, question):
    found, key = needles(context, question)
    assert len(dict(found)) == len(found) == 4
    return dict(found)[key]


def solve_needle_haystack(context, question):
    found, key = needles(context, question)
    assert len(dict(found)) == len(found) >= 16
    assert len(found) % 8 == 0
    return dict(found)[key]


def solve_variable_tracking(context, question):
    value = re.search(r"value (\d+)", question)[1]
    context = context.replace("<unk>", "=")  # which the small tokenizer does not have
    assignments = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", context)
    assert len(assignments) == 20
    known, order = {}, []
    for name, source in assignments:
        known[name] = known.get(source, source)  # a source stands before what takes from it
        if known[name] == value:
            order.append(name)
    assert len(set(known.values())) == 4
    return ", ".join(order)


def solve_common_words(context, question):
    entries = re.findall(r"(\d+)\. (\w+)", context)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    ranked = Counter(word for _, word in entries).most_common()
    (least,) = {count for _, count in ranked[:10]}
    (most,) = {count for _, count in ranked[10:]}
    assert least == 10 * most
    given = re.search(r"words are (.*) and$", question)[1].split(", ")
    assert len(given) == 9
    (left,) = {word for word, _ in ranked[:10]} - set(given)
    return left


def solve_frequent_words(context, question):
    counts = Counter(context.rsplit("\n", 1)[1].split()).most_common()
    assert counts[0][1] > counts[1][1] > counts[2][1] > counts[3][1]
    assert counts[0][1] / counts[1][1] == pytest.approx(4, rel=0.15)  # Zipf, exponent 2
    return ", ".join(word for word, _ in counts[:3])


def solve_capitals(context, question):
    return CAPITALS[re.match(r"The capital of (.*) is$", question)[1]]


def solve_elements(context, question):
    return SYMBOLS[re.match(r"The chemical symbol of (.*) is$", question)[1]]


@pytest.mark.parametrize("length", [1024, 2047])
@pytest.mark.parametrize("name", TASKS)
def test_a_parser_finds_every_answer(tokenizer, name, length):
    task = TASKS[name]
    examples = task.make(tokenizer, length, 6, 3)
    assert len(examples) == 6
    for example in examples:
        assert len(example.tokens) == length
        context, question, answer = read(tokenizer, example)
        assert globals()[f"solve_{name}"](context, question) == answer
        if task.group == "parametric":
            assert answer not in context.split()
    prompts = {tuple(example.tokens.tolist()) for example in examples}
    assert len(prompts) == 6


@pytest.mark.parametrize("name", ["needle", "needle_keys", "needle_haystack"])
def test_the_needle_lies_at_the_depth_that_is_said(tokenizer, name):
    examples = TASKS[name].make(tokenizer, 1500, 5, 0)
    assert [example.depth for example in examples] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    for example in examples:
        context, question, _ = read(tokenizer, example)
        text = context[context.index("Remember") :]
        found, key = needles(context, question)
        before, after = text.split(f"The magic number of {key} is")
        if name == "needle_haystack":
            n, at = len(found) - 1, len(NEEDLE.findall(before))
        else:
            n, at = noise_in(text), noise_in(before)
        assert n == at + (
            len(NEEDLE.findall(after)) if name == "needle_haystack" else noise_in(after)
        )
        assert at / n == pytest.approx(example.depth, abs=1 / n)


@pytest.mark.parametrize("name", TASKS)
def test_the_choices_are_the_right_token_and_others(tokenizer, name):
    for example in TASKS[name].make(tokenizer, 1024, 4, 1):
        choices = example.choices.tolist()
        assert (
            len(set(choices))
            == len(choices)
            == (4 if name in ("needle_keys", "variable_tracking") else 8)
        )
        assert choices[0] == example.answer[example.at]


@pytest.mark.parametrize("name", TASKS)
def test_who_knows_nothing_is_right_as_often_as_chance(tokenizer, name):
    """A model with a fixed liking for tokens, whatever the prompt."""
    liking = torch.rand(4, len(tokenizer), generator=torch.Generator().manual_seed(0))
    hits, total, chance = torch.zeros(4), 0, 0.0
    for seed in range(12):
        for example in TASKS[name].make(tokenizer, 1024, 9, seed):
            hits += liking[:, example.choices].argmax(1) == 0
            total += 1
            chance = 1 / len(example.choices)
    spread = (chance * (1 - chance) / total) ** 0.5
    assert total >= 100
    assert float((hits / total - chance).abs().max()) < 3.5 * spread


def test_seeds_decide_and_lengths_do_not(tokenizer):
    make = TASKS["needle_keys"].make
    same = [read(tokenizer, x)[1:] for x in make(tokenizer, 600, 4, 0)]
    assert same == [read(tokenizer, x)[1:] for x in make(tokenizer, 900, 4, 0)]
    assert same != [read(tokenizer, x)[1:] for x in make(tokenizer, 600, 4, 1)]


def test_a_token_that_starts_every_text_stays_in_front(tokenizer):
    class Starting:
        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [2, *ids] if add_special_tokens else ids}

    for example in TASKS["needle"].make(Starting(), 400, 2, 0):
        ids = example.tokens.tolist()
        assert ids[0] == 2 and ids.count(2) == 1 and len(ids) == 400


@pytest.mark.parametrize("name", TASKS)
def test_too_short_says_how_long(tokenizer, name):
    make = TASKS[name].make
    with pytest.raises(gl.GainlensError, match=f"length=10 is too short for the task '{name}'"):
        make(tokenizer, 10, 2, 0)


def test_tables_have_no_answer_twice():
    for table in (CAPITALS, SYMBOLS):
        assert len(set(table.values())) == len(table)
    assert len(set(WORDS)) == len(WORDS) >= 400
