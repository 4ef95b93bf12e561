"""How often the rule behind "holds" errs, by simulation with known truth, as one JSON file.

    python benchmarks/verdict_simulation.py --out docs/results/verdict_simulation.json

The true damage equals the margin, so every "holds" is false; and for the power it is a quarter of
the margin, with a spread of one margin. Six shapes of the differences between documents, and
clusters of four documents that depend on each other and are grouped; six sizes; 20,000 draws of
each. Then the stopping rule on the same shapes, with a look after every eight documents. It uses
the functions of ``gainlens.stats`` with the resamples of the rule itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gainlens.environment import environment
from gainlens.files import check_writable, write_json
from gainlens.stats.intervals import RESAMPLES, bootstrap_ends, t_quantile
from gainlens.stats.stopping import StoppingRule, skew_ends
from gainlens.stats.verdicts import ENOUGH, LEAST, LEVEL, resamples_for

MARGIN, QUARTER = 1.0, 0.25
SIZES = (8, 16, 32, 48, ENOUGH, 100)
TOTALS = (144, 288)
BATCH = 8
CLUSTER = 4
AT_ONCE = 500


def _rare(share: float) -> Callable[[np.random.Generator, tuple[int, int]], np.ndarray]:
    """One document in so many suffers; the others agree closely."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        harm = (rng.random(shape) < share).astype(float) + rng.normal(0, 0.01, shape)
        return (harm - share) / np.sqrt(share * (1 - share) + 1e-4)

    return draw


def _lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    mean, variance = np.exp(0.5), (np.e - 1) * np.e
    return (rng.lognormal(0, 1, shape) - mean) / np.sqrt(variance)


def _pareto(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    a = 2.5
    mean, variance = a / (a - 1), a / ((a - 1) ** 2 * (a - 2))
    return (1 + rng.pareto(a, shape) - mean) / np.sqrt(variance)


def _clusters(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Totals of clusters: four fifths of the variance are common to a cluster, and skewed."""
    common = rng.exponential(1, shape) - 1
    own = rng.normal(0, 1, (*shape, CLUSTER)).sum(-1)
    return np.sqrt(0.8) * CLUSTER * common + np.sqrt(0.2) * own


SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "exponential": lambda rng, shape: rng.exponential(1, shape) - 1,
    "lognormal": _lognormal,
    "Pareto 2.5": _pareto,
    "one in ten": _rare(0.1),
    "one in twenty": _rare(0.05),
    "clusters of four": _clusters,
}
"""Draws of mean 0 and a spread of 1: an interval's ends move and stretch with the differences."""


def main() -> None:
    """Read the command line, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/results/verdict_simulation.json")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    check_writable(Path(options.out).parent)
    start = time.perf_counter()
    fixed = [one_size(shape, n, options.draws, options.seed) for shape in SHAPES for n in SIZES]
    stopped = [
        stopping(shape, total, options.draws, options.seed) for shape in SHAPES for total in TOTALS
    ]
    result = {
        "command": f"python benchmarks/verdict_simulation.py --draws {options.draws} "
        f"--seed {options.seed}",
        "seed": options.seed,
        "draws": options.draws,
        "level": LEVEL,
        "documents_enough": ENOUGH,
        "documents_least": LEAST,
        "resamples": RESAMPLES,
        "units": "shares of draws; documents of 'clusters of four' are clusters",
        "fixed": fixed,
        "stopping": stopped,
        "seconds": round(time.perf_counter() - start),
        **environment(),
    }
    write_json(options.out, result)
    print(f"{options.out} written")


def one_size(shape: str, n: int, draws: int, seed: int) -> dict[str, Any]:
    """False words and power of one shape at one number of documents."""
    sizes = _sizes(shape, n)
    low, high, student = [], [], []
    half = t_quantile(0.95, n - 1) / np.sqrt(n)
    for sums in _samples(shape, n, draws, seed):
        error = (1 - LEVEL) / 2
        ends = bootstrap_ends(sums, sizes, (error, error))
        low.append(ends[0])
        high.append(ends[1])
        means = sums / sizes
        student.append(means.mean(1) + half * means.std(1, ddof=1))
    below = np.concatenate(high)
    row = {
        "shape": shape,
        "documents": n,
        "false_interval_below": float((below < 0).mean()),
        "false_holds": float((below < 0).mean()) if n >= ENOUGH else 0.0,
        "false_holds_but_rare": float((below < 0).mean()) if LEAST <= n < ENOUGH else 0.0,
        "false_fails": float((np.concatenate(low) > 0).mean()),
        "power_interval_below": float((below < MARGIN - QUARTER).mean()),
        "false_holds_student_95": float((np.concatenate(student) < 0).mean()),
    }
    print(row, flush=True)
    return row


def stopping(shape: str, total: int, draws: int, seed: int) -> dict[str, Any]:
    """False words of the stopping rule, and how many documents it takes where all is well."""
    rule = StoppingRule(MARGIN, tuple(range(BATCH, total + 1, BATCH)))
    at: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"null": [], "quarter": []}
    for sums in _samples(shape, total, draws, seed):
        ends = list(ends_at_looks(rule, sums, _sizes(shape, total)))
        for name, mean in (("null", 0.0), ("quarter", QUARTER - MARGIN)):
            at[name].append(decisions(rule, ends, -mean))
    row: dict[str, Any] = {"shape": shape, "documents": total, "looks": len(rule.looks)}
    row["holds_looks"] = list(rule.holds_looks)
    for name, found in at.items():
        status = np.concatenate([part[0] for part in found])
        used = np.concatenate([part[1] for part in found])
        row[name] = {
            "holds": float((status == 1).mean()),
            "fails": float((status == -1).mean()),
            "mean_documents": float(used.mean()),
        }
    print(row, flush=True)
    return row


def ends_at_looks(
    rule: StoppingRule, sums: np.ndarray, sizes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ends of the rule's interval at each look; no upper end where nothing may hold."""
    for n in rule.looks:
        part, counts = sums[:, :n], sizes[:n]
        fails, holds = rule.errors(n)
        low, high = np.full(len(sums), -np.inf), np.full(len(sums), np.inf)
        if n in rule.holds_looks:
            high = bootstrap_ends(part, counts, (holds, holds), resamples=resamples_for(2 * holds))[
                1
            ]
        if n == rule.looks[-1]:
            low = bootstrap_ends(part, counts, (fails, fails), resamples=resamples_for(2 * fails))[
                0
            ]
        else:
            low = skew_ends(part / counts, 1 - 2 * fails)[0]
        yield low, high


def decisions(
    rule: StoppingRule, ends: list[tuple[np.ndarray, np.ndarray]], margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """1 for holds, -1 for fails, 0 for neither; and after how many documents."""
    status = np.zeros(len(ends[0][0]), dtype=int)
    used = np.full(len(status), rule.looks[-1])
    for n, (low, high) in zip(rule.looks, ends, strict=True):
        going = status == 0
        status[going & (low > margin)] = -1
        status[going & (high < margin) & (low <= margin)] = 1
        used[going & (status != 0)] = n
    return status, used


def _sizes(shape: str, n: int) -> np.ndarray:
    return np.full(n, float(CLUSTER if shape == "clusters of four" else 1))


def _samples(shape: str, n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, n, list(SHAPES).index(shape)])
    for start in range(0, draws, AT_ONCE):
        yield SHAPES[shape](rng, (min(AT_ONCE, draws - start), n))


if __name__ == "__main__":
    main()
