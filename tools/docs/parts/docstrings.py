"""What is missing in the docstrings of public names.

Why not pydoclint: it checks that sections match signatures, for every function of a file. This
check asks only of public names, and asks for what pydoclint does not know: that a tensor has its
shape, and that "as for f" may stand for a list of arguments.

Asked of every name in ``__all__`` of gainlens and of the kernels, and of their public methods: a
docstring; every parameter named in it, or in that of the method that it overrides; tensors
annotated with their shape (a dictionary of named tensors has none); ``Raises`` where the body
raises.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

SELF_EVIDENT = {"self", "cls", "ax", "axes", "path", "progress"}
"""Parameters that mean the same everywhere: see the page on the API."""
NAMED_TENSORS = re.compile(r"\b(dict|Mapping)\[str, (torch\.)?Tensor\]")


def faults() -> list[str]:
    """One line per fault; empty when all is documented."""
    import gainlens_kernels

    import gainlens

    found = []
    for package in (gainlens, gainlens_kernels):
        for name in package.__all__:
            value = getattr(package, name)
            where = f"{package.__name__}.{name}"
            found += faults_of(value, where)
            if inspect.isclass(value):
                for method, function in methods(value):
                    found += faults_of(
                        function, f"{where}.{method}", inspect.getdoc(value) or "",
                        overridden(value, method),
                    )  # fmt: skip
    return found


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class or one of its bases in gainlens defines."""
    seen = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("gainlens"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if inspect.isfunction(value):
                yield name, value


def overridden(kind: type, method: str) -> str:
    """Docstrings of the methods of this name in all base classes within gainlens."""
    found = [
        vars(base)[method].__doc__ or ""
        for base in kind.__mro__[1:]
        if base.__module__.startswith("gainlens") and method in vars(base)
    ]
    return "\n".join(found)


def faults_of(value: Any, where: str, around: str = "", above: str = "") -> list[str]:
    """Faults of one function or class.

    Args:
        value: the function or class.
        where: its name in the message.
        around: the docstring of the class that it is in.
        above: the docstrings of the methods that it overrides.
    """
    if not (value.__doc__ or "").strip():
        return [f"{where}: no docstring"]
    text = inspect.getdoc(value) or ""
    if not inspect.isfunction(value):
        return []
    found = []
    parameters = inspect.signature(value).parameters.values()
    missing = [
        p.name
        for p in parameters
        if p.name not in SELF_EVIDENT
        and p.kind is not p.VAR_KEYWORD
        and not re.search(rf"\b{p.name}\b", f"{text}\n{above}")
    ]
    if missing and "as for ``" not in text and "arguments as" not in text.lower():
        found.append(f"{where}: says nothing of {', '.join(missing)}")
    annotations = {p.name: p.annotation for p in parameters} | {
        "the result": inspect.signature(value).return_annotation
    }
    found += [
        f"{where}: {name} is a tensor of unknown shape ({a})"
        for name, a in annotations.items()
        if re.search(r"\bTensor\b", NAMED_TENSORS.sub("", str(a)))
        and not re.search(r"\b(Float|Int|Bool)\[", str(a))
    ]
    raises = re.search(r"^\s+raise [A-Z]\w+\(", inspect.getsource(value), re.MULTILINE)
    if (
        raises
        and not re.search(r"\braise|\berrors as\b", text + around, re.I)
        and "Refuse" not in text
    ):
        found.append(f"{where}: raises, and says nothing of it")
    return found
