import pytest
import references
import torch
import torch.nn.functional as F
from mmcv.ops import MaskedConv2d, PSAMask, carafe, carafe_naive
from torch.autograd import gradcheck

from mmdense.ops import _ext

KERNEL, GROUPS, SCALE = 3, 2, 2


@pytest.fixture
def carafe_inputs(rng, device):
    options = dict(generator=rng, device=device, dtype=torch.float64)
    features = torch.randn(2, 4, 3, 4, **options)
    masks = torch.randn(2, KERNEL**2 * GROUPS, 3 * SCALE, 4 * SCALE, **options)
    return features, masks


@pytest.mark.parametrize('function', [carafe, carafe_naive])
def test_carafe_equals_its_definition(carafe_inputs, function):
    out = function(*carafe_inputs, KERNEL, GROUPS, SCALE)
    torch.testing.assert_close(out, references.carafe(*carafe_inputs, KERNEL, GROUPS, SCALE))


def test_carafe_gradient(carafe_inputs):
    # Not gradcheck's fast mode, which passes some wrong gradients.
    features, masks = carafe_inputs
    leaves = features[:1, :, :2, :2], masks[:1, :, :4, :4]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert gradcheck(lambda *t: carafe(*t, KERNEL, GROUPS, SCALE), leaves)


@pytest.mark.parametrize('naive', [False, True])
def test_carafe_gradient_equals_that_of_its_definition(carafe_inputs, rng, naive):
    leaves = [t.requires_grad_() for t in carafe_inputs]
    out = references.carafe(*leaves, KERNEL, GROUPS, SCALE)
    grad = torch.randn(out.shape, generator=rng, device=out.device, dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad)
    if naive:  # mmcv lets only a GPU go backward through it
        outs = tuple(map(torch.zeros_like, leaves))
        sizes = dict(kernel_size=KERNEL, group_size=GROUPS, scale_factor=SCALE)
        _ext.carafe_naive_backward(grad, *leaves, *outs, **sizes)
    else:
        outs = torch.autograd.grad(carafe(*leaves, KERNEL, GROUPS, SCALE), leaves, grad)
    torch.testing.assert_close(outs, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_carafe_of_halves(carafe_inputs, dtype):
    low = [t.detach().to(dtype).requires_grad_() for t in carafe_inputs]
    high = [t.detach().double().requires_grad_() for t in low]
    outs = [carafe(*t, KERNEL, GROUPS, SCALE) for t in (low, high)]
    grads = [torch.autograd.grad(o.sum(), t) for o, t in zip(outs, (low, high), strict=True)]
    assert outs[0].dtype == dtype
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=0.02, atol=0.05)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(('kernel', 'padding'), [(3, 1), (1, 0), ((3, 5), (1, 2))])
def test_masked_convolution_computes_where_the_mask_is(device, rng, kernel, padding):
    layer = MaskedConv2d(3, 4, kernel, padding=padding).to(device)
    x = torch.randn(1, 3, 6, 7, generator=rng, device=device)
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


@pytest.mark.parametrize('psa_type', ['collect', 'distribute'])
@pytest.mark.parametrize('size', [(5, 7), (3, 1), (4, 2)])
def test_psa_mask_spreads_value_by_value(device, rng, psa_type, size):
    options = dict(generator=rng, device=device, dtype=torch.float64)
    mask = torch.randn(2, size[0] * size[1], 3, 4, **options).requires_grad_()
    expected = references.psa_mask(mask, psa_type == 'collect', size)
    outs = PSAMask(psa_type, size)(mask), expected
    assert torch.equal(*outs)
    grad = torch.randn(2, 12, 3, 4, **options)
    assert torch.equal(*(torch.autograd.grad(out, mask, grad)[0] for out in outs))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_psa_mask_of_halves(device, rng, dtype):
    mask = torch.randn(1, 9, 3, 4, generator=rng, device=device).to(dtype).requires_grad_()
    out = PSAMask('collect', (3, 3))(mask)
    assert torch.equal(out, references.psa_mask(mask.detach(), True, (3, 3)))
    out.sum().backward()
    assert mask.grad.dtype == dtype
