"""Chemical symbols of elements."""

from __future__ import annotations

from typing import Any

from gainlens.analysis.tasks.base import Example, Task
from gainlens.analysis.tasks.facts import facts

SYMBOLS = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "beryllium": "Be", "boron": "B",
    "carbon": "C", "nitrogen": "N", "oxygen": "O", "fluorine": "F", "neon": "Ne",
    "sodium": "Na", "magnesium": "Mg", "aluminium": "Al", "silicon": "Si", "phosphorus": "P",
    "sulfur": "S", "chlorine": "Cl", "argon": "Ar", "potassium": "K", "calcium": "Ca",
    "titanium": "Ti", "vanadium": "V", "chromium": "Cr", "manganese": "Mn", "iron": "Fe",
    "cobalt": "Co", "nickel": "Ni", "copper": "Cu", "zinc": "Zn", "gallium": "Ga",
    "germanium": "Ge", "arsenic": "As", "selenium": "Se", "bromine": "Br", "krypton": "Kr",
    "rubidium": "Rb", "strontium": "Sr", "zirconium": "Zr", "molybdenum": "Mo", "silver": "Ag",
    "cadmium": "Cd", "tin": "Sn", "antimony": "Sb", "iodine": "I", "xenon": "Xe",
    "caesium": "Cs", "barium": "Ba", "tungsten": "W", "platinum": "Pt", "gold": "Au",
    "mercury": "Hg", "lead": "Pb", "bismuth": "Bi", "radon": "Rn", "radium": "Ra",
    "thorium": "Th", "uranium": "U", "plutonium": "Pu",
}  # fmt: skip


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """At most as many as there are elements whose symbols start with different tokens."""
    return facts(
        "elements",
        lambda element: f"\nThe chemical symbol of {element} is",
        SYMBOLS,
        tokenizer,
        length,
        n,
        seed,
    )


ELEMENT_FACTS = Task("elements", "parametric", make, "the chemical symbol of an element")
