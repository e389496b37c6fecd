"""RDNet equals timm's; test_contract.py has what all families share."""

import copy
from functools import partial

import pytest
import timm
import torch
from families import DEVICE, image, randomise, run, same_step, step
from torch import nn

from mmdense.models import RDNet

TINY = dict(stem=16, growth=(8, 16, 8), down=(1, 2), blocks=2, gate_from=1)


def timm_twin(name='rdnet_tiny', **options):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, global_pool='', **options)
    net.head = torch.nn.Identity()
    return randomise(net)


@pytest.mark.parametrize(('size', 'batch'), [((45, 70), 1), ((32, 97), 2)])
def test_equals_timm(size, batch):
    theirs = timm_twin().double()
    ours = RDNet(arch='tiny').double()
    ours.load_state_dict(theirs.state_dict())
    x = image(*size, batch).double()
    expected, _ = step(
        theirs, x, lambda y: theirs.forward_intermediates(y, intermediates_only=True)
    )
    same_step(step(ours, x)[0], expected)


@pytest.mark.parametrize('arch', RDNet.archs)
def test_sizes_equal_timm(arch):
    with torch.device('meta'):
        ours, theirs = RDNet(arch=arch), timm_twin(f'rdnet_{arch}')
    expected = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected


def test_drop_path_rates_equal_timm():
    nets = timm_twin(drop_path_rate=0.3), RDNet(drop_path_rate=0.3)
    theirs, ours = ([m.drop_prob for m in n.modules() if hasattr(m, 'drop_prob')] for n in nets)
    assert ours == pytest.approx(theirs)
    assert ours[0] == 0
    assert ours[-1] == pytest.approx(0.3)


def test_initial_values_equal_timm():
    torch.manual_seed(0)
    theirs = timm.create_model('rdnet_tiny').state_dict()
    for name, value in RDNet().state_dict().items():
        if value.ndim == 1 and not name.endswith('bias'):
            assert torch.equal(value, theirs[name]), name
        elif value.ndim > 1 and value.numel() > 10_000:
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


def test_output_norm_is_one_group_norm_per_feature_map():
    x = image(64, 64, batch=2)
    plain = RDNet(arch=TINY, out_indices=(0, 2)).eval()
    normed = RDNet(arch=TINY, out_indices=(0, 2), output_norm=True).eval()
    keys = normed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert keys == [f'output_norms.{i}.{k}' for i in (0, 2) for k in ('weight', 'bias')]
    for raw, y in zip(run(plain, x), run(normed, x), strict=True):
        variance, mean = torch.var_mean(raw, (1, 2, 3), keepdim=True, correction=0)
        expected = (raw - mean) / (variance + 1e-5).sqrt()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    norm = normed.output_norms['0'].double()
    raw = 5 + torch.randn(2, 32, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(norm(raw), nn.GroupNorm.forward(norm, raw))
    half = norm.float()(raw.bfloat16())
    torch.testing.assert_close(half, norm(raw.bfloat16().float()).bfloat16())
    depth, number = normed.layer_depth('output_norms.2.weight')
    assert depth == number - 1


def test_layer_depth_counts_dense_stages():
    net = RDNet(arch='tiny')
    assert net.layer_depth('stem.0.weight') == (0, 9)
    assert net.layer_depth('dense_stages.0.0.dense_block1.gamma') == (1, 9)
    assert net.layer_depth('dense_stages.6.0.weight') == (7, 9)
    assert net.layer_depth('dense_stages.0.0.dense_block1.gamma', 'layer') == (2, 23)
    assert net.layer_depth('dense_stages.6.0.weight', 'layer') == (19, 23)
    assert net.layer_depth('dense_stages.6.2.dense_block2.gamma', 'layer') == (21, 23)


def test_arch_fields_have_an_effect():
    net = RDNet(arch=TINY, out_indices=(0, 1, 2))
    assert net.out_channels == (32, 48, 40)
    assert net.stem[0].out_channels == 16
    gates = [n for n, _ in net.named_parameters() if n.endswith('.5.fc.weight')]
    assert len(gates) == 4  # two blocks in each of the stages from 1 on
    assert len(net.dense_stages[0][0]) == 2
    scaled = RDNet(arch=dict(TINY, layer_scale=0.5), out_indices=(0,))
    assert scaled.dense_stages[0][0].dense_block0.gamma.tolist() == [0.5] * 8


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_features_stay_narrow_under_autocast(layout):
    net = RDNet(arch=TINY, output_norm=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = net.to(DEVICE, memory_format=layout)(image(32, 32, batch=2))
    for y in outputs:
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)  # as norms over channels leave it
    sum(y.sum() for y in outputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_as_precise_as_timms(dtype):
    """The error against float64, of outputs and of all gradients, in root mean square."""
    theirs, ours = timm_twin(), RDNet(arch='tiny')
    ours.load_state_dict(theirs.state_dict())
    x, errors = image(64, 96, batch=2), []
    exact, _ = step(copy.deepcopy(ours).double(), x.double())
    for net in (ours, theirs):
        run_all = partial(theirs.forward_intermediates, intermediates_only=True)
        forward = torch.autocast('cpu', dtype)(ours if net is ours else run_all)
        result, _ = step(net, x, forward)
        squares = [((result[name] - y).norm() / y.norm()).square() for name, y in exact.items()]
        errors.append(sum(squares) / len(squares))
    assert errors[0] <= 1.5**2 * errors[1]


def test_lean_recomputes_the_hidden_layer_of_narrow_blocks(monkeypatch):
    results, sizes = [], []
    for memory, below in (('plain', 0), ('lean', 0), ('lean', 1000)):
        monkeypatch.setattr('mmdense.models.backbones.rdnet.RECOMPUTE_BELOW', below)
        torch.manual_seed(0)
        net = RDNet(arch={**TINY, 'layer_scale': 1.0}, memory=memory).double()
        result, size = step(net, image(32, 32, batch=2).double())
        results.append(result)
        sizes.append(size)
    assert sizes[0] > 1.4 * sizes[1]
    assert sizes[1] > 1.2 * sizes[2]
    for result in results[1:]:
        same_step(result, results[0])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(growth=()), 'positive'),
        (dict(stem=0), 'positive'),
        (dict(stem=4, growth=(4, 8, 8)), 'fewer than 16 channels'),
        (dict(down=(2, 1)), 'down must increase'),
        (dict(down=(0, 1)), 'down must increase'),
        (dict(down=(1, 3)), 'down must increase'),
    ],
)
def test_impossible_arch(change, message):
    with pytest.raises(ValueError, match=message):
        RDNet(arch={**TINY, **change}, out_indices=(0,))
