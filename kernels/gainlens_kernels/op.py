"""The public operator and its registration with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch.autograd import forward_ad

from gainlens_kernels import cpu
from gainlens_kernels.backward import attention_backward
from gainlens_kernels.checks import (
    check_arguments,
    check_bound_values,
    check_bounds,
    check_gradient,
    check_tensors,
    own_bounds,
)
from gainlens_kernels.reference import compute_reference

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? lengths, Tensor? starts"
)


def _on_gpu(q: torch.Tensor) -> bool:
    from gainlens_kernels import gpu

    return gpu.supports(q)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    """The implementation of the operator. Calls through ``torch.ops…`` are not checked before."""
    scale = check_arguments(q, k, v, scale, lengths, starts)
    if cpu.supports(q):
        return cpu.attend(q, k, v, scale, causal, lengths, starts)
    if q.is_cuda and _on_gpu(q):
        from gainlens_kernels import gpu

        return gpu.attend(q, k, v, scale, causal, lengths, starts)
    if q.device.type == "cpu":
        if cpu.native is None:
            cpu.warn_once()
        # Read once: another thread may write them while the reference runs.
        lengths, starts = own_bounds(lengths), own_bounds(starts)
        check_bound_values("lengths", lengths, k.shape[2])
        check_bound_values("starts", starts, k.shape[2])
    return compute_reference(q, k, v, scale, causal, lengths, starts)


_operator = torch.library.custom_op(
    "gainlens_kernels::sliced_attention",
    _forward,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> Tensor",
)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = check_arguments(q, k, v, scale, lengths, starts)
    check_gradient(grad, q, v)
    if q.device.type == "cpu":
        lengths, starts = own_bounds(lengths), own_bounds(starts)
        check_bound_values("lengths", lengths, k.shape[2])
        check_bound_values("starts", starts, k.shape[2])
    return attention_backward(grad, q, k, v, scale, causal, lengths, starts)


_backward_operator = torch.library.custom_op(
    "gainlens_kernels::sliced_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _fake_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    check_tensors(q, k, v)
    check_bounds("lengths", lengths, q)
    check_bounds("starts", starts, q)
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


@_backward_operator.register_fake
def _fake_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_tensors(q, k, v)
    check_bounds("lengths", lengths, q)
    check_bounds("starts", starts, q)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, v, scale, causal, lengths, starts = inputs
    ctx.save_for_backward(q, k, v, lengths, starts)
    ctx.scale, ctx.causal = scale, causal


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, lengths, starts = ctx.saved_tensors
    derive: Callable[..., Any] = (
        _TransformedGradient.apply if _in_transform() else _backward_operator
    )
    d_q, d_k, d_v = derive(grad, q, k, v, ctx.scale, ctx.causal, lengths, starts)
    return d_q, d_k, d_v, None, None, None, None


def _no_second_gradient(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "sliced_attention has no second gradient; use reference(), which PyTorch can derive twice"
    )


class _Transformed(torch.autograd.Function):
    """The operator under grad and vmap of torch.func, which do not support custom operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> torch.Tensor:
        return _dispatch(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)


