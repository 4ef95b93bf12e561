"""The operator inside torch.compile, torch.export, function transforms and modes."""

import pytest
import torch
from gainlens_kernels import reference, sliced_attention
from oracle import draw
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.one_env
OPERATOR = torch.ops.gainlens_kernels.sliced_attention.default


def tensors(tq=5, tk=9, dtype=torch.float32):
    return (
        draw((2, 4, tq, 8), dtype, 1, "bthd"),
        draw((2, 2, tk, 8), dtype, 2, "bthd"),
        draw((2, 2, tk, 12), dtype, 3),
    )


class Attention(torch.nn.Module):
    def forward(self, q, k, v, lengths=None):
        return sliced_attention(q * 2, k, v, scale=0.3, lengths=lengths) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounded", [False, True])
def test_opcheck(dtype, bounded):
    q, k, v = (x.requires_grad_() for x in tensors(dtype=dtype))
    bounds = (torch.tensor([9, 4]), torch.tensor([2, 0])) if bounded else (None, None)
    torch.library.opcheck(OPERATOR, (q, k, v, 0.3, True, *bounds))


def test_compile_whole_graph_with_changing_sizes():
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tk in (9, 10, 17):
        q, k, v = tensors(tk=tk)
        torch.testing.assert_close(compiled(q, k, v), Attention()(q, k, v))
    q, k, v = (x.requires_grad_() for x in tensors())
    compiled(q, k, v).sum().backward()
    expected = [x.detach().requires_grad_() for x in (q, k, v)]
    (reference(expected[0] * 2, *expected[1:], scale=0.3) + 1).sum().backward()
    for x, y in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_keys():
    q, k, v = tensors()
    keys = torch.export.Dim("keys", min=2, max=4096)
    program = torch.export.export(
        Attention(), (q, k, v), dynamic_shapes=(None, {2: keys}, {2: keys})
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPERATOR in targets
    q, k, v = tensors(tk=23)
    torch.testing.assert_close(program.module()(q, k, v), Attention()(q, k, v))


def test_tracing_records_the_operator():
    q, k, v = tensors()
    graph = make_fx(Attention())(q, k, v)
    assert any(node.target is OPERATOR for node in graph.graph.nodes)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_records_the_operator():
    q, k, v = tensors()
    traced = torch.jit.trace(Attention(), (q, k, v))
    other = tensors()[0] + 1
    torch.testing.assert_close(traced(other, k, v), Attention()(other, k, v))


def test_meta_and_fake_shapes():
    q, k, v = (x.to("meta") for x in tensors())
    out = sliced_attention(q, k, v, scale=0.3)
    assert out.shape == (2, 4, 5, 12)
    assert out.device.type == "meta"
    assert out.stride() == sliced_attention(*tensors(), scale=0.3).stride()


def test_functional_gradients():
    tensors_64 = tensors(dtype=torch.float64)

    def loss(*x):
        return sliced_attention(*x, scale=0.3).square().sum()

    functional = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors_64)
    inputs = [x.clone().requires_grad_() for x in tensors_64]
    reference(*inputs, scale=0.3).square().sum().backward()
    for x, y in zip(functional, inputs, strict=True):
        torch.testing.assert_close(x, y.grad)
    with pytest.raises(NotImplementedError, match="no second gradient"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, *tensors_64[1:]).sum())(tensors_64[0])


@pytest.mark.filterwarnings("ignore")  # vmap without a rule of its own loops, and says so
def test_gradients_of_each_sample():
    q, k, v = tensors(dtype=torch.float64)
    lengths = torch.tensor([9, 4])

    def loss(q, k, v, length):
        return sliced_attention(
            q[None], k[None], v[None], scale=0.3, lengths=length[None]
        ).square().sum()  # fmt: skip

    each = torch.vmap(torch.func.grad(loss))(q, k, v, lengths)
    x = q.clone().requires_grad_()
    reference(x, k, v, scale=0.3, lengths=lengths).square().sum().backward()
    torch.testing.assert_close(each, x.grad)


def test_vmap():
    q, k, v = tensors()
    batched = torch.vmap(lambda a, b: sliced_attention(a, k, b, scale=0.3))(
        torch.stack([q, q + 1]), torch.stack([v, v - 1])
    )
    for i, (a, b) in enumerate(((q, v), (q + 1, v - 1))):
        torch.testing.assert_close(batched[i], sliced_attention(a, k, b, scale=0.3))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_gradients_are_refused_not_dropped(which):
    inputs = list(tensors())
    with torch.autograd.forward_ad.dual_level():
        sliced_attention(*inputs, scale=0.3)
        x = inputs[which]
        inputs[which] = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            sliced_attention(*inputs, scale=0.3)


def test_dispatch_modes_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Log() as log:
        sliced_attention(*tensors(), scale=0.3)
    assert OPERATOR in log.seen
