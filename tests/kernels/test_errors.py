"""Bad input: an error that names the argument, from operator and reference alike."""

import warnings

import gainlens_kernels
import pytest
import torch
from gainlens_kernels import SlicedAttentionError, cpu, reference, sliced_attention

pytestmark = pytest.mark.one_env


def good():
    return {
        "q": torch.randn(2, 4, 3, 8),
        "k": torch.randn(2, 2, 5, 8),
        "v": torch.randn(2, 2, 5, 6),
        "scale": 0.5,
    }


def nested():
    with warnings.catch_warnings():  # PyTorch calls them a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 2, 8)])


BAD = {
    "k has batch size 3": {"k": torch.randn(3, 2, 5, 8)},
    "k has width 7, expected d_qk = 8": {"k": torch.randn(2, 2, 5, 7)},
    "k has no keys": {"k": torch.randn(2, 2, 0, 8), "v": torch.randn(2, 2, 0, 6)},
    "4 heads and k has 3": {"k": torch.randn(2, 3, 5, 8), "v": torch.randn(2, 3, 5, 6)},
    "4 heads and k has 0": {"k": torch.randn(2, 0, 5, 8), "v": torch.randn(2, 0, 5, 6)},
    r"v has shape \[2, 2, 4, 6\]": {"v": torch.randn(2, 2, 4, 6)},
    r"v has shape \[2, 1, 5, 6\]": {"v": torch.randn(2, 1, 5, 6)},
    "q has shape .* expected 4 axes": {"q": torch.randn(4, 3, 8)},
    "q has d_qk = 0": {"q": torch.randn(2, 4, 3, 0), "k": torch.randn(2, 2, 5, 0)},
    "q has d_qk = 257": {"q": torch.randn(2, 4, 3, 257), "k": torch.randn(2, 2, 5, 257)},
    "v has d_v = 300": {"v": torch.randn(2, 2, 5, 300)},
    "v has d_v = 0": {"v": torch.randn(2, 2, 5, 0)},
    "q has stride 3 along its last axis": {"q": torch.randn(2, 4, 8, 3).mT},
    "k has stride 2 along its last axis": {"k": torch.randn(2, 2, 5, 16)[..., ::2]},
    "v has stride 0 along its last axis": {"v": torch.randn(2, 2, 5, 1).expand(2, 2, 5, 6)},
    "k has dtype torch.float16": {"k": torch.randn(2, 2, 5, 8).half()},
    "q has dtype torch.int64": {"q": torch.ones(2, 4, 3, 8, dtype=torch.int64)},
    "v is on meta": {"v": torch.randn(2, 2, 5, 6, device="meta")},
    "q is a list": {"q": [1.0]},
    "k is a ndarray": {"k": torch.randn(2, 2, 5, 8).numpy()},
    "q has layout torch.sparse_coo": {"q": torch.randn(2, 4, 3, 8).to_sparse()},
    "q is a nested tensor": {"q": nested()},
    "scale is nan": {"scale": float("nan")},
    "scale is inf": {"scale": float("inf")},
    "scale is 1e\\+60": {"scale": 1e60},
    "scale is 1000": {"scale": 10**400},
    "scale is None": {"scale": None},
    "scale is True": {"scale": True},
    "scale is 'a'": {"scale": "a"},
    "lengths is a list": {"lengths": [1, 2]},
    "lengths has dtype torch.float32": {"lengths": torch.tensor([1.0, 2.0])},
    r"lengths has shape \[3\]": {"lengths": torch.tensor([1, 2, 3])},
    r"lengths has shape \[2, 1\]": {"lengths": torch.tensor([[1], [2]])},
    r"lengths\[1\] is 6, expected a value from 0 to tk = 5": {"lengths": torch.tensor([5, 6])},
    r"lengths\[0\] is -1": {"lengths": torch.tensor([-1, 5])},
    r"starts\[0\] is 9223372036854775807": {"starts": torch.tensor([2**63 - 1, 0])},
    r"starts\[1\] is -3": {"starts": torch.tensor([0, -3], dtype=torch.int32)},
    "starts is on meta": {"starts": torch.tensor([0, 1], device="meta")},
}


