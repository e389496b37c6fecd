"""Layer decay: scales, weight decay, custom keys and bad settings."""

import re

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmdense  # noqa: F401
from mmdense.models import RDNet

TINY = dict(stem=8, growth=(8, 8, 8), down=(1, 2), blocks=2, gate_from=1)
BASE_LR, WEIGHT_DECAY = 8e-5, 0.05


def tiny(**options):
    return RDNet(arch=TINY, out_indices=(0, 1, 2), **options)


class Model(nn.Module):
    """A detector reduced to a backbone and a head."""

    def __init__(self, backbone=None):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone
        self.head = nn.Conv2d(4, 4, 1)


def wrapper_cfg(optimizer=None, **paramwise_cfg):
    return dict(
        constructor='mmdense.LayerDecayOptimWrapperConstructor',
        optimizer=optimizer or dict(type='AdamW', lr=BASE_LR, weight_decay=WEIGHT_DECAY),
        paramwise_cfg=paramwise_cfg,
    )


def groups(model, **settings):
    wrapper = build_optim_wrapper(model, wrapper_cfg(**settings))
    group_of = {id(p): g for g in wrapper.optimizer.param_groups for p in g['params']}
    return {name: group_of.get(id(p)) for name, p in model.named_parameters()}


def scales(model, **paramwise_cfg):
    return {n: g['lr'] / BASE_LR for n, g in groups(model, **paramwise_cfg).items()}


# Exponents of the decay rate: stem, dense stages, then layers that were not pretrained.
EXPECTED = {
    ('tiny', 'exact'): range(8, -1, -1),
    ('small', 'exact'): range(12, -1, -1),
    ('base', 'exact'): range(12, -1, -1),
    ('large', 'exact'): range(13, -1, -1),
    ('tiny', 'published'): [*range(8, 0, -1), -2],
    # The release's own figures for RDNet-B, at a rate of 0.7: 2.92 for the last stage, 2.04 for
    # the heads.
    ('base', 'published'): [*range(8, -4, -1), -2],
}


@pytest.mark.parametrize(('arch', 'mode'), EXPECTED)
def test_scales_follow_the_formula(arch, mode):
    with torch.device('meta'):
        model = Model(RDNet(arch=arch, output_norm=True))
    expected = EXPECTED[arch, mode]
    assert len(expected) == len(model.backbone.dense_stages) + 2
    for name, scale in scales(model, decay_rate=0.7, mode=mode).items():
        part = name.split('.')
        if part[1] == 'dense_stages':
            index = 1 + int(part[2])
        else:
            index = 0 if part[1] == 'stem' else -1
        assert scale == pytest.approx(0.7 ** expected[index]), name


def test_layers_decay_block_by_block():
    model = Model(tiny())
    actual = scales(model, decay_rate=0.5, granularity='layer')
    assert actual['head.weight'] == 1
    assert actual['backbone.dense_stages.2.2.dense_block1.gamma'] == pytest.approx(0.5)
    assert actual['backbone.dense_stages.2.2.dense_block0.gamma'] == pytest.approx(0.25)
    assert actual['backbone.dense_stages.2.1.weight'] == pytest.approx(0.25)
    assert actual['backbone.stem.0.weight'] == pytest.approx(0.5**7)
    by_stage = scales(model, decay_rate=0.5)
    assert by_stage['backbone.dense_stages.2.2.dense_block0.gamma'] == pytest.approx(0.5)


def test_biases_and_one_dimensional_parameters_have_no_weight_decay():
    model = Model(tiny(output_norm=True))
    model.table = nn.ParameterDict(dict(bias=torch.zeros(2, 4)))
    actual = {name: group['weight_decay'] for name, group in groups(model, decay_rate=0.8).items()}
    assert actual['table.bias'] == 0
    assert actual['head.bias'] == 0
    assert actual['head.weight'] == WEIGHT_DECAY
    assert actual['backbone.output_norms.0.weight'] == 0
    assert actual['backbone.dense_stages.1.1.weight'] == WEIGHT_DECAY
    assert actual['backbone.dense_stages.1.2.dense_block0.gamma'] == 0


def test_frozen_parameters_are_left_out():
    model = Model(tiny(frozen_stages=1))
    actual = groups(model, decay_rate=0.8)
    for name, group in actual.items():
        frozen = name.startswith(('backbone.stem.', 'backbone.dense_stages.0.'))
        assert (group is None) == frozen, name


