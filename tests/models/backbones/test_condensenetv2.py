"""CondenseNetV2: published costs, and equal outputs in all three forms.

tests/weights/test_formats.py compares names, shapes and outputs with the released models.
"""

import copy
import pickle

import pytest
import torch
from families import DEVICE, FAMILIES, deployed, image, randomise, run, same, same_step, step
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmdense.errors import UserError
from mmdense.flops import backbone_macs
from mmdense.models import CondenseNetV2
from mmdense.models.deploy.condensenetv2 import take

SMALL = FAMILIES['CondenseNetV2'].network['arch']
COMPILED = dict(layers=(1, 1), growth=(8, 8), groups=4, hard_swish_from=1, gated_from=1)
UNEQUAL = dict(layers=(1, 2, 2), growth=(12, 12, 24), groups=4, condense_factor=6, gated_from=2)


def build(arch=None, progress=0.5, **options):
    """Return a network in evaluation, pruned up to this progress of training."""
    torch.manual_seed(0)
    net = randomise(CondenseNetV2(arch=arch or SMALL, **options)).eval()
    if progress is not None:
        net.prune_to(progress)
    return net


def meta(**options):
    with torch.device('meta'):
        return CondenseNetV2(out_indices=None, **options).eval()


def test_fresh_norms_of_reactivation_are_those_that_trained():
    """With both at zero, a ReLU block's reactivation never gets a gradient."""
    for name, parameter in CondenseNetV2(arch=SMALL).named_parameters():
        if '.norm.' in name:
            assert (parameter == (0 if name.endswith('bias') else 1)).all(), name


@pytest.mark.parametrize(
    ('arch', 'size', 'batch'),
    [
        ('a', (75, 53), 2),
        (SMALL, (33, 47), 2),
        (UNEQUAL, (63, 95), 1),
        (SMALL, (200, 160), 2),
        (UNEQUAL, (130, 140), 1),
    ],
)
def test_forms_agree(arch, size, batch):
    """Above 128 x 128 pixels the deployed 3x3 convolutions sum shifted planes."""
    net = build(arch, out_indices=None)
    x = image(*size, batch)
    expected = run(net, x)
    for form, convert in (('condensed', net.condense), ('deployed', net.switch_to_deploy)):
        convert()
        assert net.form == form
        same(run(net, x), expected)


@pytest.mark.parametrize('arch', [SMALL, UNEQUAL], ids=['equal', 'unequal'])
def test_partly_pruned(arch):
    factor = arch.get('condense_factor', arch['groups'])
    for stage in range(factor - 1):
        net = build(arch, 0.5 * stage / (factor - 1), out_indices=None)
        assert net.stage == stage
        assert net.connections() == pytest.approx(1 - stage / factor)
        for convert in (net.condense, net.switch_to_deploy):
            with pytest.raises(UserError, match=f'stage {stage} of {factor - 1}'):
                convert()
        assert net.form == 'learned'


def test_layers_at_different_stages():
    net = build(progress=0.2)
    net.features['denseblock_2'][0].sfr.prune_to(0.5)
    with pytest.raises(UserError, match='stage 1 of 3'):
        net.condense()


def test_pruning_reaches_all_layers():
    net = build(progress=None)
    assert (net.stage, net.last_stage, net.connections()) == (0, 3, 1.0)
    stages = []
    for progress in (0, 0.2, 0.4, 0.3, 0.5, 1):  # what is pruned stays so
        net.prune_to(progress)
        stages.append(net.stage)
    assert stages == [0, 1, 2, 2, 3, 3]
    layers = net.learned_layers()
    assert len(layers) == 2 * 8
    assert all(layer.stage == 3 for layer in layers)
    with pytest.raises(ValueError, match='must be from 0 to 1'):
        net.prune_to(1.5)


def test_pruning_survives_saving():
    net = build(progress=0.4)
    other = CondenseNetV2(arch=SMALL).eval()
    other.load_state_dict(net.state_dict())
    assert other.stage == net.stage == 2
    same(run(other, image()), run(net, image()), 0)
    for n in (net, other):
        n.prune_to(0.5)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


def test_other_forms_have_no_masks():
    net = build()
    for form, convert in (('condensed', net.condense), ('deployed', net.switch_to_deploy)):
        convert()
        for method in (lambda: net.prune_to(0.5), net.connections):
            with pytest.raises(ValueError, match=f"form is '{form}'"):
                method()
        net.condense()  # nothing is left to do


