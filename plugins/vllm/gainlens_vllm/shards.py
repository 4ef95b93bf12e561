"""Which heads a rank of tensor parallel has: vLLM's own rule for grouped queries."""

from __future__ import annotations

from gainlens_vllm.errors import SlimFolderError


def heads_of_rank(n_heads: int, n_kv_heads: int, size: int, rank: int) -> tuple[range, range]:
    """Query heads and key heads of ``rank``; a key head is on several ranks if there are too few.

    Args:
        n_heads, n_kv_heads: of the whole layer.
        size: ranks.
        rank: from 0.

    Raises:
        SlimFolderError: the heads can't be divided evenly.
    """
    fits = n_kv_heads % size == 0 or size % n_kv_heads == 0
    if n_heads % size or not fits:
        raise SlimFolderError(
            f"tensor_parallel_size={size} does not divide {n_heads} query heads and {n_kv_heads} "
            "key heads evenly"
        )
    queries = n_heads // size
    if n_kv_heads >= size:
        keys = n_kv_heads // size
        first = rank * keys
    else:
        keys, first = 1, rank // (size // n_kv_heads)
    return range(rank * queries, (rank + 1) * queries), range(first, first + keys)
