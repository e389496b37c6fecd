"""Every family as a tiny network, and helpers for tests of backbones. A new family is one entry."""

import copy
import os
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

import mmdense  # noqa: F401  (registers the backbones)

DEVICE = os.environ.get('MMDENSE_TEST_DEVICE', 'cpu')  # of images, and of networks that run on them
if DEVICE != 'cpu':  # the tests' bounds are those of float32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.set_default_device(DEVICE)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest value


@dataclass(frozen=True)
class Family:
    """A family in the contract tests.

    Attributes:
        network: Options of the smallest network that has all parts of the family.
        num_maps: Feature maps that can be returned; by default those of strides 4 to 32 are.
        random: Option that makes training random, if there is one.
        lean: Whether memory='lean' exists.
        deployed: Variants whose inference form is tested: name -> further options.
        smallest: Options of an inference form that compiles in little time.
    """

    network: dict[str, Any]
    num_maps: int = 4
    random: str | None = None
    lean: bool = True
    deployed: dict[str, dict[str, Any]] = field(default_factory=dict)
    smallest: dict[str, Any] | None = None


FAMILIES = dict(
    RDNet=Family(
        dict(arch=dict(stem=8, growth=(8, 8, 8, 16, 8), down=(1, 2, 4), blocks=2)),
        random='drop_path_rate',
        deployed={'RDNet': {}, 'RDNet normed': dict(output_norm=True)},
        smallest=dict(arch=dict(stem=8, growth=(8, 8), down=(1,), blocks=1, gate_from=1)),
    ),
    DenseNet=Family(
        dict(arch=dict(growth_rate=8, layers=(3, 4, 4, 3))),
        random='drop_rate',
        deployed={
            'DenseNet': {},
            'DenseNet basic': dict(tap='activated', bottleneck=False, reduction=1.0),
        },
        smallest=dict(arch=dict(growth_rate=4, layers=(2, 1))),
    ),
    CondenseNetV2=Family(
        dict(arch=dict(layers=(1, 2, 1, 2, 2), growth=(8, 4, 8, 8, 8), groups=4)),
        num_maps=5,
        random='drop_rate',
        deployed={'CondenseNetV2': {}},
        smallest=dict(arch=dict(layers=(1, 1), growth=(8, 8), groups=4, gated_from=1)),
    ),
    ReXNet=Family(
        dict(arch=dict(width=0.25, depth=0.4)),
        num_maps=6,
        random='drop_path_rate',
        deployed={
            'ReXNet': dict(out_indices=range(6)),
            'ReXNet unet': dict(out_indices=range(6), taps='unet'),
            'ReXNet lite': dict(arch=dict(width=0.25, depth=0.2, lite=True), out_indices=range(5)),
        },
        smallest=dict(arch=dict(width=0.25, depth=0.2), taps='unet', out_indices=range(6)),
    ),
    ShuffleNetV2=Family(
        dict(arch=dict(channels=(20, 40, 80), units=(2, 4, 2), stem=4, last=64)),
        num_maps=5,
        lean=False,
    ),
    TimmBackbone=Family(
        dict(model_name='mobilenetv2_035'), num_maps=5, random='drop_path_rate', lean=False
    ),
)


def build(family, **options):
    """Return a family's tiny network, in training mode."""
    torch.manual_seed(0)
    net = MODELS.build(dict(type=f'mmdense.{family}', **{**FAMILIES[family].network, **options}))
    return net if any(p.is_meta for p in net.parameters()) else net.to(DEVICE)


def random_options(family, rate):
    """Return the options that make training random, {} if there are none."""
    name = FAMILIES[family].random
    options = {name: rate} if name else {}
    return dict(model_kwargs=options) if family == 'TimmBackbone' else options


def image(height=64, width=96, batch=1, channels=3, seed=2):
    generator = torch.Generator('cpu').manual_seed(seed)
    shape = batch, channels, height, width
    return torch.randn(shape, generator=generator, device='cpu').to(DEVICE)


@torch.no_grad()
def randomise(net, *, signed=False, seed=1):
    """Give norms, biases and statistics values that let every branch show in the outputs.

    Args:
        net: Any module; vectors are changed.
        signed: Let every other scale be negative or zero; else all are from 0.5 to 1.5.
        seed: Of the random numbers.
    """
    generator = torch.Generator('cpu').manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.ndim == 1 and value.is_floating_point():
            bias = name.endswith(('bias', 'mean', 'beta'))
            uniform = torch.rand(value.shape, generator=generator, device='cpu')
            value.copy_(uniform + (-0.5 if bias else 0.5))
            if signed and name.endswith(('weight', 'gamma')):
                value[::2] *= -1
                value[::5] = 0
    return net if any(p.is_meta for p in net.parameters()) else net.to(DEVICE)


@torch.no_grad()
def run(net, x):
    return (net.to(x.device) if isinstance(net, torch.nn.Module) else net)(x)


def deployed(net):
    """Return the inference form of a copy."""
    net = copy.deepcopy(net)
    net.switch_to_deploy()
    return net


def difference(a, b):
    """Return the largest difference of two tensors, relative to the largest value of ``b``."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def same(outputs, expected, tolerance=TOLERANCE[torch.float32]):
    assert len(outputs) == len(expected)
    for a, b in zip(outputs, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if tolerance:
            assert difference(a, b) <= tolerance
        else:
            assert torch.equal(a, b)


def deployed_equals_trained(net, x, dtypes=TOLERANCE):
    for dtype in dtypes:
        net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
        same(run(deployed(net), x), run(net, x), TOLERANCE[dtype])


def step(net, x, forward=None, *, amp=None):
    """Return outputs, gradients and buffers of one training step by name, and the saved bytes.

    ``amp`` is the dtype of autocast.
    """
    net.to(x.device)
    x = x.clone().requires_grad_()
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, amp, enabled=amp is not None),
    ):
        outputs = (forward or net)(x)
    for parameter in net.parameters():
        saved.pop(parameter.data_ptr(), None)
    generator = torch.Generator('cpu').manual_seed(4)
    options = dict(generator=generator, device='cpu')
    sum((y * torch.randn(y.shape, **options).to(y)).sum() for y in outputs).backward()
    result = {f'output {i}': y.detach() for i, y in enumerate(outputs)} | {'image': x.grad}
    result |= {name: p.grad for name, p in net.named_parameters()}
    return result | dict(net.named_buffers()), sum(saved.values())


def median_error(result, exact, least=1e-9):
    """Return the median relative error of a step's tensors; below a norm it is only rounding."""
    return statistics.median(
        float((result[name] - value).norm() / value.norm())
        for name, value in exact.items()
        if value.is_floating_point() and value.norm() > least
    )


def same_step(result, expected, tolerance=1e-9):
    """Compare what :func:`step` returns; a missing gradient is missing in both."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or not tolerance:
            assert result[name] is value or torch.equal(result[name], value), name
        else:  # absolute too: a bias before a norm has no gradient but rounding
            torch.testing.assert_close(
                result[name], value, rtol=tolerance, atol=tolerance, msg=name
            )


class Operators(TorchDispatchMode):
    """Record the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators_of(net, x):
    """Record a run on the CPU: other devices may have other operators."""
    x = x.cpu()
    net.to(x.device)
    with Operators() as operators:
        run(net, x)
    return operators
