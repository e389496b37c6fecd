"""Masked convolution.

test_ops_fuzz.py compares random cases with references.
"""

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import MaskedConv2d

from mmdense.ops import _ext


@pytest.mark.parametrize(('kernel', 'padding'), [(3, 1), (1, 0), ((3, 5), (1, 2))])
def test_masked_convolution_computes_where_the_mask_is(device, rng, kernel, padding):
    layer = MaskedConv2d(3, 4, kernel, padding=padding).to(device, torch.float64)
    x = torch.randn(1, 3, 6, 7, generator=rng, device=device, dtype=torch.float64)
    mask = torch.rand(1, 6, 7, generator=rng, device=device) > 0.5
    torch.testing.assert_close(layer(x, mask), layer(x) * mask)
    assert not layer(x, mask & False).any()


def test_masked_columns_are_windows(device, rng):
    x = torch.randn(1, 2, 4, 5, generator=rng, device=device)
    y, x_at = torch.meshgrid(*(torch.arange(n, device=device) for n in (4, 5)), indexing='ij')
    columns = x.new_zeros(2 * 9, 20)
    sizes = dict(kernel_h=3, kernel_w=3, pad_h=1, pad_w=1)
    _ext.masked_im2col_forward(x, y.flatten(), x_at.flatten(), columns, **sizes)
    assert torch.equal(columns, F.unfold(x, 3, padding=1)[0])
