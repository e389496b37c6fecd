"""Every operator of mmdense.ops against references.py, on random arguments.

Shapes, dtypes, memory layouts, empty tensors, degenerate and distant boxes; forward, and backward
where there is one. An operator and a seed make a case. This runs one, and prints its arguments if
it fails:

    python tests/ops/test_ops_fuzz.py nms 17
"""

import inspect
import random
import subprocess
import sys
from functools import partial

import mmcv.ops
import pytest
import references
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from references import Ambiguous

import mmdense  # noqa: F401  (answers for mmcv._ext)
from mmdense.ops import _ext

DTYPES = torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16
LAYOUTS = 'plain', 'transposed', 'strided', 'expanded', 'channels last'
ATTEMPTS = 50
# Sums of some tens of products, each rounded in the precision that is computed in.
SUMS = 200


class Draw:
    """The random arguments of a case, by name, for the message of a failure."""

    def __init__(self, key, device):
        self.random = random.Random(key)
        self.device = device
        self.drawn = {}
        self.dtype = self.choose('dtype', DTYPES)

    def choose(self, name, values):
        """Choose one of some values."""
        self.drawn[name] = self.random.choice(values)
        return self.drawn[name]

    def count(self, name, least, most):
        """Choose a number."""
        return self.choose(name, range(least, most + 1))

    def shape(self, name, *ranges):
        """Choose a number in each range."""
        return self.choose(name, [tuple(self.random.randint(*pair) for pair in ranges)])

    def tensor(self, name, *shape, scale=1.0, dtype=None, like=None):
        """Draw a tensor of any layout, of ``like`` or from a normal distribution."""
        if like is None:
            generator = torch.Generator().manual_seed(self.random.getrandbits(60))
            like = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        tensor = like.to(self.device, dtype or self.dtype)
        layout = self.random.choice(LAYOUTS)
        if layout == 'transposed' and tensor.ndim > 1:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == 'strided' and tensor.ndim:  # the gaps must not be read
            room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1) + 1), torch.nan)
            tensor = room[..., 1::2].copy_(tensor)
        elif layout == 'expanded' and tensor.ndim and len(tensor):
            tensor = tensor[:1].expand_as(tensor)
        elif layout == 'channels last' and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        dtype = str(tensor.dtype).removeprefix('torch.')
        self.drawn[name] = f'{dtype}{list(tensor.shape)} with strides {tensor.stride()}'
        return tensor

    def boxes(self, most=16, malformed=True):
        """Return boxes [N, 4] and scores [N], and whether their overlaps are exact."""
        kinds = ['grid', 'crowd', 'huge', 'far', *(['malformed'] if malformed else [])]
        kind, count = self.choose('kind', kinds), self.count('boxes', 0, most)
        ties = self.choose('ties', (False, True))
        rows = []
        for _ in range(count):
            if kind == 'crowd':
                corner = [self.random.uniform(-5, 25) for _ in range(2)]
                side = [self.random.uniform(0, 20) for _ in range(2)]
            else:
                corner = [self.random.randint(-4, 8) for _ in range(2)]
                least = -3 if kind == 'malformed' else 0
                side = [self.random.randint(least, 8) for _ in range(2)]
            rows.append([*corner, *(c + s for c, s in zip(corner, side, strict=True))])
        boxes = torch.tensor(rows, dtype=torch.float64).view(count, 4)
        if kind == 'huge':
            boxes *= 2.0**10 if self.dtype == torch.float16 else 2.0**30
        if kind == 'far':
            boxes -= 96
        draws = [self.random.random() for _ in range(count)]
        scores = [(int(8 * s) + 1) / 8 if ties else s for s in draws]
        boxes = self.tensor('box', like=boxes)
        narrow = self.dtype in (torch.float16, torch.bfloat16)
        dtype = self.choose('scores in', (self.dtype, torch.float32) if narrow else (self.dtype,))
        scores = self.tensor('score', like=torch.tensor(scores).view(count), dtype=dtype)
        return boxes, scores, kind not in ('crowd', 'huge')

    def rois(self, maps, scale, far):
        """Return RoIs [R, 5] on maps, on a grid of quarter pixels: some over the edges or bad."""
        rows = []
        for _ in range(self.count('RoIs', 0, 4) if len(maps) else 0):
            image = self.random.randrange(len(maps))
            corner = [self.random.randint(-12, 24) / 4 for _ in range(2)]
            side = [self.random.choice([-2, 0, *range(1, 24)]) / 4 for _ in range(2)]
            if far and self.random.random() < 0.1:
                corner[self.random.randrange(2)] += self.random.choice([-(2.0**12), 2.0**12])
            box = [*corner, *(c + s for c, s in zip(corner, side, strict=True))]
            rows.append([image, *(at / scale for at in box)])
        return self.tensor('roi', like=torch.tensor(rows, dtype=torch.float64).view(-1, 5))


