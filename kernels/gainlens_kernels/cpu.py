"""Load the compiled CPU kernels, and run them on the threads of PyTorch."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

from gainlens_kernels.checks import SlicedAttentionError, check_bound_values, own_bounds

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("GAINLENS_KERNELS", "") == "reference":
        return None, "GAINLENS_KERNELS=reference is set"
    other = os.environ.get("GAINLENS_KERNELS_NATIVE")  # another build: with a sanitizer, say
    try:
        if not other:
            return importlib.import_module("gainlens_kernels._native"), ""
        spec = importlib.util.spec_from_file_location("gainlens_kernels._native", other)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, str(error)
    return module, ""


def _find_gomp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that libtorch is linked against, or 0.

    A second OpenMP runtime, or any second pool, would compete with PyTorch's own threads, which
    spin for a while after each operation. Looking the symbol up through libtorch gives the
    runtime it uses, whatever its file is called.
    """
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                function = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                return 0
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


native, _reason = _load()
if native is not None and os.environ.get("GAINLENS_KERNELS_THREADS", "") != "pool":
    native.use_openmp(_find_gomp_parallel())

_warned = False


def warn_once() -> None:
    """Warn once, at first use, that the slow path is used, with the reason."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "gainlens_kernels: the compiled CPU kernels are not available "
            f"({_reason}); sliced_attention uses the slow PyTorch reference. "
            "Reinstall gainlens with a C++17 compiler at hand to get them.",
            RuntimeWarning,
            stacklevel=4,
        )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """Run the compiled kernels on CPU tensors that passed the checks."""
    assert native is not None
    shape = q.shape
    out_shape = (shape[0], shape[1], shape[2], v.shape[3])
    try:
        out = torch.empty(out_shape, dtype=q.dtype)
    except RuntimeError as error:
        raise MemoryError(
            f"sliced_attention: no memory for the output {list(out_shape)} that the shapes of q "
            "and v ask for"
        ) from error
    lengths, starts = own_bounds(lengths), own_bounds(starts)
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr())
    if not all(addresses) and out.numel():
        name = "qkv"[addresses.index(0)]
        raise SlicedAttentionError(f"{name} has no memory behind it, expected data")
    status = native.attend(
        _CODES[q.dtype],
        addresses[0],
        shape,
        q.stride(),
        addresses[1],
        k.shape,
        k.stride(),
        addresses[2],
        v.shape,
        v.stride(),
        out.data_ptr(),
        scale,
        causal,
        0 if lengths is None else lengths.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        check_bound_values("lengths", lengths, k.shape[2])
        check_bound_values("starts", starts, k.shape[2])
        if status == -2:
            raise MemoryError("sliced_attention: no memory for the working buffers")
        raise SlicedAttentionError(f"sizes of q, k and v do not belong together (status {status})")
    return out


def supports(q: torch.Tensor) -> bool:
    """Whether the compiled kernels support this dtype and device."""
    return native is not None and q.is_cpu and q.dtype in _CODES
