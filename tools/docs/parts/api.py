"""The API pages: every public name, on the page of the room that it lives in."""

from __future__ import annotations

from importlib import import_module
from typing import Any

PAGES: dict[str, tuple[str, ...]] = {
    "model": ("data", "model"),
    "probes": ("probes",),
    "ablation": ("ablation",),
    "analysis": ("stats", "analysis"),
    "export": ("export",),
    "training": ("training",),
    "report": ("report",),
    "errors": ("errors",),
    "kernels": (),
}
"""Pages of ``docs/api`` and the rooms whose public names each has."""


def names_by_page() -> dict[str, list[tuple[str, str]]]:
    """``(public name, full path)`` of the names at the top and those one level down, by page.

    Raises:
        KeyError: a name lives in a room that is on no page.
    """
    import gainlens as gl

    page_of = {room: page for page, rooms in PAGES.items() for room in rooms}
    found: dict[str, list[tuple[str, str]]] = {page: [] for page in PAGES}
    for name in gl.__all__:
        value = getattr(gl, name)
        room = value.__module__.split(".")[1]
        if value.__module__.startswith("gainlens_kernels"):
            room = "export"
        found[page_of[room]].append((name, _path(value)))
    for room, names in gl._ONE_LEVEL_DOWN.items():
        for name in names:
            value = getattr(import_module(f"gainlens.{room}"), name)
            found[page_of[room]].append((f"{room}.{name}", _path(value)))
    return found


def page(name: str) -> str:
    """The entries of one page."""
    if name == "kernels":
        import gainlens_kernels as kernels

        entries = [(n, _path(getattr(kernels, n))) for n in kernels.__all__]
        return "\n\n".join(_entry("gainlens_kernels", "gainlens_kernels", *e) for e in entries)
    return "\n\n".join(_entry("gl", "gainlens", *e) for e in names_by_page()[name]) or (
        "*This room has no name at the top level.*"
    )


def _path(value: Any) -> str:
    # A registered operator has no qualified name of its own.
    return f"{value.__module__}.{getattr(value, '__qualname__', None) or value.__name__}"


def _entry(short: str, package: str, name: str, path: str) -> str:
    return (
        f"## {short}.{name} {{ #{package}.{name} }}\n\n"
        f"::: {path}\n    options:\n      heading_level: 3"
    )