@pytest.mark.parametrize("function", [sliced_attention, reference])
@pytest.mark.parametrize("message", BAD)
def test_named(function, message):
    arguments = {**good(), **BAD[message]}
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(SlicedAttentionError, match=message) as caught:
        function(q, k, v, **arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("function", [sliced_attention, reference])
def test_the_scale_has_no_default(function):
    arguments = good()
    del arguments["scale"]
    with pytest.raises(TypeError, match="scale"):
        function(**arguments)


def test_bounds_are_checked_with_gradients_too():
    arguments = good()
    arguments["q"].requires_grad_()
    with pytest.raises(SlicedAttentionError, match=r"lengths\[1\] is 9"):
        sliced_attention(**arguments, lengths=torch.tensor([1, 9]))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_tensor_whose_memory_was_freed(name):
    # As sharded training does between uses; reading it would end the process.
    if cpu.native is None:
        pytest.skip("PyTorch's own operators do not look")
    arguments = good()
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(SlicedAttentionError, match=f"{name} has no memory behind it"):
        sliced_attention(**arguments)


@pytest.mark.parametrize("positions", [2**44, 2**56])
def test_an_output_larger_than_memory(positions):
    arguments = good()
    arguments["q"] = torch.zeros(2, 4, 1, 8).expand(2, 4, positions, 8)
    if cpu.native is None:
        pytest.skip("the reference makes its output elsewhere")
    with pytest.raises(MemoryError, match=rf"output \[2, 4, {positions}, 6\] .* of q and v"):
        sliced_attention(**arguments)


def test_a_width_of_one_may_have_any_last_stride():
    q, k, v = (torch.randn(1, 1, n, 4)[..., 2:3] for n in (2, 5, 5))
    q, k, v = (x.as_strided(x.shape, (*x.stride()[:3], 4)) for x in (q, k, v))
    expected = reference(q, k, v, scale=1.0)
    torch.testing.assert_close(sliced_attention(q, k, v, scale=1.0), expected)


def test_public_names():
    assert set(gainlens_kernels.__all__) == {
        "SlicedAttentionError",
        "backend",
        "reference",
        "sliced_attention",
    }
    assert gainlens_kernels.backend("meta") == "reference"


def test_nothing_of_gainlens_is_imported():
    import subprocess
    import sys

    code = "import gainlens_kernels, sys; assert 'gainlens' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("message", sorted(BAD.keys() - {"scale is True"}))  # there it is 1.0
@pytest.mark.parametrize("backward", [False, True])
def test_the_raw_operator_checks_what_the_function_checks(message, backward):
    """Called as ``torch.ops…`` it would read memory that is not there."""
    a = {**good(), "lengths": None, "starts": None, **BAD[message]}
    given = (a["q"], a["k"], a["v"], a["scale"], True, a["lengths"], a["starts"])
    ops = torch.ops.gainlens_kernels
    refused = (SlicedAttentionError, RuntimeError, NotImplementedError, TypeError, OverflowError)
    with pytest.raises(refused):  # the dispatcher refuses what is no tensor, and mixed devices
        if backward:
            ops.sliced_attention_backward(torch.randn(2, 4, 3, 6), *given)
        else:
            ops.sliced_attention(*given)


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 3), (1, 4, 3, 6)])
def test_the_raw_gradient_checks_the_gradient(shape):
    a = good()
    with pytest.raises(SlicedAttentionError, match="grad has shape"):
        torch.ops.gainlens_kernels.sliced_attention_backward(
            torch.randn(shape), a["q"], a["k"], a["v"], 0.5, True, None, None
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lengths_are_read_once(dtype, monkeypatch):
    """What was checked is what is used, also where another thread changes them in between."""
    from gainlens_kernels import checks, op

    a = {name: x.to(dtype) if name != "scale" else x for name, x in good().items()}
    lengths = torch.tensor([5, 3])
    wanted = sliced_attention(**a, lengths=lengths.clone())
    real = checks.own_bounds

    def then_changed(bounds):
        mine = real(bounds)
        if bounds is not None:
            bounds.fill_(10**9)
        return mine

    monkeypatch.setattr(cpu, "own_bounds", then_changed)
    monkeypatch.setattr(op, "own_bounds", then_changed)
    torch.testing.assert_close(sliced_attention(**a, lengths=lengths), wanted)
    assert int(lengths[0]) == 10**9
