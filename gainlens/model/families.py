"""Table of model families and how each rotates its keys. A new family is one row.

A row is only a declaration. ``gainlens.model.verify`` measures the model and refuses it if the
declaration is wrong. An architecture without a row is tested against every known pairing and
accepted if exactly one fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["half", "adjacent", "none"]
"""``half``: dimension i rotates with i + rotary_dim/2. ``adjacent``: 2i rotates with 2i + 1."""


@dataclass(frozen=True)
class Family:
    """How an architecture treats its keys: a row of the table.

    Attributes:
        pairing: which two dimensions of a head rotate together.
        note: special treatment the family needs, shown when the model is refused.
    """

    pairing: Pairing
    note: str = ""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("half"),
    "MistralForCausalLM": Family("half"),
    "Qwen2ForCausalLM": Family("half", "biases on q and k"),
    "Qwen3ForCausalLM": Family("half", "norm on keys"),
    "GemmaForCausalLM": Family("half"),
    "Gemma2ForCausalLM": Family("half", "attention logits are soft-capped"),
    "Gemma3ForCausalLM": Family("half", "norm on keys; two rotary bases"),
    "Olmo2ForCausalLM": Family("half", "norm over all key heads at once"),
    "GraniteForCausalLM": Family("half"),
    "Starcoder2ForCausalLM": Family("half"),
    "SmolLM3ForCausalLM": Family("half", "some layers do not rotate"),
    "StableLmForCausalLM": Family("half", "partial rotary"),
    "PhiForCausalLM": Family("half", "partial rotary"),
    "Phi3ForCausalLM": Family("half", "hook_rot_k never fires"),
    "GPTNeoXForCausalLM": Family("half", "partial rotary; hook_rot_k never fires"),
    "FalconForCausalLM": Family("half", "hook_rot_k never fires"),
    "GPTJForCausalLM": Family("adjacent", "partial rotary; hook_rot_k never fires"),
    "CohereForCausalLM": Family("adjacent"),
    "Cohere2ForCausalLM": Family("adjacent", "some layers do not rotate"),
    "GlmForCausalLM": Family("adjacent", "partial rotary"),
    "Glm4ForCausalLM": Family("adjacent", "partial rotary"),
    "Ernie4_5ForCausalLM": Family("adjacent"),
    "GPT2LMHeadModel": Family("none"),
    "GPTNeoForCausalLM": Family("none"),
    "OPTForCausalLM": Family("none"),
    "BloomForCausalLM": Family("none", "alibi"),
    "MptForCausalLM": Family("none", "alibi"),
}
