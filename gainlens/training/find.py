"""Find the rows of parameters that a plan makes active, for all three kinds of model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from transformers.pytorch_utils import Conv1D

from gainlens.errors import InputError, UnsupportedModelError
from gainlens.export.building import without_weights
from gainlens.export.families import SlimFamily
from gainlens.export.plan import SlicePlan
from gainlens.export.values import ValuePath
from gainlens.training.norm_maps import NormMaps
from gainlens.training.slices import Layout, Place, Slice, from_rows, module_at, places_of, to_rows
from gainlens.training.slot_turns import SlotTurns

TRAINABLE = ("q", "k", "v", "o", "mlp", "norm", "embedding", "frequencies")
"""Names accepted by ``train=``. For q and k only the kept units are trained; where a norm acts
before the maps of the cut, these are the kept rows of the maps. ``frequencies`` are those of a slot
cut; heads that share a set go on sharing it."""


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one attention parameter that belong to queries, keys or values.

    Attributes:
        letter: ``q``, ``k`` or ``v``.
        parameter: the parameter that holds them, possibly with others.
        layout: layout of the parameter.
        rows: row indices by head, ``[head, d_head]``.
    """

    letter: str
    parameter: torch.nn.Parameter
    layout: Layout
    rows: Int[torch.Tensor, "head d_head"]


def find_slices(
    root: torch.nn.Module,
    kind: str,
    family: SlimFamily,
    config: Any,
    plan: SlicePlan,
    train: tuple[str, ...],
    maps: NormMaps | None = None,
    paths: Sequence[ValuePath | None] = (),
    slots: SlotTurns | None = None,
) -> list[Slice]:
    """The slices of a model.

    Args:
        root: the module to run.
        kind: ``huggingface`` (also a fast copy), ``bridge`` or ``hooked``.
        family, config: of the model.
        plan: the active units; its maps are folded into the initial rows, unless a norm acts
            before them.
        train: some of ``TRAINABLE``.
        maps: those behind a norm, whose rows are trained in the place of the projections'.
        paths: thin values by layer, where training starts from: the first rows of each value head
            hold them, the others are ghosts.
        slots: the frequencies of the plan's slots.

    Raises:
        InputError: a name in ``train`` is unknown, or the model has no such weights; thin values of
            a model that is no transformers model, or without ``v`` and ``o`` in ``train``;
            ``frequencies`` of a plan without slots, or whose slots are a grid.
        UnsupportedModelError: the projections are stored in an unknown form.
    """
    check_train(train)
    if "frequencies" in train and (slots is None or plan.facts.get("grid")):
        found = "no slots" if slots is None else "slots on a grid"
        raise InputError(f"train={train!r}: this plan has {found}; expected slots free to move")
    thin = any(path is not None for path in paths)
    if thin and kind != "huggingface":
        raise InputError(
            "plan cuts values: expected the transformers model itself, not one wrapped"
        )
    if thin and not {"v", "o"} <= set(train):
        raise InputError(f"train={train!r}: a plan that cuts values trains v and o as well")
    places = places_of(root)
    names = {id(p): n for n, p in root.named_parameters()}
    by_parameter: dict[int, list[tuple[int, Part]]] = {}
    outputs: set[int] = set()
    done = _added_biases(root, family, config) if kind == "hooked" else set()
    for layer in range(plan.shape[0]):
        for part in _parts(root, kind, family, layer, config, plan.shape):
            if id(part.parameter) in done:
                continue
            by_parameter.setdefault(id(part.parameter), []).append((layer, part))
        outputs |= _outputs(root, kind, family, layer)
    slices: list[Slice] = []
    norm = family.key_norm(config) is not None
    for key, parts in by_parameter.items():
        some = [(n, part) for n, part in parts if maps is None or part.letter == "v"]
        if some:
            slices += _attention_slices(some, plan, train, norm, names[key], places[key], paths)
    done |= set(by_parameter)
    starts = _thin_outputs(root, family, paths)
    for name, parameter in root.named_parameters():
        if id(parameter) in done or "qkv." in name:  # unused copy of a joint matrix in a bridge
            continue
        what = "o" if id(parameter) in outputs else _kind_of(name)
        if what in train:
            leaf = _leaf(starts.get(id(parameter), parameter.detach()))
            slices.append(Slice(name, "other", parameter, places[id(parameter)], leaf=leaf))
    if maps is not None:
        slices += maps.slices(plan.keep, train)
    if slots is not None:
        slices += slots.slices(train)
    if not any(part.leaf is not None for part in slices):
        raise InputError(f"train={train!r}: this model has no such weights, so nothing is active")
    return slices