def weights(net):
    norms = {id(p) for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
    return sum(p.numel() for p in net.parameters() if id(p) not in norms)


@pytest.mark.parametrize(
    ('arch', 'hidden', 'millions', 'macs', 'published'),
    [
        ('a', 828, '2.0', '43.1', 46),
        ('b', 1024, '3.6', '140.5', 146),
        ('c', 1024, '6.1', '295.8', 309),
    ],
)
def test_published_costs(arch, hidden, millions, macs, published):
    net = meta(arch=arch, form='condensed')
    channels = net.out_channels[-1]
    classifier = 2 * channels * (channels // 16) + (channels + 1000) * hidden
    assert f'{(weights(net) + classifier) / 1e6:.1f}' == millions
    total = (backbone_macs(net, (224, 224)) + classifier) / 1e6
    assert f'{total:.1f}' == macs
    # The published numbers count activations and pools as well.
    assert total == pytest.approx(published, rel=0.1)


def test_macs_of_the_deployed_form():
    """Those of the condensed form, but for reactivation, which runs as a dense product."""
    net = CondenseNetV2(arch='b', form='condensed', out_indices=None).eval()
    counted, added = backbone_macs(copy.deepcopy(net).to('meta'), (64, 64)), 0
    for i, block in enumerate(list(net.features.values())[1:]):
        for layer in block:
            rows = int(layer.sfr.index.max()) + 1
            weights = rows * layer.conv_2.conv.out_channels
            added += (weights - layer.sfr.conv.weight.numel()) * (32 >> i) ** 2
    with FlopCounterMode(display=False) as counter:
        run(deployed(net), image(64, 64))
    assert counter.get_total_flops() == 2 * (counted + added)


@pytest.mark.parametrize(('layers', 'millions'), [(18, '0.48'), (24, '0.78')])
def test_cifar_shapes_have_the_published_size(layers, millions):
    """Three blocks; the shape is inferred from the size, since none was published."""
    arch = dict(
        layers=(layers,) * 3,
        growth=(8, 16, 32),
        groups=8,
        stem_stride=1,
        hard_swish_from=3,
        gated_from=2,
    )
    net = meta(arch=arch, form='condensed')
    assert net.out_strides == (1, 2, 4)
    total = weights(net) + 10 * net.out_channels[-1]
    assert f'{total / 1e6:.2f}' == millions


def test_workspace_fits_each_image():
    """Memory that is kept between images fits another size, mode, precision and device."""
    net = build()
    fast = deployed(net)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for x in (image(96, 64, 2), image(32, 32), image(160, 150, 1)):
            with mode():
                outputs = fast(x)
            assert not any(y.requires_grad for y in outputs)
            same(outputs, run(net, x))
    for dtype in (torch.float64, torch.float32):
        outputs = run(fast.to(dtype), image(64, 64).to(dtype))
        same([y.float() for y in outputs], run(net, image(64, 64)))
    work = {}
    assert take(work, 0, torch.ones(1), 2, 3).shape == (2, 3)
    assert take(work, 0, torch.ones(1, device='meta'), 2, 3).is_meta


def test_copies_have_their_own_workspace():
    fast = deployed(build())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert other._local is not fast._local


def test_deployed_refuses_gradients():
    with pytest.raises(RuntimeError, match='differentiation|grad'):
        deployed(build())(image().requires_grad_())


def test_condensed_is_fine_tuned():
    """Norms then differ between groups, also for the same channel."""
    net = CondenseNetV2(arch=SMALL, form='condensed')
    randomise(net)
    sum(m.square().mean() for m in net(image(batch=2))).backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= 0.1 * parameter.grad / parameter.grad.abs().max()
    net.eval()
    same(run(deployed(net), image()), run(net, image()))


@pytest.mark.parametrize('form', ['learned', 'condensed'])
def test_frozen_stages_survive_condensing(form):
    net = CondenseNetV2(arch=SMALL, frozen_stages=2, norm_eval=True, form=form)
    if form == 'learned':
        net.prune_to(0.5)
        net.condense()
    else:
        net.train()
    for stage in range(6):
        for module in net._stage_modules(stage):
            assert all(p.requires_grad == (stage > 2) for p in module.parameters())
            assert module.training == (stage > 2)
    assert not any(m.training for m in net.modules() if isinstance(m, _BatchNorm))


@pytest.mark.parametrize('memory', ['recompute', 'lean'])
def test_memory_modes_of_the_condensed_form(memory):
    results = []
    for mode in ('plain', memory):
        net = build(memory=mode)
        net.condense()
        results.append(step(net.double().train(), image(batch=2).double())[0])
    same_step(*reversed(results))


@pytest.mark.parametrize('form', ['learned', 'condensed'])
def test_drop_rate_is_before_each_1x1_convolution(form):
    net = CondenseNetV2(arch=SMALL, drop_rate=0.5, form=form)
    shares = []
    for name, module in net.named_modules():
        if name.endswith('.drop'):
            module.register_forward_hook(
                lambda m, args, output: shares.append((output[args[0] != 0] == 0).float().mean())
            )
    run(net, image(128, 128, 2))
    assert len(shares) == 2 * 8
    assert all(abs(share - 0.5) < 0.12 for share in shares)  # of as few as 256 values
    if form == 'learned':
        net.prune_to(0.5)
        net.condense()
        drops = [m for m in net.modules() if isinstance(m, nn.Dropout)]
        assert len(drops) == 2 * 8
        assert all(m.p == 0.5 for m in drops)


@pytest.mark.parametrize('form', ['learned', 'condensed'])
def test_norm_cfg(form):
    norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=False)
    net = CondenseNetV2(arch=SMALL, norm_cfg=norm_cfg, form=form)
    if form == 'learned':
        randomise(net).prune_to(0.5)
    for _ in range(2):
        norms = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(norms) == 3 * 8
        assert all(m.eps == 1e-3 and not m.weight.requires_grad for m in norms)
        net.condense()
    net.eval()
    same(run(deployed(net), image()), run(net, image()))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(form='deployed'), "form is 'deployed'"),
        (dict(drop_rate=1.0), 'drop_rate is 1.0'),
        (dict(arch=dict(layers=(1,), growth=(8, 8))), 'the same length'),
        (dict(arch=dict(layers=(), growth=())), 'the same length'),
        (dict(arch=dict(layers=(1, 0), growth=(8, 8))), 'must be positive'),
        (dict(arch=dict(layers=(1,), growth=(0,))), 'must be positive'),
        (dict(arch=dict(layers=(1,), growth=(8,), condense_factor=0)), 'must be positive'),
        (dict(arch=dict(layers=(1,), growth=(8,), stem_stride=0)), 'must be positive'),
        (dict(arch=dict(layers=(1, 1), growth=(8, 12))), 'groups must divide'),
        (dict(arch=dict(layers=(1,), growth=(8,), condense_factor=3)), 'condense_factor must'),
        (dict(norm_cfg=dict(type='GN', num_groups=4)), 'norm_cfg must be of a batch norm'),
        (dict(norm_cfg=dict(type='BN', affine=False)), 'norm_cfg must be of a batch norm'),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        CondenseNetV2(**{'arch': SMALL, 'out_indices': None, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ('form', 'backend'), [('condensed', 'aot_eager'), ('deployed', 'inductor')]
)
def test_compiles(form, backend):
    net = build(COMPILED, out_indices=None)
    net.condense() if form == 'condensed' else net.switch_to_deploy()
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(net), fullgraph=True, backend=backend)
    for x in (image(), image(130, 140, batch=2)):
        same(run(compiled, x), run(net, x))


def test_deployed_form_keeps_its_precision_under_autocast():
    net = deployed(build())
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = run(net, image())
        same(run(net, image().bfloat16()), outputs, 0.02)
    assert all(y.dtype == torch.float32 for y in outputs)
    same(outputs, run(net, image()), 0)


def test_weights_that_would_not_fit_are_refused():
    net = build()
    weights = {k: v.float() if k.endswith('_mask') else v for k, v in net.state_dict().items()}
    build(progress=None).load_state_dict(weights)  # as released
    averaged = {k: v * 0.9999 if k.endswith('_mask') else v for k, v in weights.items()}
    with pytest.raises(UserError, match='_mask has fractions'):
        build(progress=None).load_state_dict(averaged)
    condensed = CondenseNetV2(arch=SMALL, form='condensed')
    released = condensed.state_dict()
    key = next(key for key in released if key.endswith('sfr.index'))
    released[key] = torch.eye(len(released[key]))
    with pytest.raises(UserError, match='condensenetv2://FILE'):
        load_state_dict(condensed, released)