def test_shared_parameters_count_once():
    model = Model(tiny())
    model.other_head = nn.Conv2d(4, 4, 1)
    model.other_head.weight = model.head.weight
    wrapper = build_optim_wrapper(model, wrapper_cfg(decay_rate=0.8))
    ids = [id(p) for g in wrapper.optimizer.param_groups for p in g['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_custom_keys_multiply():
    model = Model(tiny())
    plain = groups(model, decay_rate=0.8)
    custom = {
        'backbone': dict(lr_mult=0.1),
        'backbone.stem.0': dict(lr_mult=3, decay_mult=0.5),
        'head': dict(decay_mult=0.0),
    }
    actual = groups(model, decay_rate=0.8, custom_keys=custom)
    for name, group in actual.items():
        lr_mult = decay_mult = 1
        if name.startswith('backbone.stem.0'):  # only the longest key
            lr_mult, decay_mult = 3, 0.5
        elif name.startswith('backbone'):
            lr_mult = 0.1
        else:
            decay_mult = 0
        assert group['lr'] == pytest.approx(plain[name]['lr'] * lr_mult), name
        assert group['weight_decay'] == pytest.approx(plain[name]['weight_decay'] * decay_mult)


def test_the_log_has_a_table_of_scales(caplog):
    model = Model(tiny())
    logger = MMLogger.get_instance('test_layer_decay')
    logger.addHandler(caplog.handler)
    groups(model, decay_rate=0.5, mode='published')
    logger.removeHandler(caplog.handler)
    rows = [line.split() for line in caplog.text.splitlines()]
    rows = [row for row in rows if row[0].isdigit()]
    assert [row[0] for row in rows] == ['0', '1', '2', '3', '4']
    assert [float(row[1]) for row in rows] == pytest.approx(
        [0.5**n for n in (8, 7, 6, 5, -2)], rel=1e-3
    )
    assert float(rows[-1][2]) == pytest.approx(4 * BASE_LR, rel=1e-2)
    total = sum(int(row[3].replace(',', '')) for row in rows)
    assert total == sum(p.numel() for p in model.parameters())
    assert 'dense_block' not in caplog.text


BAD_RATES = (0, 1.1, float('nan'), True)


def of_head(**settings):
    return dict(custom_keys=dict(head=settings))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({}, 'paramwise_cfg.decay_rate is None, must be above 0, at most 1'),
        *((dict(decay_rate=rate), f'paramwise_cfg.decay_rate is {rate}') for rate in BAD_RATES),
        (dict(granularity='block'), "paramwise_cfg.granularity is 'block'"),
        (dict(mode='paper'), "paramwise_cfg.mode is 'paper'"),
        (dict(mode='published', granularity='layer'), "paramwise_cfg.granularity must be 'stage'"),
        (dict(decay_rat=0.8), "unknown paramwise_cfg.decay_rat; did you mean 'decay_rate'?"),
        (dict(custom_keys=['head']), 'paramwise_cfg.custom_keys is'),
        (dict(custom_keys=dict(head=2)), "custom_keys['head'] is 2"),
        (of_head(lr_mul=2), "unknown paramwise_cfg.custom_keys['head'].lr_mul; did you mean 'lr_m"),
        (of_head(lr_mult=-1), "paramwise_cfg.custom_keys['head'].lr_mult is -1"),
        (dict(custom_keys=dict(haed={})), "paramwise_cfg.custom_keys['haed'] matches no parameter"),
        (dict(optimizer=dict(type='AdamW', weight_decay=0.1)), 'optimizer.lr must be a number'),
        (dict(optimizer=dict(type='AdamW', lr=1)), 'optimizer.weight_decay must be a number'),
    ],
)
def test_bad_settings_name_the_key(settings, message):
    if settings and 'decay_rat' not in settings:
        settings = dict(decay_rate=0.8) | settings
    with pytest.raises(ValueError, match=re.escape(message)):
        groups(Model(tiny()), **settings)


def test_the_order_of_groups_does_not_depend_on_the_settings():
    """A resumed optimizer matches groups by position."""
    orders = []
    for lr_mult in (0.5, 2.0):
        custom = {'head.weight': dict(lr_mult=lr_mult, decay_mult=lr_mult)}
        model = Model(tiny())
        wrapper = build_optim_wrapper(model, wrapper_cfg(decay_rate=0.8, custom_keys=custom))
        names = {id(p): name for name, p in model.named_parameters()}
        orders.append([[names[id(p)] for p in g['params']] for g in wrapper.optimizer.param_groups])
    assert orders[0] == orders[1]


@pytest.mark.parametrize('part', ['model', 'backbone'])
def test_compiled_models_have_the_same_scales(part):
    model = Model(tiny())
    plain = scales(model, decay_rate=0.8, mode='published')
    if part == 'model':
        actual = scales(torch.compile(model), decay_rate=0.8, mode='published')
    else:
        model.backbone = torch.compile(model.backbone)
        actual = scales(model, decay_rate=0.8, mode='published')
    assert {name.replace('_orig_mod.', ''): scale for name, scale in actual.items()} == plain


def test_flattened_parameters_are_refused():
    class FullyShardedDataParallel(Model):
        pass

    with pytest.raises(ValueError, match='FullyShardedDataParallel, which flattens parameters'):
        groups(FullyShardedDataParallel(tiny()), decay_rate=0.8)


class OtherBackbone(nn.Conv2d):
    def layer_depth(self, name, granularity):
        return 0, 2


def test_backbones_without_layer_depth_are_refused():
    with pytest.raises(ValueError, match=r'^Conv2d cannot be used .* layer_depth\(name, gran'):
        groups(Model(nn.Conv2d(3, 4, 1)), decay_rate=0.8)
    with pytest.raises(ValueError, match='Model has no backbone'):
        groups(Model(), decay_rate=0.8)
    with pytest.raises(ValueError, match=r"paramwise_cfg.mode 'published' is only for RDNet"):
        groups(Model(OtherBackbone(3, 4, 1)), decay_rate=0.8, mode='published')


def test_other_backbones_with_layer_depth_are_supported():
    actual = scales(Model(OtherBackbone(3, 4, 1)), decay_rate=0.5)
    assert actual['backbone.weight'] == 0.5
    assert actual['head.weight'] == 1