def check(name, got, expected, loose=1.0):
    """Compare a tensor with its float64 reference, within ``loose`` times the dtype's rounding."""
    assert got.shape == expected.shape, f'{name}: {got.shape}, not {expected.shape}'
    own = torch.finfo(got.dtype).eps
    computed = min(own, torch.finfo(torch.float32).eps)
    finite = expected[expected.isfinite()]
    size = max(finite.abs().max().item(), 1.0) if finite.numel() else 1.0
    # Results are rounded once or twice to their own dtype (halves are computed in float32).
    options = dict(rtol=4 * own * loose, atol=(SUMS * computed + own * own) * size * loose)
    if loose > 1:
        options['atol'] += own * size * loose
    torch.testing.assert_close(
        got.detach().cpu().double(),
        expected.detach(),
        equal_nan=True,
        msg=lambda text: f'{name}: {text}',
        **options,
    )


def check_gradients(draw, leaves, out, expected, loose=1.0):
    """Compare an output and the gradients of ``leaves``, pairs of a tensor and its reference."""
    check('output', out, expected, loose)
    grad = draw.tensor('grad', *out.shape, dtype=out.dtype)
    ours = torch.autograd.grad(out, [leaf for leaf, _ in leaves.values()], grad)
    theirs = [None] * len(leaves)
    if expected.requires_grad:  # something was read
        exact = [leaf for _, leaf in leaves.values()]
        theirs = torch.autograd.grad(expected, exact, grad.cpu().double(), allow_unused=True)
    for name, one, other in zip(leaves, ours, theirs, strict=True):
        other = torch.zeros(one.shape, dtype=torch.float64) if other is None else other
        check(f'gradient of {name}', one, other, loose)


def leaf(tensor):
    """Return a tensor that requires a gradient, and its float64 copy."""
    exact = tensor.cpu().double().requires_grad_()
    return tensor.requires_grad_(), exact


# One function for each operator: draw, compute the reference, run the operator, compare.


def nms(draw):
    boxes, scores, exact = draw.boxes()
    threshold = draw.choose('threshold', [0.0, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0])
    # To huge boxes a pixel is nothing: float32 doesn't hold it.
    offset = draw.choose('offset', (0,) if draw.drawn['kind'] == 'huge' else (0, 1))
    expected = references.nms(boxes.tolist(), scores.tolist(), threshold, offset, exact=exact)
    dets, keep = mmcv.ops.nms(boxes, scores, threshold, offset)
    assert keep.tolist() == expected
    assert dets.shape == (len(expected), 5)


def soft_nms(draw):
    boxes, scores, exact = draw.boxes(12, malformed=False)
    method = draw.choose('method', ['naive', 'linear', 'gaussian'])
    threshold = draw.choose('threshold', [0.0, 0.25, 0.3, 0.5, 0.6])
    sigma, least = draw.choose('sigma', [0.1, 0.5, 2.0]), draw.choose('least', [0.001, 0.1, 0.4])
    offset = draw.choose('offset', (0, 1))
    options = threshold, sigma, least, method, offset
    expected = references.soft_nms(boxes.tolist(), scores.tolist(), *options, exact=exact)
    dets, keep = mmcv.ops.soft_nms(boxes, scores, *options)
    assert keep.tolist() == [index for index, _ in expected]
    decayed = torch.tensor([score for _, score in expected], dtype=torch.float64)
    check('scores', dets[:, 4], decayed)
    check('boxes', dets[:, :4], boxes.cpu().double()[keep.cpu()])


