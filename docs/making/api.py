"""The API page: every public name under the room that it lives in."""

from __future__ import annotations

ROOMS = {
    "model": "Model and text",
    "probes": "Probe",
    "ablation": "Ablate",
    "analysis": "Analyse",
    "export": "Export",
    "training": "Train",
    "report": "Report",
    "errors": "Errors",
}


def names_by_room() -> dict[str, list[tuple[str, str]]]:
    """``(public name, full path)`` of every name of ``gainlens.__all__``, by room."""
    import gainlens as gl

    found: dict[str, list[tuple[str, str]]] = {room: [] for room in ROOMS}
    for name in gl.__all__:
        value = getattr(gl, name)
        room = value.__module__.split(".")[1]
        if value.__module__.startswith("gainlens_kernels"):
            room = "export"
        found[room].append((name, f"{value.__module__}.{value.__qualname__}"))
    return found


def api() -> str:
    """The whole page below its introduction."""
    import gainlens_kernels as kernels

    parts = []
    for room, names in names_by_room().items():
        if not names:
            continue
        parts.append(f"## {ROOMS[room]}")
        parts += [_entry("gl", "gainlens", name, path) for name, path in names]
    parts.append("## Kernels")
    parts += [
        _entry(
            "gainlens_kernels",
            "gainlens_kernels",
            name,
            f"{getattr(kernels, name).__module__}.{name}",
        )
        for name in kernels.__all__
    ]
    return "\n\n".join(parts)


def _entry(short: str, package: str, name: str, path: str) -> str:
    return (
        f"### {short}.{name} {{ #{package}.{name} }}\n\n"
        f"::: {path}\n    options:\n      heading_level: 4"
    )
