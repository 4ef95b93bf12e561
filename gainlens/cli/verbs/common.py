"""Shared by several verbs: options, checks before a model is loaded, and loading."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gainlens.ablation.key_mask import SCOPES
from gainlens.ablation.modes import MODES
from gainlens.data.loading import share_of, text_names
from gainlens.data.sources import documents, is_stream
from gainlens.data.splits import SPLITS, Document, Split
from gainlens.errors import InputError
from gainlens.model import load_model, load_tokens
from gainlens.model.context import LENGTH, LONGEST, context_of, default_length
from gainlens.probes.gains import UNITS
from gainlens.probes.scores import SCORES
from gainlens.stats.verdicts import MARGIN

COUNTED = 200_000_000
"""Largest size, in bytes, of a user's text for counting documents before the model is loaded."""


def whole(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least ``least``."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"{value}: expected a whole number of at least {least}"
            )
        return number

    return parse


def length(value: str) -> int | str:
    """Argument type: a number of tokens, or ``mixed``."""
    return value if value == "mixed" else whole(2)(value)


def fraction(value: str) -> float:
    """Argument type: a share to cut, from 0 to below 1."""
    try:
        number = float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0 to below 1") from None
    if 0 <= number < 1:
        return number
    hint = f"; did you mean {number / 100:g}?" if 1 < number < 100 else ""
    raise argparse.ArgumentTypeError(f"{value}: expected a share from 0 to below 1{hint}")


def fractions(value: str) -> tuple[float, ...]:
    """Argument type: several fractions, such as ``0.25,0.5``."""
    return tuple(fraction(part) for part in names(value))


def nats(value: str) -> float:
    """Argument type: a margin, a finite number above 0."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{value}: expected a number of nats above 0")
    return number


def not_negative(value: str) -> float:
    """Argument type: a number of 0 or above."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number >= 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{value}: expected a number of 0 or above")
    return number


def several(known: Mapping[str, Any] | tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Argument type: a list of names from a table, such as ``rms,qk``."""

    def parse(value: str) -> tuple[str, ...]:
        found = names(value)
        for name in found:
            if name not in known:
                near = get_close_matches(name, list(known), n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}{hint}")
        return found

    return parse


def names(value: str) -> tuple[str, ...]:
    """Argument type: comma-separated names."""
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    if not found:
        raise argparse.ArgumentTypeError(
            "is empty: expected one or more names, separated by commas"
        )
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"default": "smollm2", "help": "smollm2, gemma3-270m, tiny, a Hugging Face id, a "
              "folder or a GGUF file"},
    "text": {"default": "sotu", "help": "sotu, stdlib, pydoc, docstrings, headers, readmes, a file "
             "or a folder; several, separated by commas, are mixed, and each is judged"},
    "n_docs": {"type": whole(1), "help": "number of documents from the text"},
    "length": {
        "type": length,
        "help": f"tokens per document (default: {LENGTH}; slim and train: mixed, up to "
        f"{LONGEST}; never beyond the model's context); mixed: several lengths up to the context",
    },
    "gains": {"help": "a gains file (default: probe the calibration text)"},
    "fraction": {"type": fraction, "default": 0.5, "help": "share of key dimensions to cut"},
    "fractions": {
        "type": fractions,
        "default": (0.25, 0.5, 0.6, 0.8),
        "help": "shares of key dimensions to cut",
    },
    "score": {"choices": tuple(SCORES), "help": "which gain ranks the units"},
    "scope": {"choices": SCOPES, "help": "over which dimensions the fraction is taken"},
    "unit": {"choices": UNITS, "default": "pair", "help": "what is cut together: a pair or a dim"},
    "mode": {
        "choices": tuple(name for name in MODES if name != "patch"),
        "default": "zero",
        "help": "replacement values of cut dimensions",
    },
    "refit_rounds": {"type": whole(0), "default": 6, "help": "least-squares refit rounds; 0: none"},
    "seeds": {"type": whole(1), "default": 3, "help": "number of random controls"},
    "judge": {"type": whole(0), "help": "number of validation documents for the verdict"},
    "margin": {"type": nats, "default": MARGIN, "help": "rise of the loss, in nats, that counts as "
               "none"},
    "seed": {"type": whole(0), "default": 0, "help": "seed of everything that is random"},
    "device": {"default": "cpu", "help": "cpu, cuda, cuda:1, mps; probe, surgery and slim: "
               "disk, for a model larger than memory"},
    "out": {"help": "where to write"},
}  # fmt: skip
"""Options shared by several verbs: one meaning each, one default unless a verb sets its own."""


def add(parser: argparse.ArgumentParser, *rows: str, **defaults: Any) -> None:
    """Add rows of ``OPTIONS``.

    Args:
        parser: parser of a verb.
        rows: names of the rows.
        defaults: further rows, each with its own default for this verb.
    """
    for name in OPTIONS:  # the same order for all verbs
        if name not in rows and name not in defaults:
            continue
        row = {**OPTIONS[name]}
        if name in defaults:
            row["default"] = defaults[name]
        flags = [f"--{name.replace('_', '-')}"]
        flags += {"fraction": ["--fractions"], "fractions": ["--fraction"]}.get(name, [])
        parser.add_argument(*flags, dest=name, **row)


def add_last(parser: argparse.ArgumentParser, out: str | None = None) -> None:
    """Add ``--seed``, ``--device``, ``--out`` (if the verb writes something) and ``--json``."""
    add(parser, "seed", "device")
    if out is not None:
        add(parser, out=out)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def shown(value: Any) -> str:
    """The value of an option as it is typed."""
    if isinstance(value, tuple | list):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def next_line(options: argparse.Namespace, verb: str, **given: Any) -> str:
    """``next: gainlens VERB …`` with all options of this run that the next verb also has.

    Args:
        options: options of this verb.
        verb: the next verb.
        given: values of its options by name; None omits one.
    """
    here = options.parsers[options.verb]
    words = ["gainlens", verb]
    for action in options.parsers[verb]._actions:
        name = action.dest
        value = given.get(name)
        if name not in given and name not in ("out", "json"):
            own = getattr(options, name, None)
            value = None if own == here.get_default(name) else own
        if value is None or value is False:
            continue
        if action.option_strings:
            words.append(action.option_strings[0])
        if value is not True:
            words.append(shown(value))
    return f"next: {shlex.join(words)}"


def needs(package: str, why: str) -> None:
    """Raise ``InputError`` if a package is missing that will be needed later."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{why} needs: pip install {package.replace('_', '-')}")


