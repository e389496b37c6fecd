"""lean_conv equals the plain convolution, side effects included, and saves less."""

import os
import socket

import pytest
import torch
from families import DEVICE
from mmengine.model import revert_sync_batchnorm
from timm.layers import SEModule
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from mmdense.models import DenseNet
from mmdense.models.layers import lean_conv, plain_conv
from mmdense.models.layers.lean import batch_statistics, norms_by_batch


class Gate(nn.Module):
    """A gate with a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return x * self.norm(self.linear(x.mean((2, 3)))).sigmoid()[..., None, None]


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class Half(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


def batch(channels=6, images=3, size=(5, 7)):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(images, channels, *size, generator=generator, dtype=torch.float64) * 2 + 1


def chain(norm=None, *others, **options):
    torch.manual_seed(1)
    norm = norm or nn.BatchNorm2d(6, **options)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias)
    return [module.double() for module in (norm, nn.ReLU(inplace=True), *others)]


def conv(cls=nn.Conv2d, **options):
    torch.manual_seed(2)
    return cls(6, 4, 3, padding=1, **options).double()


def step(run, steps, convolution, x, **options):
    """Return the outputs, the gradients and the buffers of two steps."""
    net = nn.ModuleList([convolution, *(s for s in steps if isinstance(s, nn.Module))])
    results = []
    for i in range(2):
        x = (x.detach() + i).requires_grad_(x.requires_grad)
        torch.manual_seed(3)
        y = run(steps, convolution, x, **options)
        torch.rand(3)
        y.backward(torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(i)).to(y))
        results += [y.detach(), x.grad, torch.get_rng_state()]
    return results + [p.grad for p in net.parameters()] + list(net.buffers())


def same(results):
    for a, b in zip(*results, strict=True):
        if a is None:
            assert b is None
        else:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def both(function):
    """Compare the results of a function of the plain and of the lean convolution."""
    same([function(plain_conv), function(lean_conv)])


def same_steps(make_chain=chain, make_conv=conv, x=None, **options):
    """Compare two steps of the plain and of the lean convolution; return the lean chain."""
    results = []
    for run in (plain_conv, lean_conv):
        image = batch().requires_grad_() if x is None else x
        results.append(step(run, steps := make_chain(), make_conv(), image, **options))
    same(results)
    return steps


@pytest.mark.parametrize(
    ('options', 'train'),
    [
        ({}, True),
        ({}, False),
        (dict(affine=False), True),
        (dict(momentum=None), True),
        (dict(track_running_stats=False), False),
        (dict(eps=0.1, momentum=0.7), True),
    ],
)
def test_norms(options, train):
    def make():
        steps = chain(**options)
        steps[0].train(train)
        return steps

    same_steps(make)


@pytest.mark.parametrize('frozen', ['weight', 'norm', 'image', 'all but the norm'])
def test_frozen_parts_get_no_gradients(frozen):
    def make_chain():
        steps = chain()
        steps[0].requires_grad_(frozen != 'norm')
        return steps

    needed = frozen not in ('weight', 'all but the norm')
    x = batch().requires_grad_(frozen not in ('image', 'all but the norm'))
    same_steps(make_chain, lambda: conv().requires_grad_(needed), x)


@pytest.mark.parametrize('drop', [nn.Dropout(0.4), nn.Dropout2d(0.4)])
def test_dropout_masks_and_later_random_numbers_are_the_same(drop):
    same_steps(lambda: chain(None, drop))
    assert (drop(torch.ones(9, 9, 2, 2)) == 0).any()


def test_norms_inside_a_step_count_once():
    steps = same_steps(lambda: chain(None, Gate()))
    assert steps[2].norm.num_batches_tracked == 2


@pytest.mark.parametrize('frozen', ['', 'fc1', 'bn'])
def test_gates_run_once(frozen):
    calls = []

    def make():
        torch.manual_seed(4)
        gate = SEModule(6, rd_channels=3, norm_layer=nn.BatchNorm2d)
        gate.fc1.register_forward_hook(lambda *_: calls.append(1))
        if frozen:
            gate.get_submodule(frozen).requires_grad_(False)
        norm, *others = chain(None, gate)
        return [gate if frozen else norm, *others]  # a gate twice, or a norm before it

    same_steps(make)
    assert len(calls) == (8 if frozen else 4)


def test_two_backward_passes_through_one_graph():
    def results(run):
        torch.manual_seed(4)
        gate, x = SEModule(6, rd_channels=3).double(), batch().requires_grad_()
        y = run(chain(None, gate), conv(), x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        return [x.grad, *(p.grad for p in gate.parameters())]

    both(results)


def test_a_weight_that_replaces_the_convolutions():
    def results(run):
        convolution, factor = conv(bias=False), torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
        factor.requires_grad_()
        y = run(chain(), convolution, batch(), weight=convolution.weight * factor)
        y.square().sum().backward()
        return [y.detach(), convolution.weight.grad, factor.grad]

    both(results)


@pytest.mark.parametrize(
    'options', [dict(stride=2), dict(dilation=2), dict(groups=2), dict(bias=False), dict(cls=Half)]
)
def test_convolutions(options):
    same_steps(make_conv=lambda: conv(**options))


def test_pruned_convolutions_are_called():
    def results(run):
        convolution, x = conv(), batch().requires_grad_()
        prune.l1_unstructured(convolution, 'weight', 0.5)
        run(chain(), convolution, x).square().sum().backward()
        return [x.grad, *(p.grad for p in convolution.parameters())]

    both(results)


def test_only_the_inputs_are_saved():
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    parts, convolution = [batch(2).requires_grad_(), batch(4)], conv()
    steps = [lambda *xs: torch.cat(xs, 1), *chain()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lean_conv(steps, convolution, *parts)
    parameters = [convolution.weight, *steps[1].parameters()]  # in memory anyway
    assert saved == {tensor.data_ptr() for tensor in (*parts, *parameters)}


def test_saved_tensors_may_be_moved():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.tensor):
        same_steps()


@pytest.mark.parametrize('inside', [False, True])
def test_autocast_applies_in_backward(inside):
    """Also if the backward pass runs inside of autocast, with its cache of cast weights."""
    results = []
    for run in (plain_conv, lean_conv):
        gate, convolution, x = Gate(), conv().float(), batch().float().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            y = run([nn.ReLU(), gate], convolution, x)
            assert y.dtype == torch.bfloat16
            loss = y.float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert gate.linear.weight.grad.abs().sum() > 0
        results.append([x.grad, gate.linear.weight.grad, convolution.weight.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(a.abs().max()))


def test_without_gradients_it_is_the_plain_call():
    steps = chain()
    with torch.no_grad():
        y = lean_conv(steps, conv(), batch())
    assert y.grad_fn is None
    assert steps[0].num_batches_tracked == 1


def test_one_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        lean_conv(chain(), conv(), batch(images=1, size=(1, 1)).requires_grad_())


def test_subclasses_with_another_forward_are_called():
    assert norms_by_batch(nn.BatchNorm2d(6))
    assert not norms_by_batch(nn.BatchNorm2d(6).eval())
    assert not norms_by_batch(nn.GroupNorm(2, 6))
    same_steps(lambda: chain(Activated(6)))


def test_norms_that_do_not_track():
    def make():
        steps = chain()
        steps[0].track_running_stats = False  # although it has statistics
        return steps

    assert same_steps(make)[0].num_batches_tracked == 0


def test_parameters_that_are_plain_attributes():
    """As in FSDP, and in the replicas of DataParallel."""

    def results(run):
        steps = chain()
        (weight, bias), norm = steps[0].parameters(), steps[0]._replicate_for_data_parallel()
        norm.weight, norm.bias = weight * 2, bias * 2
        run([norm, steps[1]], conv(), batch()).square().sum().backward()
        assert weight.grad.abs().sum() > 0
        return [weight.grad, bias.grad]

    both(results)


def test_a_module_may_occur_twice():
    def results(run):
        scale = nn.PReLU(6).double()
        run([scale, nn.Tanh(), scale], conv(), batch()).square().sum().backward()
        return [scale.weight.grad]

    both(results)


def test_half_precision_weights():
    steps, x = [module.bfloat16() for module in chain()], batch().bfloat16().requires_grad_()
    lean_conv(steps, conv().bfloat16(), x).float().sum().backward()
    assert steps[0].weight.grad.dtype == x.grad.dtype == torch.bfloat16
    assert steps[0].weight.grad.isfinite().all()


@pytest.mark.parametrize('part', ['norm', 'weight', 'image', 'mode'])
def test_changes_before_backward_are_noticed(part):
    steps, convolution, x = chain(), conv(), batch().requires_grad_().clone()
    y = lean_conv(steps, convolution, x)
    if part == 'mode':
        steps[0].eval()
    else:
        with torch.no_grad():
            dict(norm=steps[0].weight, weight=convolution.weight, image=x)[part].mul_(2)
    message = 'the mode was changed' if part == 'mode' else 'modified by an inplace operation'
    with pytest.raises(RuntimeError, match=message):
        y.sum().backward()


def test_tracing_takes_the_plain_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.conv = nn.ModuleList(chain()).eval(), conv()

        def forward(self, x):
            return lean_conv(self.steps, self.conv, x)

    net = Net()
    torch.testing.assert_close(torch.jit.trace(net, batch())(batch()), net(batch()))


def test_there_are_no_second_derivatives():
    x = batch().requires_grad_()
    y = lean_conv(chain(), conv(), x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_in_float32_at_least(dtype):
    x = batch().to(dtype)
    statistics = batch_statistics(nn.BatchNorm2d(6), x)
    wide = torch.promote_types(dtype, torch.float32)
    assert statistics.mean.dtype == statistics.var.dtype == wide
    assert statistics.count == 3 * 5 * 7
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for value, exact in ((statistics.var, var), (statistics.mean, mean)):
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance)


def synchronised(memory):
    """Return a network with synchronized norms, in dense blocks and before a convolution."""
    torch.manual_seed(0)
    arch = dict(growth_rate=4, layers=(2, 3), stem='cifar')
    net = DenseNet(arch=arch, memory=memory, norm_cfg=dict(type='SyncBN')).double()
    net.features['norm5'].eval()  # a plain call, of torch
    return net


def run_synchronised(net, x):
    return sum((m * torch.linspace(-1, 1, m[0].numel()).view(m[0].shape)).sum() for m in net(x))


def one_process(rank, port, folder):
    env = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in env.items()}, CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    net, x = synchronised('lean'), batch(3, images=5, size=(8, 8))
    mine = x[:2] if rank == 0 else x[2:]  # unequal shares
    mine.requires_grad_()
    run_synchronised(net, mine).backward()
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
    grads = {name: p.grad for name, p in net.named_parameters()}
    result = dict(image=mine.grad, grads=grads, buffers=dict(net.named_buffers()))
    torch.save(result, folder / f'{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_all_images(tmp_path):
    """With SyncBatchNorm, which torch runs only on a GPU."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_process, (port, tmp_path), nprocs=2)
    net = revert_sync_batchnorm(synchronised('plain'))
    x = batch(3, images=5, size=(8, 8)).requires_grad_()
    run_synchronised(net, x).backward()
    results = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    same([[x.grad], [torch.cat([result['image'] for result in results])]])
    for result in results:
        grads = {name: p.grad for name, p in net.named_parameters()}
        assert result['grads'].keys() == grads.keys()
        same([list(grads.values()), list(result['grads'].values())])
        same([list(net.buffers()), list(result['buffers'].values())])
