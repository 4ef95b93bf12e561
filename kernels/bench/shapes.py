"""The fixed table of shapes, and what each one costs at least."""

from __future__ import annotations

from dataclasses import dataclass

HEADS = ((9, 3), (32, 8), (32, 32))
WIDTHS = ((64, 64), (32, 64), (16, 64), (12, 64), (128, 128), (64, 128), (32, 128), (32, 32))


@dataclass(frozen=True)
class Shape:
    """One row: ``kind`` is "decode" (one query) or "prefill" (as many queries as keys)."""

    kind: str
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    keys: int
    batch: int

    @property
    def name(self) -> str:
        """Unique and readable, the key of the ledger."""
        heads, widths = f"{self.heads}/{self.kv_heads}", f"{self.d_qk}/{self.d_v}"
        return f"{self.kind} {heads} {widths} keys={self.keys} batch={self.batch}"

    @property
    def queries(self) -> int:
        """Query positions."""
        return 1 if self.kind == "decode" else self.keys

    def bytes(self, element: int) -> int:
        """Bytes of keys and values, each read once; queries and output."""
        kv = self.kv_heads * self.keys * (self.d_qk + self.d_v)
        rest = self.heads * self.queries * (self.d_qk + self.d_v)
        return self.batch * (kv + rest) * element

    def pairs(self) -> int:
        """Visible (causal) pairs of a query and a key, over all heads."""
        one = self.queries * self.keys - self.queries * (self.queries - 1) // 2
        return self.batch * self.heads * one

    def flops(self) -> int:
        """Multiplications and additions of the visible pairs."""
        return 2 * self.pairs() * (self.d_qk + self.d_v)


def cpu_table() -> list[Shape]:
    """The shapes of the CPU ledger."""
    rows = []
    for heads, kv_heads in HEADS:
        for d_qk, d_v in WIDTHS:
            for keys in (1024, 8192, 32768):
                for batch in (1, 8):
                    rows.append(Shape("decode", heads, kv_heads, d_qk, d_v, keys, batch))
            for keys in (512, 1024, 4096):
                rows.append(Shape("prefill", heads, kv_heads, d_qk, d_v, keys, 1))
    return rows


def gpu_table() -> list[Shape]:
    """The shapes of the GPU ledger."""
    rows = []
    for heads, kv_heads in ((32, 8), (32, 32)):
        for d_qk, d_v in WIDTHS:
            for keys in (8192, 32768):
                rows.append(Shape("decode", heads, kv_heads, d_qk, d_v, keys, 32))
            for keys in (2048, 8192):
                rows.append(Shape("prefill", heads, kv_heads, d_qk, d_v, keys, 4))
    return [row for row in rows if row.bytes(2) < 24 << 30]
