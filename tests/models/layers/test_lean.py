"""Convolutions that keep what their input is made from equal plain ones, side effects included."""

import os
import socket

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from mmdense.models import DenseNet
from mmdense.models.layers import lean_conv, plain_conv
from mmdense.models.layers.lean import batch_statistics, norms_by_batch, record

BOTH = (plain_conv, lean_conv)


def batch(channels=6, images=3, size=(5, 7)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, channels, *size, generator=generator, dtype=torch.float64) * 2 + 1


def chain(norm=None, **options):
    torch.manual_seed(1)
    norm = norm or nn.BatchNorm2d(6, **options)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias)
    return [norm.double(), nn.ReLU(inplace=True)]


def conv(**options):
    torch.manual_seed(2)
    return nn.Conv2d(6, 4, 3, padding=1, **options).double()


def step(run, steps, convolution, x, **options):
    """Return the outputs, the gradients and the buffers of two steps."""
    net = nn.ModuleList([convolution, *(s for s in steps if isinstance(s, nn.Module))])
    left = []
    for i in range(2):
        x = (x.detach() + i).requires_grad_(x.requires_grad)
        torch.manual_seed(3)
        y = run(steps, convolution, x, **options)
        torch.rand(3)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).to(y))
        left += [y.detach(), x.grad]
    return left + [p.grad for p in net.parameters()] + list(net.buffers())


def same(found):
    for a, b in zip(*found, strict=True):
        if a is None:
            assert b is None
        else:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(affine=False),
        dict(momentum=None),
        dict(track_running_stats=False),
        dict(eps=0.1, momentum=0.7),
    ],
)
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_equals_the_plain_convolution(options, mode):
    found = []
    for run in BOTH:
        steps = chain(**options)
        steps[0].train(mode == 'train')
        found.append(step(run, steps, conv(), batch().requires_grad_()))
    same(found)


def test_frozen_parts_get_no_gradients():
    for frozen in ('weight', 'norm', 'image', 'all but the norm'):
        found = []
        for run in BOTH:
            steps, convolution, x = chain(), conv(), batch()
            convolution.requires_grad_(frozen not in ('weight', 'all but the norm'))
            steps[0].requires_grad_(frozen != 'norm')
            x.requires_grad_(frozen not in ('image', 'all but the norm'))
            found.append(step(run, steps, convolution, x))
        same(found)


@pytest.mark.parametrize('drop', [nn.Dropout(0.4), nn.Dropout2d(0.4)])
def test_dropout_drops_the_same_again(drop):
    same([step(run, [*chain(), drop], conv(), batch().requires_grad_()) for run in BOTH])
    assert (drop(torch.ones(9, 9, 2, 2)) == 0).any()


def test_random_numbers_go_on_as_in_the_plain_call():
    states = []
    for run in BOTH:
        step(run, [*chain(), nn.Dropout(0.4)], conv(), batch().requires_grad_())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_norms_inside_of_a_step_count_once():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6).double()

        def forward(self, x):
            return x * self.norm(x.mean((2, 3), keepdim=True)).sigmoid()

    found = []
    for run in BOTH:
        gate = Gate()
        found.append(step(run, [*chain(), gate], conv(), batch().requires_grad_()))
        assert gate.norm.num_batches_tracked == 2
    same(found)


def test_a_weight_in_place_of_the_convolutions():
    found = []
    for run in BOTH:
        convolution, factor = conv(bias=False), torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
        factor.requires_grad_()
        y = run(chain(), convolution, batch(), weight=convolution.weight * factor)
        y.square().sum().backward()
        found.append([y.detach(), convolution.weight.grad, factor.grad])
    same(found)


@pytest.mark.parametrize(
    'options', [dict(stride=2), dict(dilation=2), dict(groups=2), dict(bias=False)]
)
def test_kinds_of_convolutions(options):
    same([step(run, chain(), conv(**options), batch().requires_grad_()) for run in BOTH])