def check_device(device: str) -> None:
    """Raise ``InputError`` unless torch can use ``device`` on this machine."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device!r} is not a device that torch knows") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device is available here")


def check_text(name: str, **wanted: int) -> None:
    """Reject texts with too few documents before the model is loaded, if counting is cheap.

    Documents that are too short are found later, after tokenizing.

    Args:
        name: one or several names, as for ``--text``.
        wanted: number of documents in each split, of all texts together, by its name.

    Raises:
        InputError: the text does not exist, or a split has fewer documents than wanted.
    """
    texts = text_names(name)
    for number, one in enumerate(texts):
        shares = {split: share_of(n, len(texts), number) for split, n in wanted.items()}
        _check_one_text(str(one), shares)


def _check_one_text(name: str, wanted: Mapping[str, int]) -> None:
    found = documents(name)
    if is_stream(name):
        return
    if os.path.exists(name) and _bytes(Path(name)) > COUNTED:
        return
    digests: dict[str, set[str]] = {split: set() for split in SPLITS}
    for text in found:
        document = Document.of(text)
        if document.text:
            digests[document.split].add(document.digest)
    for split, number in wanted.items():
        if len(digests[split]) < number:
            in_all = sum(map(len, digests.values()))
            expected = "a smaller --n-docs or --judge, or a text with more documents"
            if in_all == 1:
                expected = (
                    "a folder with a .txt file per document, or a .jsonl file with a string per "
                    "line; a .txt file is one document, which load_tokens(separator=) splits in "
                    "Python"
                )
            raise InputError(
                f"--text {name} has {len(digests[split])} documents in its {split} split "
                f"({in_all} in all), {number} wanted: expected {expected}"
            )


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in islice(files, 100_000) if file.is_file())


def open_model(options: argparse.Namespace) -> Any:
    """Load the model on the requested device."""
    return load_model(options.model, **place(options.device))


def place(device: str) -> dict[str, Any]:
    """``--device`` as arguments of ``load_model``: ``disk`` leaves the weights in their files."""
    if device == "disk":
        return {"device_map": "disk"}
    check_device(device)
    return {"device": device}


def length_for(options: argparse.Namespace, model: Any) -> Any:
    """``--length``, by default 256 or the model's context if that is shorter.

    Raises:
        InputError: the length exceeds the context.
    """
    if options.length is None:
        return default_length(model)
    length, context = options.length, context_of(model)
    if context is not None and length != "mixed" and length > context:
        raise InputError(f"--length {length} exceeds the model's context of {context} tokens")
    return length


def text(options: argparse.Namespace, model: Any, split: Split, n_docs: int | None = None) -> Any:
    """Tokens of one split of ``--text``: a tensor, or ``Texts`` of several texts or lengths.

    A verb that sets ``longest`` has mixed lengths up to that by default.
    """
    longest = getattr(options, "longest", None) if options.length is None else None
    return load_tokens(
        options.text,
        model,
        n_docs=options.n_docs if n_docs is None else n_docs,
        length=length_for(options, model) if longest is None else "mixed",
        longest=longest,
        split=split,
    )


@contextmanager
def resumable(part: Path) -> Iterator[None]:
    """If a run is stopped, tell the user that the same command resumes from ``part``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if part.exists():
            sys.stderr.write(f"gainlens: the same command resumes from {part}\n")
        raise