def check_train(train: tuple[str, ...]) -> None:
    """Raise ``InputError`` unless every name is one of ``TRAINABLE``, each once."""
    unknown = [name for name in train if name not in TRAINABLE]
    if not train or unknown or len(set(train)) != len(train):
        raise InputError(
            f"train={train!r}: expected one or several of {', '.join(TRAINABLE)}, each once"
        )


def _attention_slices(
    parts: list[tuple[int, Part]],
    plan: SlicePlan,
    train: tuple[str, ...],
    norm: bool,
    name: str,
    places: list[Place],
    paths: Sequence[ValuePath | None],
) -> list[Slice]:
    """The slice of a parameter; two where values share it, which have a learning rate of theirs."""
    first = parts[0][1]
    stored, layout = first.parameter, first.layout
    device = stored.device
    rows = to_rows(stored.detach(), layout).clone()
    trained: list[torch.Tensor] = []
    written: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    changed: list[torch.Tensor] = []
    for layer, part in parts:
        order = part.rows.to(device)
        if part.letter == "v":
            path = paths[layer] if paths else None
            if path is not None:
                down = path.down.to(device)
                thin = torch.einsum("hrd,hd...->hr...", down, rows[order].double())
                rows[order] = 0
                rows[order[:, : down.shape[1]]] = thin.to(rows.dtype)
            if "v" in train:
                values.append((order if path is None else order[:, : down.shape[1]]).flatten())
                changed.append(order.flatten())
            continue
        keep = plan.keep[layer].to(device)
        group = len(order) // len(keep)
        active = order[keep.repeat_interleave(group, 0)]
        if plan.maps is not None:
            maps = (plan.maps.queries if part.letter == "q" else plan.maps.keys)[layer]
            heads = rows[order].double()
            new = torch.einsum("hrd,hd...->hr...", maps.to(device).double(), heads)
            rows[order] = new.to(rows.dtype)
        if not norm:  # the statistic of a norm includes the ghosts, which are masked after it
            rows[order[~keep.repeat_interleave(group, 0)]] = 0
        written.append(active)
        if part.letter in train:
            trained.append(active)
    found: list[Slice] = []
    for group_name, some, change in (("qk", trained, written), ("other", values, changed)):
        if not change:
            continue
        none = torch.zeros(0, dtype=torch.long, device=device)
        index = torch.cat(some).sort().values if some else none
        if len(index) == len(rows):
            whole = _leaf(from_rows(rows, stored.shape, layout))
            return [Slice(name, group_name, stored, places, layout, leaf=whole)]
        below = found[-1] if found else None
        rest = rows.index_fill(0, index, 0) if below is None else None
        found.append(
            Slice(
                name if below is None else f"{name} (values)",
                group_name,
                stored,
                places,
                layout,
                index,
                _leaf(rows[index]) if len(index) else None,
                rest if rest is not None and bool(rest.any()) else None,
                torch.cat(change).sort().values,
                below,
            )
        )
    return found