def test_inputs_alone_are_kept():
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    parts, convolution = [batch(2).requires_grad_(), batch(4)], conv()
    steps = [lambda *xs: torch.cat(xs, 1), *chain()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lean_conv(steps, convolution, *parts)
    parameters = [convolution.weight, *steps[1].parameters()]  # in use by others anyway
    expected = {t.data_ptr() for t in (*parts, *parameters)}
    assert kept.keys() == expected


def test_saved_tensors_may_lie_elsewhere():
    found = []
    for run in BOTH:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.tensor):
            left = []
            steps, convolution = chain(), conv()
            y = run(steps, convolution, batch().requires_grad_())
            y.square().sum().backward()
            left = [p.grad for p in (*convolution.parameters(), *steps[0].parameters())]
        found.append(left)
    same(found)


def test_autocast_goes_on_in_backward():
    """Also if the backward pass runs inside of it, where narrow weights are kept from forward."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return x * self.linear(x.mean((2, 3)))[..., None, None]

    for inside in (False, True):
        found = []
        for run in BOTH:
            torch.manual_seed(0)
            gate, convolution = Gate(), conv().float()
            x = batch().float().requires_grad_()
            with torch.autocast('cpu', torch.bfloat16):
                y = run([nn.ReLU(), gate], convolution, x)
                assert y.dtype == torch.bfloat16
                loss = y.float().square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            assert gate.linear.weight.grad.abs().sum() > 0
            found.append([x.grad, gate.linear.weight.grad, convolution.weight.grad])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(a.abs().max()))


def test_without_gradients_it_is_the_plain_call():
    steps, convolution = chain(), conv()
    with torch.no_grad():
        y = lean_conv(steps, convolution, batch())
    assert y.grad_fn is None
    assert steps[0].num_batches_tracked == 1


def test_one_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        lean_conv(chain(), conv(), batch(images=1, size=(1, 1)).requires_grad_())


def test_subclasses_with_a_forward_of_their_own_are_called():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return F.silu(super().forward(x))

    assert norms_by_batch(nn.BatchNorm2d(6))
    assert not norms_by_batch(nn.BatchNorm2d(6).eval())
    assert not norms_by_batch(nn.GroupNorm(2, 6))
    found = []
    for run in BOTH:
        found.append(step(run, chain(Activated(6)), conv(), batch().requires_grad_()))
    same(found)


def test_norms_that_are_not_recorded():
    found = []
    for run in BOTH:
        steps = chain()
        steps[0].track_running_stats = False  # of a norm that has statistics
        found.append(step(run, steps, conv(), batch().requires_grad_()))
        assert steps[0].num_batches_tracked == 0
    same(found)


def test_parameters_that_became_plain_attributes():
    """So FSDP has them, and the replicas of DataParallel."""
    found = []
    for run in BOTH:
        steps = chain()
        (weight, bias), norm = steps[0].parameters(), steps[0]._replicate_for_data_parallel()
        norm.weight, norm.bias = weight * 2, bias * 2
        run([norm, steps[1]], conv(), batch()).square().sum().backward()
        assert weight.grad.abs().sum() > 0
        found.append([weight.grad, bias.grad])
    same(found)


def test_a_module_that_comes_twice():
    scale = nn.PReLU(6).double()
    found = []
    for run in BOTH:
        scale.zero_grad()
        run([scale, nn.Tanh(), scale], conv(), batch()).square().sum().backward()
        found.append([scale.weight.grad.clone()])
    same(found)


def test_half_precision_weights():
    for run in BOTH:
        steps, convolution = chain(), conv()
        x = batch().bfloat16().requires_grad_()
        run([s.bfloat16() for s in steps], convolution.bfloat16(), x).float().sum().backward()
        assert steps[0].weight.grad.dtype == x.grad.dtype == torch.bfloat16
        assert steps[0].weight.grad.isfinite().all()


def test_convolutions_of_others_are_called():
    class Half(nn.Conv2d):
        def forward(self, x):
            return 0.5 * super().forward(x)

    pruned = conv()
    prune.l1_unstructured(pruned, 'weight', 0.5)
    torch.manual_seed(0)
    for convolution in (Half(6, 4, 3).double(), pruned):
        found = []
        for run in BOTH:
            convolution.zero_grad()
            x = batch().requires_grad_()
            run(chain(), convolution, x).square().sum().backward()
            found.append([x.grad, *(p.grad.clone() for p in convolution.parameters())])
        same(found)


def test_changes_before_backward_are_noticed():
    for part in (0, 1, 2):
        steps, convolution, x = chain(), conv(), batch().requires_grad_().clone()
        y = lean_conv(steps, convolution, x)
        with torch.no_grad():
            (steps[0].weight, convolution.weight, x)[part].mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.sum().backward()
    steps = chain()
    y = lean_conv(steps, conv(), batch())
    steps[0].eval()
    with pytest.raises(RuntimeError, match='the mode was changed'):
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
def test_statistics_are_of_float32_at_least(dtype):
    x = batch().to(dtype)
    found = batch_statistics(nn.BatchNorm2d(6), x)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.mean.dtype == found.var.dtype == wide
    assert found.count == 3 * 5 * 7
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.var.double(), exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.mean.double(), exact[1], rtol=tolerance, atol=tolerance)


def test_records_are_those_of_torch():
    for options in ({}, dict(momentum=None), dict(momentum=0.3)):
        ours, theirs = nn.BatchNorm2d(6, **options).double(), nn.BatchNorm2d(6, **options).double()
        for i in range(3):
            record(ours, batch_statistics(ours, batch() * i))
            theirs(batch() * i)
        same([list(theirs.buffers()), list(ours.buffers())])


def synchronised(memory=None):
    """A network with synchronised norms, of one convolution or a dense one."""
    torch.manual_seed(0)
    if memory:
        arch = dict(growth_rate=4, layers=(2, 3), stem='cifar')
        net = DenseNet(arch=arch, memory=memory, norm_cfg=dict(type='SyncBN')).double()
        net.features['norm5'].eval()  # a plain call: torch's
        return net
    return nn.ModuleList([nn.SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 4, 1)]).double()


def run_synchronised(net, x):
    if isinstance(net, DenseNet):
        return sum((m * torch.linspace(-1, 1, m[0].numel()).view(m[0].shape)).sum() for m in net(x))
    norm, relu, convolution = net
    return (lean_conv([norm, relu], convolution, x).sin()).sum()


def one_process(rank, port, folder):
    env = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in env.items()}, CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for memory in (None, 'lean'):
        net = synchronised(memory)
        x = batch(3 if memory else 6, images=5, size=(8, 8))
        mine = x[:2] if rank == 0 else x[2:]  # unequal shares
        mine.requires_grad_()
        run_synchronised(net, mine).backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
        grads = {name: p.grad for name, p in net.named_parameters()}
        left = dict(image=mine.grad, grads=grads, buffers=dict(net.named_buffers()))
        torch.save(left, folder / f'{memory}-{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_all_images(tmp_path):
    """SyncBatchNorm, which torch's own code runs on a GPU alone."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_process, (port, tmp_path), nprocs=2)
    for memory in (None, 'lean'):
        net = synchronised('plain' if memory else None)
        x = batch(3 if memory else 6, images=5, size=(8, 8)).requires_grad_()
        net = _plain_norms(net)
        run_synchronised(net, x).backward()
        found = [torch.load(tmp_path / f'{memory}-{rank}.pth') for rank in range(2)]
        same([[x.grad], [torch.cat([left['image'] for left in found])]])
        for left in found:
            grads = {name: p.grad for name, p in net.named_parameters()}
            assert left['grads'].keys() == grads.keys()
            same([list(grads.values()), list(left['grads'].values())])
            same([list(net.buffers()), list(left['buffers'].values())])


def _plain_norms(net):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            plain = nn.BatchNorm2d(module.num_features).double()
            plain.load_state_dict(module.state_dict())
            plain.train(module.training)
            parent, _, child = name.rpartition('.')
            net.get_submodule(parent)._modules[child] = plain
    return net
