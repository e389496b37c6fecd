"""Pooling of regions of interest.

test_ops_fuzz.py compares random cases with references, test_ops_reference.py with mmcv.
"""

import math
import subprocess
import sys

import pytest
import torch
from mmcv.ops import RoIAlign, RoIPool
from torch import tensor

SIZE = 8


def random_rois(rng, count, images=2):
    """RoIs on maps of 8 x 8, some over the edges."""
    options = dict(generator=rng, device=rng.device, dtype=torch.float64)
    corner, side = torch.rand(count, 2, **options) * 7 - 1, torch.rand(count, 2, **options) * 5 + 1
    image = torch.arange(count, device=rng.device)[:, None] % images
    return torch.cat((image, corner, corner + side), 1)


def test_roi_align_has_no_maximum():
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max'.*MMCV_WITH_OPS"):
        RoIAlign(1, pool_mode='max')(torch.ones(1, 1, 8, 8), tensor([[0.0, 1, 1, 5, 5]]))


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures('threads')
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_of_many_rois_is_that_of_torchvisions_kernel(monkeypatch, ratio, aligned):
    kernel, rng = torch.ops.torchvision.roi_align, torch.Generator().manual_seed(0)
    maps = torch.randn(2, 16, SIZE, SIZE + 1, dtype=torch.float64, generator=rng)
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    rois = random_rois(rng, 40) * tensor([1, 4, 4, 4, 4])
    rois[0, 3:], rois[1, 3:] = rois[0, 1:3], rois[1, 1:3] - 9  # empty
    rois[2, 1:] -= 60  # outside
    exact = kernel(maps, rois, 0.25, 3, 2, ratio, aligned)
    monkeypatch.delattr('torch.ops.torchvision.roi_align')
    out = RoIAlign((3, 2), 0.25, ratio, aligned=aligned)(maps, rois)
    torch.testing.assert_close(out, exact)
    weight = torch.randn(exact.shape, dtype=torch.float64, generator=rng)
    grads = (torch.autograd.grad((x * weight).sum(), maps)[0] for x in (out, exact))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('layer', [RoIAlign(3), RoIPool(3)])
def test_memory_format_and_autocast_change_nothing(device, rng, layer):
    maps = torch.randn(2, 3, SIZE, SIZE, generator=rng, device=device)
    rois = random_rois(rng, 6).float()
    expected = layer(maps, rois)
    assert torch.equal(layer(maps.contiguous(memory_format=torch.channels_last), rois), expected)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(maps, rois)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize('layer', [RoIAlign(2), RoIPool(2)])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_rois_that_are_not_finite_give_nan_and_no_gradient(device, layer, value):
    maps = torch.ones(2, 1, SIZE, SIZE, device=device, requires_grad=True)
    for column in range(5):
        rois = tensor([[1.0, 1, 1, 5, 5], [0, 1, 1, 5, 5]], device=device)
        rois[1, column] = value
        out = layer(maps, rois)
        assert (out[0] == 1).all()
        assert out[1].isnan().all()
        (grad,) = torch.autograd.grad(out.sum(), maps)
        assert not grad[0].any()
        assert grad[1].sum().item() == pytest.approx(4)


@pytest.mark.parametrize('layer', [RoIAlign(2), RoIPool(2)])
@pytest.mark.parametrize('image', [-1, 2, 1e9])
def test_rois_of_images_that_are_not_there(device, layer, image):
    if device.type == 'cuda':  # after its assertion a process can use the GPU no more
        code = f"""
import mmdense, torch
from mmcv.ops import {type(layer).__name__} as Layer
maps = torch.ones(2, 1, {SIZE}, {SIZE}, device='cuda')
Layer(2)(maps, torch.tensor([[{image}, 1, 1, 5, 5]], device='cuda'))
torch.cuda.synchronize()
"""
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert 'image that is not in the batch' in done.stderr
        return
    maps = torch.ones(2, 1, SIZE, SIZE, device=device)
    with pytest.raises(IndexError, match='where there are 2 images'):
        layer(maps, tensor([[image, 1, 1, 5, 5]], device=device))
    with pytest.raises(IndexError, match='where there are 0 images'):
        layer(maps[:0], tensor([[0.0, 1, 1, 5, 5]], device=device))
