"""How wide cached heads are: physical widths that an attention backend takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.plan import Plan

STEP = 8
"""On a GPU, widths are rounded up to whole vectors of 16 bytes in half precision."""
LEAST = 16
"""The narrowest operand of Triton's matrix product."""
LEAST_STOCK = 32
"""The narrowest head of vLLM's stock GPU backends."""


@dataclass(frozen=True)
class Route:
    """The widths that are cached, and what computes the attention.

    Attributes:
        keys, values: cached dimensions per head, one entry per layer.
        thin: whether Triton's attention for unequal widths computes it; else vLLM's choice.
        full: cached numbers per token and key head of the uncut model on the same device.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    thin: bool
    full: int

    @property
    def share(self) -> float:
        """Bytes of the cache, as a share of those of the uncut model on the same device."""
        return (sum(self.keys) + sum(self.values)) / self.full


def equal_widths(plan: Plan, d_head: int, taken: Sequence[int]) -> Route:
    """For a backend that takes keys and values of the same width, out of a list.

    Args:
        plan: what was cut.
        d_head: width of a full head.
        taken: widths that the backend takes.

    Raises:
        SlimFolderError: a head is wider than every one of them.
    """
    widths = tuple(_next(max(x.key_width, x.value_width), taken) for x in plan.layers)
    return Route(widths, widths, False, 2 * len(widths) * _next(d_head, taken))


def _next(width: int, taken: Sequence[int]) -> int:
    wide = [w for w in taken if w >= width]
    if not wide:
        raise SlimFolderError(
            f"heads of {width} dimensions: vLLM's attention on this device takes "
            f"{', '.join(map(str, taken))}"
        )
    return min(wide)


def thin_widths(plan: Plan, d_head: int) -> Route:
    """For Triton's attention on a GPU: each layer its own widths, rounded up a little."""
    keys = tuple(_rounded(x.key_width) for x in plan.layers)
    values = tuple(_rounded(x.value_width) for x in plan.layers)
    stock = keys == values and min(keys) >= LEAST_STOCK
    return Route(keys, values, not stock, 2 * len(keys) * d_head)


def _rounded(width: int) -> int:
    return max(LEAST, -(-width // STEP) * STEP)


def summary(plan: Plan, route: Route) -> str:
    """One line for the log: what is cached and what that saves."""
    keys, values = (
        _span([getattr(x, name) for x in plan.layers]) for name in ("key_width", "value_width")
    )
    cached = f"keys in {_span(route.keys)}, values in {_span(route.values)} dimensions"
    what = f"keys of {keys} and values of {values} dimensions per head are cached as {cached}"
    if route.share >= 1:
        return f"{what}: padded with zeros for this backend, so NOTHING IS SAVED here"
    return f"{what}: {route.share:.3f} of the cache of the uncut model"


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"