def nms_match(draw):
    boxes, scores, exact = draw.boxes()
    threshold = draw.choose('threshold', [0.25, 0.3, 0.5, 0.6, 1.0])
    dets = draw.tensor('dets', like=torch.cat((boxes, scores[:, None].to(boxes)), 1))
    rows = dets.tolist()
    lists = [row[:4] for row in rows], [row[4] for row in rows]
    expected = references.nms_match(*lists, threshold, exact=exact)
    assert [group.tolist() for group in mmcv.ops.nms_match(dets, threshold)] == expected


def roi_align(draw):
    maps = draw.tensor('maps', *draw.shape('size', (0, 2), (0, 3), (1, 7), (1, 7)))
    scale, size = draw.choose('scale', [1.0, 0.5, 0.25]), draw.shape('bins', (1, 3), (1, 3))
    ratio, aligned = draw.count('ratio', 0, 2), draw.choose('aligned', (False, True))
    rois = draw.rois(maps, scale, far=ratio > 0)
    maps, exact = leaf(maps)
    expected = references.roi_align(exact, rois.cpu().double(), size, scale, ratio, aligned)
    out = mmcv.ops.roi_align(maps, rois, size, scale, ratio, 'avg', aligned)
    check_gradients(draw, dict(maps=(maps, exact)), out, expected)


def roi_pool(draw):
    maps = draw.tensor('maps', *draw.shape('size', (0, 2), (0, 3), (1, 7), (1, 7)))
    scale, size = draw.choose('scale', [1.0, 0.5, 0.25]), draw.shape('bins', (1, 3), (1, 3))
    rois = draw.rois(maps, scale, far=True)
    if draw.choose('ties', (False, True)):  # of which the first counts
        maps = maps.round()
    maps, exact = leaf(maps)
    expected = references.roi_pool(exact, rois.cpu().double(), size, scale)
    check_gradients(
        draw, dict(maps=(maps, exact)), mmcv.ops.roi_pool(maps, rois, size, scale), expected
    )


