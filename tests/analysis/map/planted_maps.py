"""Gains of generated models whose shared units are known."""

from __future__ import annotations

import numpy as np


def planted(
    seed: int,
    shared: int,
    private: int,
    *,
    ratio: float = 2.0,
    noise: float = 0.1,
    shape: tuple[int, int, int] = (12, 4, 32),
    per: str = "layer",
) -> tuple[np.ndarray, np.ndarray]:
    """Gains ``[layer, head, unit]`` and the boolean set of shared units.

    ``shared`` units are ``ratio`` times as loud as the quiet ones in every layer; ``private`` ones
    besides are so in one layer (``per="layer"``: in all of its heads) or one head. All gains carry
    log-normal noise, and each head a scale of its own, which no comparison may depend on.
    """
    rng = np.random.default_rng(seed)
    layers, heads, units = shape
    loud = np.zeros(shape, dtype=bool)
    common = rng.permutation(units)[:shared]
    rest = np.setdiff1d(np.arange(units), common)
    for layer in range(layers):
        of_layer = rng.permutation(rest)[:private]
        for head in range(heads):
            chosen = of_layer if per == "layer" else rng.permutation(rest)[:private]
            loud[layer, head, chosen] = True
    loud[..., common] = True
    gains = np.where(loud, ratio, 1.0) * np.exp(noise * rng.standard_normal(shape))
    gains *= np.exp(rng.standard_normal((layers, heads, 1)))
    truth = np.zeros(units, dtype=bool)
    truth[common] = True
    return gains, truth


def flat(seed: int, cv: float = 0.1, shape: tuple[int, int, int] = (12, 4, 32)) -> np.ndarray:
    """Independent gains so even that their cosines are above 0.98."""
    return np.exp(cv * np.random.default_rng(seed).standard_normal(shape))


def f1(found: tuple[int, ...], truth: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 1 where both sets are empty."""
    wanted = {int(u) for u in np.flatnonzero(truth)}
    total = len(wanted) + len(found)
    return 1.0 if total == 0 else 2 * len(wanted & set(found)) / total


def planted_model(seed: int, shared: int, private: int, ratio: float = 2.0):
    """A random Llama of 24 layers whose keys are ``ratio`` times as loud on planted rotary pairs.

    Returns:
        The bridge, and the boolean set of pairs that are loud in every layer.
    """
    import torch
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads, d_head = 24, 2, 32
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=d_head,
        vocab_size=64,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    hf = LlamaForCausalLM(config).eval()
    n_pairs = d_head // 2
    generator = torch.Generator().manual_seed(seed)
    # Spread over frequency: a run of neighbours is a smooth profile, which is no sharing.
    parts = torch.arange(n_pairs).tensor_split(shared) if shared else ()
    picked = [int(p[torch.randint(len(p), (1,), generator=generator)]) for p in parts]
    common = torch.tensor(picked, dtype=torch.long)
    rest = torch.tensor([p for p in range(n_pairs) if p not in common.tolist()])
    with torch.no_grad():
        for block in hf.model.layers:
            own = rest[torch.randperm(len(rest), generator=generator)[:private]]
            loud = torch.cat([common, own])
            rows = block.self_attn.k_proj.weight.view(heads, d_head, -1)
            rows[:, torch.cat([loud, loud + n_pairs])] *= ratio
    truth = np.zeros(n_pairs, dtype=bool)
    truth[common.numpy()] = True
    return build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=config), truth


PROFILES = ("common", "uniform", "normal")
TAILS = ("normal", "t", "exponential")


def profiled(
    seed: int,
    slopes: str,
    tails: str,
    *,
    shape: tuple[int, int, int] = (12, 4, 32),
    noise: float = 0.3,
) -> np.ndarray:
    """Gains ``[layer, head, unit]`` that follow log frequency and share nothing besides.

    Args:
        seed: of the draw.
        slopes: of the log gain over the range of frequencies, by layer: ``common`` 1.1, ``uniform``
            0.2 to 1.6, ``normal`` 0.9 ± 0.5.
        tails: of the log noise: ``normal``, ``t`` with two degrees of freedom, or that of
            ``exponential`` gains. Half of its variance is common to the heads of a layer.
        shape: layers, heads, units.
        noise: scale of the log noise.
    """
    rng = np.random.default_rng(seed)
    layers, _, units = shape
    slope = {
        "common": np.full(layers, 1.1),
        "uniform": rng.uniform(0.2, 1.6, layers),
        "normal": rng.normal(0.9, 0.5, layers),
    }[slopes]
    draw = {
        "normal": lambda size: rng.standard_normal(size),
        "t": lambda size: rng.standard_t(2, size),
        "exponential": lambda size: np.log(rng.exponential(size=size)),
    }[tails]
    both = (draw((layers, 1, units)) + draw(shape)) * np.sqrt(0.5)
    return np.exp(slope[:, None, None] * np.linspace(0, 1, units) + noise * both)