class _TransformedGradient(torch.autograd.Function):
    """The same for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _backward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_no_second_gradient)


def _in_transform() -> bool:
    stack = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)()
    return stack is not None and stack.key().name in ("Grad", "Vmap")


_operator.register_autograd(_autograd, setup_context=_setup_context)
_backward_operator.register_autograd(_no_second_gradient)
_dispatch: Callable[..., torch.Tensor] = _operator


def _make_is_plain() -> Any:
    """A function that tells whether a call can bypass the dispatcher of PyTorch.

    Dispatching a custom operator costs several times the attention of one query. It is skipped only
    without tracing, modes, function transforms and forward gradients. If a version of PyTorch does
    not expose one of these states, calls are always dispatched.
    """
    try:
        dispatch_modes = torch._C._len_torch_dispatch_stack
        function_modes = torch._C._len_torch_function_stack
        transforms = torch._C._functorch.peek_interpreter_stack
        tracing = torch._C._get_tracing_state

        def is_plain() -> bool:
            return (
                transforms() is None
                and dispatch_modes() == 0
                and function_modes() == 0
                and tracing() is None
                and forward_ad._current_level < 0
            )

        is_plain()
    except AttributeError:
        return lambda: False
    return is_plain


_is_plain = _make_is_plain()


def _refuse_forward_gradients(*tensors: torch.Tensor) -> None:
    # A custom operator would drop the tangents without a word.
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        for x in tensors
    ):
        raise NotImplementedError(
            "sliced_attention has no forward-mode gradient; use reverse mode, or reference()"
        )


def sliced_attention(
    q: Float[torch.Tensor, "batch heads tq d_qk"],
    k: Float[torch.Tensor, "batch kv_heads tk d_qk"],
    v: Float[torch.Tensor, "batch kv_heads tk d_v"],
    *,
    scale: float,
    causal: bool = True,
    lengths: Int[torch.Tensor, "batch"] | None = None,
    starts: Int[torch.Tensor, "batch"] | None = None,
) -> Float[torch.Tensor, "batch heads tq d_v"]:
    """Softmax attention whose queries and keys may be narrower than its values.

    Head ``h`` attends to KV head ``h // (heads // kv_heads)``; keys are never repeated.
    ``scale`` multiplies the scores: for a model whose keys were sliced it stays that of the
    original width, ``1 / sqrt(d_head)``.

    Args:
        q: Queries; float32, bfloat16 or float16 (float64 takes the reference), any strides with
            a contiguous last axis, ``1 <= d_qk <= 256``.
        k: Keys, of the same dtype and on the same device, at least one.
        v: Values, ``1 <= d_v <= 256``.
        scale: Finite factor of the scores.
        causal: Query ``i`` sees no key after ``end - tq + i``: the last query is aligned with
            the last valid key. ``end`` is ``tk``, or the row's entry of ``lengths``.
        lengths: One past the last valid key of each batch row, int64 or int32, from 0 to
            ``tk``: for key caches padded on the right. (A causal forward pass over sequences
            padded on the right needs none, since no query sees what lies behind it.)
        starts: First valid key of each batch row, from 0 to ``tk``: for sequences padded on
            the left. Keys before it, like those from ``lengths`` on, are never read.

    Returns:
        A contiguous tensor ``[batch, heads, tq, d_v]`` of the dtype of ``q``. A query with no
        key to attend to gets zeros. NaN and infinity spread as in ``softmax(q kᵀ · scale) v``
        taken over the keys that the query may attend to, and over no other.

    Raises:
        SlicedAttentionError: An argument is invalid; the message names it. On a GPU the values
            of ``lengths`` and ``starts`` are not checked but clamped to [0, tk].

    Example:
        >>> q, k, v = torch.randn(1, 8, 3, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 64)
        >>> out = sliced_attention(q, k, v, scale=64**-0.5)
        >>> tuple(out.shape)
        (1, 8, 3, 64)
    """
    scale = check_arguments(q, k, v, scale, lengths, starts)
    if torch.compiler.is_compiling():
        return _dispatch(q, k, v, scale, bool(causal), lengths, starts)
    plain = (
        type(q) is type(k) is type(v) is torch.Tensor
        and _is_plain()
        and cpu.supports(q)
        and not (q.is_neg() or k.is_neg() or v.is_neg())  # negated views: read with another sign
        and not (
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        )
    )
    if plain:
        return cpu.attend(q, k, v, scale, bool(causal), lengths, starts)
    _refuse_forward_gradients(q, k, v)
    if _in_transform():
        transformed: Callable[..., torch.Tensor] = _Transformed.apply
        return transformed(q, k, v, scale, bool(causal), lengths, starts)
    return _dispatch(q, k, v, scale, bool(causal), lengths, starts)


def backend(device: str | torch.device = "cpu") -> str:
    """Name of the backend of a device: ``cpu (avx512, openmp)``, ``triton`` or ``reference``."""
    kind = torch.device(device).type
    if kind == "cpu" and cpu.native is not None:
        return f"cpu ({cpu.native.instruction_set()}, {cpu.native.thread_backend()})"
    if kind == "cuda":
        from gainlens_kernels import gpu

        if gpu.available():
            return "triton"
    return "reference"
