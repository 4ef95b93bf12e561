"""What loading the weights of a slim model has in common over the families."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gainlens_vllm.configs import family_of, plan_of
from gainlens_vllm.folder import check_columns

LAST = ".rope_index"


def without_index(
    weights: Iterable[tuple[str, torch.Tensor]], config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights without the indices of frequencies, which come from the plan.

    Args:
        weights: names and tensors of a folder.
        config: its configuration.

    Raises:
        SlimFolderError: an index is not the plan's.
    """
    family, plan = family_of(config), plan_of(config)
    expected = {
        f"{family.attention.format(number)}{LAST}": layer.columns
        for number, layer in enumerate(plan.layers)
    }
    for name, tensor in weights:
        if not name.endswith(LAST):
            yield name, tensor
        elif (columns := expected.get(name)) is not None:
            check_columns(tensor, columns, name)
