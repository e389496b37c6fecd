"""Every network on the device under test, against the CPU: set MMDENSE_TEST_DEVICE=cuda.

Errors are against float64 on the CPU, and bounded by those that the CPU has in the same precision.
"""

import functools
import statistics

import pytest
import torch
from families import DEVICE, FAMILIES, build, deployed, image, randomise, run, step

pytestmark = pytest.mark.slow
PRECISIONS = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
TESTED = FAMILIES
if DEVICE == 'cpu':  # against itself: a test of this file
    TESTED = {'ReXNet': FAMILIES['ReXNet']}
    del PRECISIONS['float16']  # which takes a CPU long
MODES = [
    pytest.param(family, memory, id=f'{family}-{memory}')
    for family, options in TESTED.items()
    for memory in ('plain', *(['lean'] if options.lean else []), 'recompute')
]
DEPLOYED = [family for family, options in TESTED.items() if options.deployed]


def train(family, precision, *, device='cpu', layout=torch.contiguous_format, memory='plain'):
    """Return the outputs, gradients and buffers of a training step, by name, on the CPU."""
    net, x = randomise(build(family, memory=memory)).to(device), image(batch=4).to(device)
    if precision == 'float64':
        net, x = net.double(), x.double()
    net, x = net.to(memory_format=layout), x.contiguous(memory_format=layout)
    result, _ = step(net, x, amp=PRECISIONS.get(precision))
    return {name: value.cpu().double() for name, value in result.items()}


def infer(family, precision, *, amp=False, device='cpu', layout=torch.contiguous_format):
    """Return the outputs of the inference form, by name, on the CPU."""
    net, x = randomise(build(family)).eval().to(device), image(batch=2).to(device)
    if family == 'CondenseNetV2':
        net.prune_to(1.0)
    net = deployed(net)
    dtype = torch.float64 if precision == 'float64' else PRECISIONS[precision]
    if dtype and not amp:
        net, x = net.to(dtype), x.to(dtype)
    with torch.autocast(device, dtype, enabled=amp):
        outputs = run(net, x.contiguous(memory_format=layout))
    return {f'output {i}': y.cpu().double() for i, y in enumerate(outputs)}


def errors(result, exact):
    """Return the relative error of each tensor, leaving out what is zero but for rounding."""
    return {
        name: float((result[name] - value).norm() / value.norm())
        for name, value in exact.items()
        if value.norm() > 1e-9 * value.numel() ** 0.5
    }


def compare(result, on_cpu, exact, precision):
    """Bound errors by the CPU's: what is wrong has one near 1."""
    assert result.keys() == exact.keys()
    found, expected = errors(result, exact), errors(on_cpu, exact)
    median, largest = statistics.median(expected.values()), max(expected.values())
    if precision == 'float32':  # another algorithm of a convolution may be less exact
        bounds = {name: 100 * max(error, median) for name, error in expected.items()}
    else:  # rounding depends on the order of sums, so single tensors vary
        assert statistics.median(found.values()) <= 2 * median
        bounds = dict.fromkeys(expected, 10 * largest)
    wrong = {name: error for name, error in found.items() if not error <= bounds[name]}
    assert not wrong


@functools.cache
def reference(function, family, precision, **options):
    return function(family, precision, **options)


@pytest.mark.parametrize('precision', PRECISIONS)
@pytest.mark.parametrize('layout', LAYOUTS, ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize(('family', 'memory'), MODES)
def test_training_step(family, memory, layout, precision):
    result = train(family, precision, device=DEVICE, layout=layout, memory=memory)
    on_cpu, exact = (reference(train, family, p) for p in (precision, 'float64'))
    compare(result, on_cpu, exact, precision)


@pytest.mark.parametrize(
    ('precision', 'amp'), [(p, amp) for p in PRECISIONS for amp in (False, p != 'float32')][1:]
)
@pytest.mark.parametrize('layout', LAYOUTS, ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('family', DEPLOYED)
def test_deployed(family, layout, precision, amp):
    result = infer(family, precision, amp=amp, device=DEVICE, layout=layout)
    on_cpu = reference(infer, family, precision, amp=amp)
    exact = reference(infer, family, 'float64')
    compare(result, on_cpu, exact, precision)
