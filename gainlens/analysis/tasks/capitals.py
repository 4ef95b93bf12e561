"""Capitals of countries."""

from __future__ import annotations

from typing import Any

from gainlens.analysis.tasks.base import Example, Task
from gainlens.analysis.tasks.facts import facts

CAPITALS = {
    "Afghanistan": "Kabul", "Argentina": "Buenos Aires", "Australia": "Canberra",
    "Austria": "Vienna", "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa",
    "Chile": "Santiago", "China": "Beijing", "Colombia": "Bogotá", "Croatia": "Zagreb",
    "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "England": "London",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest", "India": "New Delhi",
    "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin",
    "Italy": "Rome", "Japan": "Tokyo", "Kenya": "Nairobi", "Lebanon": "Beirut",
    "Libya": "Tripoli", "Mongolia": "Ulaanbaatar", "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nigeria": "Abuja",
    "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima", "the Philippines": "Manila",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Russia": "Moscow",
    "Saudi Arabia": "Riyadh", "Scotland": "Edinburgh", "Serbia": "Belgrade",
    "South Korea": "Seoul", "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Syria": "Damascus", "Taiwan": "Taipei", "Thailand": "Bangkok",
    "Turkey": "Ankara", "Ukraine": "Kyiv", "Venezuela": "Caracas", "Vietnam": "Hanoi",
}  # fmt: skip


def make(tokenizer: Any, length: int, n: int, seed: int) -> list[Example]:
    """At most as many as there are countries."""
    return facts(
        "capitals",
        lambda country: f"\nThe capital of {country} is",
        CAPITALS,
        tokenizer,
        length,
        n,
        seed,
    )


CAPITAL_FACTS = Task("capitals", "parametric", make, "the capital of a country")
