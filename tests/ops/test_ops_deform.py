"""Deformable convolution.

test_ops_fuzz.py compares random cases with references, test_ops_reference.py with mmcv.
"""

import pytest
import torch
from mmcv.ops import deform_conv2d, modulated_deform_conv2d

from mmdense.ops import _deform


def leaves(rng, groups=1, deform_groups=1, size=(5, 6), dtype=torch.float64):
    """Input, offset, mask, weight, bias for a 3 x 3 convolution with padding 1 and stride 1."""

    def normal(*shape):
        return torch.randn(*shape, generator=rng, device=rng.device, dtype=dtype)

    return (
        normal(2, 4, *size),
        normal(2, 18 * deform_groups, *size),
        normal(2, 9 * deform_groups, *size).sigmoid(),
        normal(2, 4 // groups, 3, 3),
        normal(2),
    )


def test_version_two_refuses_offsets_that_are_too_few(device, rng):
    """test_ops_reference.py has too many, of which it reads the first."""
    x, offset, mask, weight, _ = leaves(rng)
    with pytest.raises(RuntimeError, match='offset output dims'):
        modulated_deform_conv2d(x, offset[:, :, :4], mask, weight, None, 1, 1)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_sample_that_is_nowhere_reads_zero(device, rng, value, dtype):
    """torchvision's kernel reads anywhere in memory for NaN: one bad weight could end a server."""
    x, offset, mask, weight, bias = (t.to(dtype) for t in leaves(rng))
    far = offset.clone()
    far[0, 4:6, 2, 3] = -100  # the pair of tap 2
    offset[0, 4, 2, 3] = value
    results = []
    for field in (offset, far):
        inputs = [t.clone().requires_grad_() for t in (x, field, mask, weight)]
        out = modulated_deform_conv2d(*inputs, bias, 1, 1)
        results.append((out, torch.autograd.grad(out.square().sum(), inputs)))
    exact = dict(rtol=0, atol=0) if device.type == 'cpu' else {}  # CUDA adds in any order
    torch.testing.assert_close(*results, **exact)
    assert not results[0][1][1][0, 4:6, 2, 3].any()


def test_each_gradient_can_be_asked_alone_and_again(device, rng):
    x, offset, _, weight, _ = (t.requires_grad_() for t in leaves(rng))
    out = deform_conv2d(x, offset, weight, 1, 1)
    first, second = torch.randn(2, *out.shape, generator=rng, device=device, dtype=out.dtype)
    together = torch.autograd.grad(out, (x, offset, weight), first, retain_graph=True)
    alone = [torch.autograd.grad(out, t, first, retain_graph=True)[0] for t in (x, offset, weight)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
    # What was computed for one output gradient must not serve another.
    torch.autograd.grad(out, x, second, retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(out, weight, first, retain_graph=True)[0], together[2]
    )
    twice = torch.autograd.grad(out, (x, offset, weight), 2 * first)
    for one, other in zip(together, twice, strict=True):
        torch.testing.assert_close(2 * one, other)


def test_the_pending_gradient_serves_its_own_output_only(device, rng):
    x, offset, _, weight, _ = leaves(rng)
    first, second = torch.randn(2, 2, 2, 5, 6, generator=rng, device=device, dtype=x.dtype)
    sizes = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1)
    sizes |= dict(group=1, deformable_group=1, im2col_step=2)

    def gradient(grad_output, columns):
        out, ones = torch.ones_like(weight), x.new_empty(0)
        tensors = x, offset, grad_output, out, columns, ones
        _deform.deform_conv_backward_parameters(*tensors, **sizes, scale=0.5)
        return out

    columns = x.new_empty(0)
    outs = torch.zeros_like(x), torch.zeros_like(offset)
    _deform.deform_conv_backward_input(x, offset, first, *outs, weight, columns, **sizes)
    torch.testing.assert_close(gradient(second, columns), gradient(second, x.new_empty(0)))
    leaf = weight.clone().requires_grad_()
    deform_conv2d(x, offset, leaf, 1, 1).backward(second)
    torch.testing.assert_close(gradient(second, x.new_empty(0)), 1 + leaf.grad / 2)


def test_version_one_goes_backward_once(device, rng, monkeypatch):
    calls = []
    backward = _deform._backward
    monkeypatch.setattr(_deform, '_backward', lambda *a: calls.append(1) or backward(*a))
    x, offset, _, weight, _ = (t.requires_grad_() for t in leaves(rng))
    deform_conv2d(x, offset, weight, 1, 1).sum().backward()
    assert len(calls) == 1
    assert all(t.grad.any() for t in (x, offset, weight))
