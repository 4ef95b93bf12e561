"""Shared text is recognised however it was cut, shifted, changed or tokenized."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from gainlens.data.overlap import KEPT, check_overlap, document_identities
from gainlens.data.pieces import LETTER_GRAM, LETTER_WINDOW, letter_pieces, token_pieces
from gainlens.data.splits import Document, keys_of, split_of
from gainlens.errors import InputError

pytestmark = pytest.mark.one_env

TOKENS = torch.randint(0, 1000, (12, 256), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(0, 1000, (12, 256), generator=torch.Generator().manual_seed(1))


def title(rows):
    return torch.cat([torch.full((len(rows), 9), 7), rows[:, :-9]], 1)


def changed(rows):
    rows = rows.clone()
    rows[:, 60] = 3
    return rows


WAYS = {
    "the same": lambda rows: rows,
    "half of them": lambda rows: torch.cat([rows[:6], OTHERS[:6]]),
    "cut shorter": lambda rows: rows[:, :100],
    "the end": lambda rows: rows[:, 128:],
    "a shifted window": lambda rows: rows[:, 40:],
    "without the first token": lambda rows: rows[:, 1:],
    "one changed token": changed,
    "a title": title,
    "another order": lambda rows: rows.flip(0),
    "as a list": list,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["judges", "chose"])
def test_the_same_text_otherwise(way, side):
    other = list(WAYS[way](TOKENS))
    judge, chose = (other, TOKENS) if side == "judges" else (TOKENS, other)
    with pytest.raises(InputError, match="share text with what chose a cut"):
        check_overlap(judge, document_identities(chose))
    check_overlap(OTHERS[6:], document_identities(chose))


def test_a_window_of_a_long_document_of_which_few_pieces_are_kept():
    long = torch.randint(0, 1000, (6, 2048), generator=torch.Generator().manual_seed(2))
    known = document_identities(long)
    assert all(len(identity) < 700 for identity in known)
    for start in (0, 700, 1500):
        with pytest.raises(InputError, match="6 of 6 documents|5 of 6 documents"):
            check_overlap(long[:, start : start + 512], known)


def test_one_shared_document_of_many_is_a_warning():
    mixed = torch.cat([TOKENS[:1], OTHERS[:11]])
    with pytest.warns(UserWarning, match="1 of 12 documents"):
        check_overlap(mixed, document_identities(TOKENS))


def test_a_formula_that_many_texts_open_with_is_none_of_theirs():
    opening = torch.arange(80)
    ours, theirs = TOKENS.clone(), OTHERS.clone()
    ours[:, :80] = opening
    theirs[:, :80] = opening
    check_overlap(theirs, document_identities(ours))


def test_merged_identities_and_whole_texts():
    known = document_identities(TOKENS[:6]) + document_identities(TOKENS[6:])
    assert known == document_identities(TOKENS) == document_identities(list(TOKENS))
    assert document_identities(TOKENS[:, :16]) == ()
    with pytest.raises(InputError, match="not a document identity"):
        check_overlap(OTHERS, ["0123456789ab"])


class Letters:
    """A tokenizer with a letter per token, in an alphabet of its own order."""

    def __init__(self, seed):
        self.order = list("abcdefghijklmnopqrstuvwxyz .")
        random.Random(seed).shuffle(self.order)

    def ids(self, text):
        return torch.tensor([self.order.index(letter) for letter in text])

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.order[i] for i in ids)


def sentences(seed, n=300):
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(n))


def test_another_tokenizer():
    texts = [sentences(i) for i in range(4)]
    one, two = Letters(0), Letters(1)
    known = document_identities([one.ids(text) for text in texts], one)
    with pytest.raises(InputError, match="4 of 4 documents"):
        check_overlap([two.ids(text.replace(" ", ". ")) for text in texts], known, tokenizer=two)
    check_overlap([two.ids(text) for text in texts], known)  # without one, ids alone are compared
    check_overlap([two.ids(sentences(i + 9)) for i in range(4)], known, tokenizer=two)


# --- pieces


def test_any_stretch_in_common_gives_a_piece_in_common():
    draw = np.random.default_rng(0)
    for _ in range(50):
        shared = draw.integers(0, 1000, 23)
        one, two = (
            np.concatenate([draw.integers(0, 1000, n), shared, draw.integers(0, 1000, 40)])
            for n in draw.integers(0, 60, 2)
        )
        assert set(token_pieces(one)) & set(token_pieces(two))
    text = sentences(0)
    plain = text.replace(" ", "")
    stretch = plain[100 : 100 + LETTER_GRAM + LETTER_WINDOW - 1]
    assert set(letter_pieces(text)) & set(letter_pieces("Title: " + stretch.upper()))
    assert not set(letter_pieces(text)) & set(letter_pieces(sentences(1)))


def test_identities_are_the_same_on_every_machine():
    (known,) = document_identities(torch.arange(40)[None])
    assert known == "4:O0ZQ8wYFEcR2IloURSUeUwEbLb5I5IEq|0:"
    assert KEPT == 32


# --- splits


NEAR = {
    "cut": lambda text: text[: len(text) // 2],
    "end": lambda text: text[len(text) // 2 :],
    "title": lambda text: "A title line\n" + text,
    "word": lambda text: text.replace(text[500:505], "other", 1),
    "spacing": lambda text: text.replace(" ", "\n  ").upper(),
}


@pytest.mark.parametrize("way", NEAR)
def test_near_duplicates_stay_on_one_side(way):
    texts = [sentences(i) for i in range(30)]
    twins = [NEAR[way](text) for text in texts]
    keys = keys_of([Document.of(text) for text in texts + twins])
    assert keys[:30] == keys[30:]
    assert len(set(keys)) == 30
    assert len({split_of(key) for key in keys}) == 3
    again = keys_of([Document.of(text) for text in twins[::-1] + texts])
    assert again[30:] == keys[:30]


def test_sixty_variants_of_one_text_are_one():
    text = sentences(0)
    keys = keys_of([Document.of(f"{i}. {text} {sentences(i + 1, 9)}") for i in range(60)])
    assert len(set(keys)) == 1


def test_documents_that_open_alike_stay_on_one_side():
    opening = sentences(0, 50)
    keys = keys_of([Document.of(f"{opening} {sentences(i + 1)}") for i in range(5)])
    assert len(set(keys)) == 1


def test_unlike_documents_move_nothing():
    texts = [Document.of(sentences(i)) for i in range(20)]
    more = [Document.of(sentences(i + 50)) for i in range(20)]
    assert keys_of(more + texts)[20:] == keys_of(texts) == [text.key for text in texts]
