"""Synchronized batch norm in one process.

test_ops_fuzz.py compares random cases with references.
"""

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops.sync_bn import SyncBatchNormFunction


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('stats_mode', ['default', 'N'])
def test_one_process_is_batch_norm(device, rng, dtype, stats_mode):
    x = (torch.randn(4, 3, 2, 5, generator=rng, device=device) * 2 + 1).to(dtype)
    weight, bias = torch.randn(2, 3, generator=rng, device=device)
    grad = torch.randn(x.shape, generator=rng, device=device).to(dtype)
    results = []
    for ours in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        mean, var = torch.full((3,), 0.5, device=device), torch.full((3,), 2.0, device=device)
        if ours:
            options = 0.1, 1e-5, None, 1, stats_mode
            out = SyncBatchNormFunction.apply(leaves[0], mean, var, *leaves[1:], *options)
        else:
            out = F.batch_norm(leaves[0].float(), mean, var, *leaves[1:], True, 0.1, 1e-5).to(dtype)
        results.append((out, mean, var, *torch.autograd.grad(out, leaves, grad)))
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.01, atol=0.01)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


def test_no_images_leave_the_statistics(device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    weight, bias = (torch.ones(3, device=device, requires_grad=True) for _ in range(2))
    x = torch.zeros(0, 3, 2, 2, device=device)
    out = SyncBatchNormFunction.apply(x, mean, var, weight, bias, 0.1, 1e-5, None, 1, 'N')
    out.sum().backward()
    assert out.shape == x.shape
    assert not mean.any()
    assert (var == 1).all()
    assert not weight.grad.any()
