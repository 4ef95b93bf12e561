"""Check that the weights of a folder are those of its plan, from the headers of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gainlens_vllm.errors import SlimFolderError
from gainlens_vllm.families import Family
from gainlens_vllm.plan import Plan, one_row


def check_weights(folder: Path, config: Any, family: Family, plan: Plan) -> None:
    """Raise ``SlimFolderError`` unless every attention weight has the shape that the plan says.

    Args:
        folder: a local folder.
        config: its configuration.
        family: the row of its family.
        plan: its plan.

    Raises:
        SlimFolderError: no weights, an unreadable file, a weight that is missing, unknown, of
            another shape, or that turns by other frequencies than the plan says.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SlimFolderError(f"{folder} holds no model.safetensors")
    shapes: dict[str, tuple[int, ...]] = {}
    turned: dict[str, torch.Tensor] = {}
    try:
        for file in files:
            with safe_open(file, "pt") as held:
                for name in held.keys():  # noqa: SIM118 (no mapping)
                    shapes[name] = tuple(held.get_slice(name).get_shape())
                    if name.endswith(".rope_index"):
                        turned[name] = held.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise SlimFolderError(f"{file} can't be read: {error}") from None
    for layer in range(len(plan.layers)):
        where = f"{family.attention.format(layer)}."
        found = {name[len(where) :]: s for name, s in shapes.items() if name.startswith(where)}
        _compare(found, weight_shapes(config, family, plan, layer), folder, where)
        columns = plan.layers[layer].columns
        if columns is not None and plan.layers[layer].stored:
            check_columns(turned[f"{where}rope_index"], columns, f"{folder}: {where}rope_index")


def check_columns(stored: torch.Tensor, columns: torch.Tensor, where: str) -> None:
    """Raise ``SlimFolderError`` unless slots turn by the plan's frequencies."""
    if not torch.equal(stored.cpu().long(), one_row(columns)):
        raise SlimFolderError(f"{where} turns by other frequencies than the plan of the folder")


def weight_shapes(
    config: Any, family: Family, plan: Plan, layer: int
) -> dict[str, tuple[int, ...]]:
    """The attention weights that a layer must have, by their last names."""
    _, n_kv_heads, d_head = family.shape(config)
    n_heads, d_model = int(config.num_attention_heads), int(config.hidden_size)
    cut = plan.layers[layer]
    projected = d_head if family.norm else cut.key_width
    rows = {
        "q": n_heads * projected,
        "k": n_kv_heads * projected,
        "v": n_kv_heads * cut.value_width,
    }
    shapes: dict[str, tuple[int, ...]] = {f"{n}_proj.weight": (r, d_model) for n, r in rows.items()}
    shapes["o_proj.weight"] = (d_model, n_heads * cut.value_width)
    rows["o"] = d_model
    shapes |= {f"{name}_proj.bias": (rows[name],) for name in plan.biases}
    if family.norm:
        shapes |= {f"{name}_norm": (n_kv_heads, cut.key_width) for name in "qk"}
    if cut.columns is not None and cut.stored:
        shapes["rope_index"] = tuple(one_row(cut.columns).shape)
    return shapes


def _compare(
    found: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    folder: Path,
    where: str,
) -> None:
    if missing := sorted(set(wanted) - set(found)):
        raise SlimFolderError(f"{folder} lacks the weight {where}{missing[0]}")
    if unknown := sorted(set(found) - set(wanted)):
        raise SlimFolderError(
            f"{folder} has the weight {where}{unknown[0]}, which this gainlens-vllm does not know"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise SlimFolderError(
                f"{folder}: {where}{name} has shape {found[name]}, its plan says {shape}"
            )
