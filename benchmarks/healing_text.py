"""What cuts are chosen, fitted and healed on in ``slots.py``, and how texts of unlike size mix."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import gainlens as gl
from gainlens.data.texts import Texts

SEEN = "sotu,stdlib"
TEXTS = {"two": SEEN, "wide": f"{SEEN},headers,readmes"}
"""What ``--texts`` names."""
LENGTHS = (2048, 1024, 512, 256)
ROWS = 240
"""Most training rows of a text among several that are of unlike size."""


def training_text(texts: str, model: Any) -> Texts:
    """All training rows of two texts, or some of each of many (``TEXTS``)."""
    every = gl.load_tokens(
        TEXTS[texts], model, n_docs="all", length=LENGTHS, split="training", windows="all"
    )
    return every if texts == "two" else evened(every)


def evened(training: Texts) -> Texts:
    """At most ``ROWS`` rows of each text, spread over all of it, in turns."""
    found = []
    for name in training.names:
        places = [i for i, domain in enumerate(training.domains) if domain == name]
        n = min(ROWS, len(places))
        found.append([places[i * len(places) // n] for i in range(n)])
    turns = [i for turn in zip_longest(*found) for i in turn if i is not None]
    return training.chosen(turns)


def beside(training: Texts, own: Texts) -> Texts:
    """Both texts, with twice as many rows of ``training`` as of ``own``, spread over all of it."""
    some = training[:: max(1, len(training) // (2 * len(own)))][: 2 * len(own)]
    groups = (*some.groups, *(max(some.groups) + 1 + group for group in own.groups))
    return Texts((*some.rows, *own.rows), (*some.domains, *own.domains), groups)