def _thin_outputs(
    root: torch.nn.Module, family: SlimFamily, paths: Sequence[ValuePath | None]
) -> dict[int, Float[torch.Tensor, "..."]]:
    """Output projections that read thin values from the first columns of each head, by ``id``."""
    found: dict[int, torch.Tensor] = {}
    for layer, path in enumerate(paths):
        if path is None:
            continue
        output = root.get_submodule(f"{family.attention.format(layer)}.{family.output}")
        stored: Any = output.weight
        weight = stored.detach().double()
        weight = weight.T if family.layout.columns else weight
        n_kv, d, width = path.up.shape
        heads = weight.reshape(len(weight), -1, d)
        up = path.up.to(weight.device).repeat_interleave(heads.shape[1] // n_kv, 0)
        new = torch.zeros_like(heads)
        new[..., :width] = torch.einsum("mhd,hdr->mhr", heads, up)
        flat = new.flatten(1).to(stored.dtype)
        found[id(stored)] = flat.T.contiguous() if family.layout.columns else flat
    return found


def _leaf(values: Float[torch.Tensor, "..."]) -> Float[torch.Tensor, "..."]:
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.to(wide).clone(memory_format=torch.contiguous_format).requires_grad_()


def _kind_of(name: str) -> str:
    last = name.rsplit(".", 2)
    text = ".".join(last).lower()
    if any(key in text for key in ("norm", "ln_", "ln1", "ln2")):
        return "norm"
    if any(key in name.lower() for key in ("embed", "lm_head", "wte", "wpe")):
        return "embedding"
    return "mlp"


def _parts(
    root: Any,
    kind: str,
    family: SlimFamily,
    layer: int,
    config: Any,
    shape: tuple[int, int, int],
) -> Iterator[Part]:
    _, n_kv, d = shape
    n_heads = int(config.num_attention_heads)
    sizes = {"q": n_heads, "k": n_kv, "v": n_kv}
    if kind == "huggingface":
        module = root.get_submodule(family.attention.format(layer))
        where = family.layout
        for letter, rows in where.rows(config).items():
            for parameter in module.get_submodule(where.part(letter)).parameters():
                yield Part(letter, parameter, "columns" if where.columns else "rows", rows)
        return
    if kind == "bridge":
        attention = root.blocks[layer].attn
        owners: dict[str, Any] = {letter: module_at(attention, letter) for letter in "qkv"}
    else:
        attention = root.blocks[layer].attn
        for letter, heads in sizes.items():
            rows = torch.arange(heads * d).reshape(heads, d)
            for stem in ("W", "b"):
                tables = attention._parameters
                name = f"_{stem}_{letter.upper()}"
                parameter = tables.get(name, tables.get(name[1:]))
                if parameter is None:
                    raise UnsupportedModelError(f"this HookedTransformer has no {name[1:]}")
                yield Part(letter, parameter, "heads", rows)
        return
    for letter, owner in owners.items():
        weight = getattr(owner, "weight", None)
        heads = sizes[letter]
        if weight is None or heads * d not in weight.shape:
            raise UnsupportedModelError(
                f"{family.model_class}: no {letter} projection of {heads * d} units, layer {layer}"
            )
        layout: Layout = "columns" if isinstance(owner, Conv1D) else "rows"
        for parameter in owner.parameters():
            yield Part(letter, parameter, layout, torch.arange(heads * d).reshape(heads, d))


def _added_biases(root: Any, family: SlimFamily, config: Any) -> set[int]:
    """Biases of a HookedTransformer that its family has not: zeros, which stay.

    Trained, they would make a model that no checkpoint of the family holds.
    """
    whole = without_weights(lambda: getattr(transformers, family.model_class)(config))
    held = [name for name, _ in whole.named_parameters() if name.endswith("bias")]
    attention = family.attention.format(0)
    own = {letter: f"{attention}.{letter}_proj.bias" for letter in "qkv"}
    own["o"] = f"{attention}.{family.output}.bias"
    joint = f"{attention}.{family.layout.parts[0]}.bias" in held and family.layout.joint
    missing = {f"attn.b_{n.upper()}" for n, name in own.items() if name not in held}
    if joint:
        missing -= {f"attn.b_{n}" for n in "QKV"}
    if not any(".mlp." in name for name in held):
        missing |= {f"mlp.b_{n}" for n in ("in", "out", "gate")}
    missing.add("unembed.b_U")
    return {
        id(parameter)
        for name, parameter in root.named_parameters()
        if ".".join(name.replace("._b_", ".b_").rsplit(".", 2)[-2:]) in missing
        and not bool(parameter.detach().any())
    }


def _outputs(root: Any, kind: str, family: SlimFamily, layer: int) -> set[int]:
    if kind == "huggingface":
        path = f"{family.attention.format(layer)}.{family.output}"
        return {id(p) for p in root.get_submodule(path).parameters()}
    attention = root.blocks[layer].attn
    if kind == "bridge":
        owner = module_at(attention, "o")
        return set() if owner is None else {id(p) for p in owner.parameters()}
    return {id(attention.W_O), id(attention.b_O)}