def deform_conv(draw, modulated=False):
    groups, deform_groups = draw.choose('groups', [(1, 1), (2, 1), (1, 2), (2, 2)])
    images, width, *size = draw.shape('size', (1, 2), (1, 2), (1, 6), (1, 6))
    kernel = draw.choose('kernel', [(1, 1), (3, 3), (1, 3), (2, 1), (2, 2)])
    stride, dilation = draw.shape('stride', (1, 2), (1, 2)), draw.shape('dilation', (1, 2), (1, 2))
    padding = draw.shape('padding', (0, 2), (0, 2))
    field = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(field) < 1:
        raise Ambiguous
    taps = kernel[0] * kernel[1] * deform_groups
    reach = draw.choose('reach', [0.5, 2.0, 100.0, 10000.0])
    tensors = dict(
        x=draw.tensor('x', images, 2 * width, *size),
        offset=draw.tensor('offset', images, 2 * taps, *field, scale=reach),
    )
    if modulated:
        tensors['mask'] = draw.tensor('mask', images, taps, *field)
    tensors['weight'] = draw.tensor('weight', 2, 2 * width // groups, *kernel)
    if modulated and draw.choose('bias', (False, True)):
        tensors['bias'] = draw.tensor('b', 2)
    leaves = {name: leaf(tensor) for name, tensor in tensors.items()}
    options = stride, padding, dilation, groups, deform_groups
    ours, theirs = ({name: pair[k] for name, pair in leaves.items()} for k in (0, 1))
    names = 'x', 'offset', 'mask', 'weight', 'bias'
    expected = references.deform_conv2d(*map(theirs.get, names), *options)
    if modulated:
        out = mmcv.ops.modulated_deform_conv2d(*map(ours.get, names), *options)
    else:
        out = mmcv.ops.deform_conv2d(ours['x'], ours['offset'], ours['weight'], *options)
    check_gradients(draw, leaves, out, expected)


def sigmoid_focal_loss(draw):
    rows, classes = draw.shape('size', (0, 6), (1, 5))
    logits = draw.tensor('logits', rows, classes, scale=draw.choose('spread', [0.1, 3.0, 40.0]))
    target = torch.tensor([draw.random.randint(0, classes) for _ in range(rows)]).long()
    draw.drawn['target'] = target.tolist()
    gamma, alpha = draw.choose('gamma', [0.0, 0.5, 1.0, 2.0]), draw.choose('alpha', [0.25, 0.6])
    weight = draw.tensor('weight', classes).abs() if draw.choose('weighted', (0, 1)) else None
    reduction = draw.choose('reduction', ['none', 'sum', 'mean'] if rows else ['none', 'sum'])
    own = None if weight is None else weight.cpu().double()
    logits, exact = leaf(logits)
    expected = references.sigmoid_focal_loss(exact, target, gamma, alpha, own)
    if reduction != 'none':
        expected = expected.sum() / (rows if reduction == 'mean' else 1)
    options = gamma, alpha, weight, reduction
    out = mmcv.ops.sigmoid_focal_loss(logits, target.to(draw.device), *options)
    # mmcv reduces in the dtype of the logits.
    loose = 8 if reduction != 'none' and draw.dtype.itemsize == 2 else 1
    check_gradients(draw, dict(logits=(logits, exact)), out, expected, loose)


def ms_deform_attn(draw):
    images, queries, heads, width, points = draw.shape(
        'size', (0, 2), (0, 4), (1, 2), (1, 3), (1, 3)
    )
    shapes = [draw.shape(f'level {i}', (1, 5), (1, 5)) for i in range(draw.count('levels', 1, 3))]
    keys = sum(h * w for h, w in shapes)
    spread = draw.choose('spread', [0.3, 5.0, 1000.0])
    generator = torch.Generator().manual_seed(draw.random.getrandbits(60))
    size = images, queries, heads, len(shapes), points, 2
    places = 0.5 + torch.randn(size, generator=generator) * spread
    leaves = dict(
        value=leaf(draw.tensor('value', images, keys, heads, width)),
        locations=leaf(draw.tensor('locations', like=places)),
        weights=leaf(draw.tensor('weights', images, queries, heads, len(shapes), points)),
    )
    value, locations, weights = (pair[0] for pair in leaves.values())
    exact = [pair[1] for pair in leaves.values()]
    expected = references.ms_deform_attn(exact[0], shapes, *exact[1:])
    sizes = torch.tensor(shapes, device=draw.device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    out = MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    check_gradients(draw, leaves, out, expected)


def carafe(draw):
    groups, scale = draw.choose('groups', (1, 2)), draw.count('scale', 1, 3)
    kernel = draw.choose('kernel', (1, 3, 5))
    images, width, height, breadth = draw.shape('size', (0, 2), (0, 2), (1, 4), (1, 4))
    features = draw.tensor('features', images, groups * width, height, breadth)
    shape = images, kernel**2 * groups, height * scale, breadth * scale
    leaves = dict(features=leaf(features), masks=leaf(draw.tensor('masks', *shape)))
    (features, exact), (masks, exact_masks) = leaves.values()
    options = kernel, groups, scale
    expected = references.carafe(exact, exact_masks, *options)
    check_gradients(draw, leaves, mmcv.ops.carafe(features, masks, *options), expected)


def psa_mask(draw):
    images, height, width = draw.shape('size', (0, 2), (1, 4), (1, 4))
    window = draw.shape('window', (1, 5), (1, 5))
    kind = draw.choose('kind', ('collect', 'distribute'))
    mask, exact = leaf(draw.tensor('mask', images, window[0] * window[1], height, width))
    out = mmcv.ops.PSAMask(kind, window)(mask)
    expected = references.psa_mask(exact, kind == 'collect', window)
    check_gradients(draw, dict(mask=(mask, exact)), out, expected)


def masked_conv(draw):
    kernel = draw.choose('kernel', [(1, 1), (3, 3), (3, 1), (5, 3)])
    padding = tuple(k // 2 for k in kernel)
    channels, *size = draw.shape('size', (1, 3), (1, 6), (1, 6))
    x = draw.tensor('x', 1, channels, *size)
    weight, bias = draw.tensor('weight', 2, channels, *kernel).contiguous(), draw.tensor('bias', 2)
    mask = draw.tensor('mask', 1, *size) > draw.choose('above', [-9, 0, 9])
    out = mmcv.ops.masked_conv2d(x, mask, weight, bias, padding)
    tensors = (t.cpu().double() for t in (x, mask, weight, bias))
    # The product between the two operators is mmcv's, in the dtype of the maps.
    loose = 16 if draw.dtype.itemsize == 2 else 1
    check('output', out, references.masked_conv2d(*tensors, padding), loose)


def sync_bn(draw):
    """The steps of one process, as mmcv takes them."""
    images, channels, pixels = draw.shape('size', (1, 3), (0, 3), (1, 6))
    x = draw.tensor('x', images, channels, pixels, scale=draw.choose('scale', [0.1, 1, 10])) + 1
    weight, bias = (draw.tensor(name, channels, dtype=torch.float32) for name in 'wb')
    moving, moving_var = (torch.full((channels,), v, device=draw.device) for v in (0.5, 2.0))
    eps, momentum = draw.choose('eps', [1e-5, 1e-3]), draw.choose('momentum', [0.0, 0.1, 1.0])
    affine = draw.choose('affine', (False, True))
    leaves = [t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
    if not affine:
        leaves[1:] = torch.ones(channels).double(), torch.zeros(channels).double()
    expected, mean, var = references.batch_norm(*leaves, eps)

    buffers = [x.new_zeros(channels, dtype=torch.float32) for _ in range(5)]
    ours_mean, ours_var, std, grad_weight, grad_bias = buffers
    norm, out = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x)
    _ext.sync_bn_forward_mean(x, ours_mean)
    _ext.sync_bn_forward_var(x, ours_mean, ours_var)
    tensors = x, ours_mean, ours_var, *((weight, bias) if affine else (None, None))
    outs = moving, moving_var, norm, std, out
    _ext.sync_bn_forward_output(*tensors, *outs, eps=eps, momentum=momentum, group_size=1)
    # Statistics are float32 whatever the input: errors grow with what the norm multiplies by.
    loose = max(1.0, (1 / (var.detach() + eps).sqrt()).max().item()) if channels else 1.0
    stats = partial(check_float32, loose=loose * (1 + x.abs().max().item() if x.numel() else 1))
    count = images * pixels
    unbiased = var * count / (count - 1) if count > 1 else var
    stats('mean', ours_mean, mean)
    stats('variance', ours_var, var)
    stats('output', out, expected)
    stats('running mean', moving, momentum * mean + (1 - momentum) * 0.5)
    stats('running variance', moving_var, momentum * unbiased + (1 - momentum) * 2)
    if affine:
        grad = draw.tensor('grad', *x.shape)
        _ext.sync_bn_backward_param(grad, norm, grad_weight, grad_bias)
        grad_x = torch.zeros_like(x)
        _ext.sync_bn_backward_data(grad, weight, grad_weight, grad_bias, norm, std, grad_x)
        theirs = torch.autograd.grad(expected, leaves, grad.cpu().double())
        for name, one, other in zip('xwb', (grad_x, grad_weight, grad_bias), theirs, strict=True):
            stats(f'gradient of {name}', one, other)


def check_float32(name, got, expected, loose):
    """Compare a result that was computed in float32, whatever its dtype."""
    assert got.shape == expected.shape, name
    eps = torch.finfo(torch.float32).eps
    size = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    bounds = dict(rtol=4 * max(torch.finfo(got.dtype).eps, eps), atol=SUMS * eps * size * loose)
    message = dict(msg=lambda text: f'{name}: {text}')
    torch.testing.assert_close(got.cpu().double(), expected.detach(), **bounds, **message)


CASES = {
    nms: 2500,
    soft_nms: 1500,
    nms_match: 1500,
    roi_align: 1000,
    roi_pool: 500,
    deform_conv: 500,
    partial(deform_conv, modulated=True): 600,
    sigmoid_focal_loss: 700,
    ms_deform_attn: 500,
    carafe: 300,
    psa_mask: 300,
    masked_conv: 300,
    sync_bn: 400,
}


def name_of(function):
    if isinstance(function, partial):
        return f'{function.func.__name__}_{next(iter(function.keywords))}'
    return function.__name__


OPERATORS = {name_of(function): function for function in CASES}


def case(operator, seed, device='cpu'):
    """Run one case; an AssertionError has the operator, the seed, and all that was drawn."""
    for attempt in range(ATTEMPTS):
        draw = Draw(f'{operator} {seed} {attempt}', device)
        try:
            OPERATORS[operator](draw)
        except Ambiguous:
            continue
        except Exception as error:
            drawn = '\n'.join(f'  {name}: {value}' for name, value in draw.drawn.items())
            raise AssertionError(
                f'python tests/ops/test_ops_fuzz.py {operator} {seed}\n{drawn}\n'
                f'{type(error).__name__}: {error}'
            ) from error
        return
    raise AssertionError(f'{operator} {seed}: {ATTEMPTS} ambiguous draws')


FIRST = 20  # cases that are not slow


@pytest.mark.parametrize('operator', OPERATORS)
def test_first_cases(operator, device):
    for seed in range(FIRST):
        case(operator, seed, device)


@pytest.mark.slow
@pytest.mark.parametrize('operator', OPERATORS)
def test_further_cases(operator, device):
    for seed in range(FIRST, CASES[OPERATORS[operator]]):
        case(operator, seed, device)


def test_cases_reach_every_operator(monkeypatch):
    called = set()

    def watch(name, operator):
        return lambda *args, **options: called.add(name) or operator(*args, **options)

    functions = dict(inspect.getmembers(_ext, inspect.isfunction))
    names = {name for name in functions if not name.startswith(('_', 'get_'))}
    for module in (_ext, sys.modules['mmcv._ext']):
        for name in names:
            monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    for operator in OPERATORS:
        for seed in range(8):
            case(operator, seed)
    assert called == names
    assert sum(CASES.values()) >= 10_000


MISTAKES = """
import torch
from torch import rand as r
import mmdense
from mmdense.ops import _ext
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as Attention

sizes = dict(kernel_h=3, kernel_w=3, stride_h=1, stride_w=1, pad_h=1, pad_w=1, dilation_h=1)
sizes |= dict(dilation_w=1, group=1, deformable_group=1, with_bias=False)
none, index = r(0), torch.tensor([0])
align = dict(aligned_height=2, aligned_width=2, spatial_scale=1.0, sampling_ratio=2)
align |= dict(pool_mode=1, aligned=True)
psa = dict(num_=1, h_feature=4, w_feature=4, h_mask=3, w_mask=3, half_h_mask=1, half_w_mask=1)
for mistake in (
    lambda: _ext.nms(r(4, 3), r(4), 0.5, 0),
    lambda: _ext.nms(r(4, 4), r(3), 0.5, 0),
    lambda: _ext.softnms(r(4, 4), r(3), r(4, 5), 0.5, 0.5, 0.1, 1, 0),
    lambda: _ext.softnms(r(4, 4), r(4), r(2, 5), 0.5, 0.5, 0.1, 1, 0),
    lambda: _ext.nms_match(r(4, 3), 0.5),
    lambda: ops.roi_align(r(1, 2, 4, 4), torch.tensor([[5.0, 0, 0, 3, 3]]), 2),
    lambda: ops.roi_align(r(1, 2, 4, 4).long(), r(3, 5) * 0, 2),
    lambda: ops.roi_align(r(1, 2, 4, 4).double(), r(3, 5) * 0, 2),
    lambda: _ext.roi_align_forward(
        r(1, 2, 4, 4), r(3, 4) * 0, r(3, 2, 2, 2), none, none, **align
    ),
    lambda: ops.roi_pool(r(1, 2, 4, 4), torch.tensor([[-1.0, 0, 0, 3, 3]]), 2),
    lambda: ops.deform_conv2d(r(1, 4, 5, 5), r(1, 17, 5, 5), r(2, 4, 3, 3), 1, 1),
    lambda: ops.deform_conv2d(r(1, 3, 5, 5), r(1, 18, 5, 5), r(2, 4, 3, 3), 1, 1),
    lambda: ops.deform_conv2d(
        r(1, 4, 5, 5).long(), r(1, 18, 5, 5).long(), r(2, 4, 3, 3).long(), 1, 1
    ),
    lambda: ops.modulated_deform_conv2d(
        r(2, 4, 5, 5), r(2, 18, 5, 5), r(1, 9, 5, 5), r(2, 4, 3, 3), None, 1, 1
    ),
    lambda: _ext.modulated_deform_conv_forward(
        r(1, 4, 5, 5), r(2, 4, 3, 3), none, none, r(1, 18, 5, 5), r(1, 8, 5, 5), r(1, 2, 5, 5),
        none, **sizes
    ),
    lambda: _ext.sigmoid_focal_loss_forward(r(3, 4), torch.tensor([1]), none, r(3, 5), 2.0, 0.5),
    lambda: Attention.apply(
        r(1, 20, 2, 3), torch.tensor([[4, 5]]), index + 9, r(1, 2, 2, 1, 3, 2), r(1, 2, 2, 1, 3), 9
    ),
    lambda: Attention.apply(
        r(1, 20, 2, 3), torch.tensor([[4, 5]]), index, r(1, 2, 4, 1, 3, 2), r(1, 2, 4, 1, 3), 9
    ),
    lambda: ops.carafe(r(1, 4, 3, 3), r(1, 9, 6, 6), 3, 2, 2),
    lambda: _ext.masked_im2col_forward(r(1, 2, 4, 4), index + 70, index, r(18, 1), 3, 3, 1, 1),
    lambda: _ext.masked_im2col_forward(r(1, 2, 4, 4), index - 70, index, r(18, 1), 3, 3, 1, 1),
    lambda: _ext.masked_col2im_forward(r(2, 1), index + 70, index, r(1, 2, 4, 4), 4, 4, 2),
    lambda: _ext.psamask_forward(r(1, 8, 4, 4), r(1, 16, 4, 4), 0, **psa),
    lambda: _ext.psamask_backward(r(1, 16, 4, 4), r(1, 8, 4, 4), 0, **psa),
    lambda: _ext.sync_bn_forward_mean(r(2, 3, 4), r(2)),
):
    line = mistake.__code__.co_firstlineno
    try:
        mistake()
    except Exception as error:
        print(line, type(error).__name__)
    else:
        print(line, 'passes')
print('end')
"""


@pytest.mark.slow
def test_mistakes_are_errors_of_python_and_never_crash():
    """Wrong shapes, dtypes and indices, in a separate process because they might crash it."""
    done = subprocess.run(
        [sys.executable, '-c', MISTAKES], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, end = done.stdout.splitlines()
    assert end == 'end'
    assert len(lines) == MISTAKES.count('lambda:')
    assert not [line for line in lines if 'passes' in line]


NOT_FINITE = """
import torch
from torch import rand as r
import mmdense
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction as Attention

boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 5, 5], [8, 8, 9, 9], [0, 0, 4, 3]])
rois = torch.cat((torch.zeros(4, 1), boxes), 1)
classes = torch.tensor([0, 1, 2, 4])
for operator, *inputs in (
    (lambda b, s: ops.nms(b, s, 0.5), boxes, r(4)),
    (lambda b, s: ops.soft_nms(b, s), boxes, r(4)),
    (lambda d: ops.nms_match(d, 0.5), torch.cat((boxes, r(4, 1)), 1)),
    (lambda x, b: ops.roi_align(x, b, 2, 1.0, 0), r(1, 2, 9, 9), rois),
    (lambda x, b: ops.roi_pool(x, b, 2), r(1, 2, 9, 9), rois),
    (
        lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1),
        r(1, 4, 5, 5), r(1, 18, 5, 5), r(2, 4, 3, 3),
    ),
    (
        lambda x, o, m, w: ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1),
        r(1, 4, 5, 5), r(1, 18, 5, 5), r(1, 9, 5, 5), r(2, 4, 3, 3),
    ),
    (lambda x: ops.sigmoid_focal_loss(x, classes), r(4, 4)),
    (
        lambda v, p, w: Attention.apply(
            v, torch.tensor([[4, 5]]), torch.tensor([0]), p, w, 9
        ),
        r(1, 20, 2, 3), r(1, 2, 2, 1, 3, 2), r(1, 2, 2, 1, 3),
    ),
    (lambda x, m: ops.carafe(x, m, 3, 1, 2), r(1, 4, 3, 3), r(1, 9, 6, 6)),
    (ops.PSAMask('collect', (3, 3)), r(1, 9, 4, 4)),
):
    for spoiled in range(len(inputs)):
        for bad in (torch.nan, torch.inf, -torch.inf, 1e38, -1e38):
            leaves = [x.clone() for x in inputs]
            leaves[spoiled].view(-1)[1::3] = bad
            try:
                out = operator(*[x.requires_grad_() for x in leaves])
            except IndexError:  # a RoI of image 1e38
                continue
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.sum().backward()
print('end')
"""


def test_numbers_that_are_not_finite_never_crash():
    """NaN, infinities and huge numbers in every input, forward and backward."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', NOT_FINITE],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith('end\n')


if __name__ == '__main__':
    case(sys.argv[1], int(sys.argv[2]))
