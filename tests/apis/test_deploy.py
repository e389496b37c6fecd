"""Condensing and deploying whole models."""

import copy
import pickle

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmdense.apis import UserError
from mmdense.apis.deploy import condense, deploy, deployed_config, faster_dense
from mmdense.benchmark import count_parameters
from mmdense.models import CondenseNetV2, DenseNet

ARCH = dict(layers=(1, 1, 1, 2, 1), growth=(4, 4, 4, 8, 8), groups=4)


class Model(nn.Module):
    """A backbone with something behind it, as a detector has."""

    def __init__(self, progress=1.0, backbone=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = backbone or CondenseNetV2(arch=ARCH, **options)
        if backbone is None and progress:
            self.backbone.prune_to(progress)
        self.head = nn.Linear(3, 5)


def image(batch=1):
    return torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_condense_says_what_it_cost():
    model = Model()
    before = count_parameters(model)
    with torch.no_grad():
        expected = model.backbone.eval()(image())
        costs = condense(model, size=(64, 64))
        close(model.backbone(image()), expected)
    assert [cost.form for cost in costs] == ['learned', 'condensed', 'deployed']
    assert [cost.parameters for cost in costs] == [before, count_parameters(model), None]
    assert costs[1].parameters < before
    assert costs[1].macs < costs[2].macs < costs[0].macs  # sfr runs dense by default
    assert costs[0].difference == 0
    assert all(0 < cost.difference < 1e-5 for cost in costs[1:])
    assert model.backbone.form == 'condensed'
    fresh = CondenseNetV2(arch=ARCH, form='condensed')
    fresh.load_state_dict(model.backbone.state_dict())


def test_condense_of_the_condensed_deploys_alone():
    model = Model()
    model.backbone.condense()
    assert [cost.form for cost in condense(model, size=(64, 64))] == ['condensed', 'deployed']


def test_condense_refuses_what_is_not_fully_pruned():
    model = Model(progress=0.2)
    with pytest.raises(UserError, match='stage 1 of 3'):
        condense(model, size=(64, 64))
    assert model.backbone.form == 'learned'
    costs = condense(model, size=(64, 64), allow_partial=True)
    assert costs[-1].difference < 1e-5
    cfg = deployed_config(Config(dict(model=dict(backbone=dict(arch=ARCH)))), model.backbone)
    backbone = dict(cfg.model.backbone)
    assert (backbone['form'], backbone['stage']) == ('condensed', 1)
    CondenseNetV2(**backbone).load_state_dict(model.backbone.state_dict())


@pytest.mark.parametrize(
    ('model', 'message'),
    [
        (Model(backbone=DenseNet(arch=dict(growth_rate=4, layers=(1, 1)))), r'not \[\]'),
        (nn.ModuleList([Model(), Model()]), r"not \['learned', 'learned'\]"),
    ],
)
def test_condense_needs_one_network(model, message):
    with pytest.raises(UserError, match=message):
        condense(model)


def test_wrong_maps_are_reported(monkeypatch):
    model = Model()
    condensed = CondenseNetV2.condense

    def wrong(self, **options):
        condensed(self, **options)
        self.features['denseblock_2'].denselayer_1.conv_2.conv.weight.data.mul_(1.1)

    monkeypatch.setattr(CondenseNetV2, 'condense', wrong)
    with pytest.raises(RuntimeError, match='condensed form differs from the learned one'):
        condense(model, size=(64, 64))


def test_tuning_names_convolutions_and_changes_no_map():
    model = Model()
    with torch.no_grad():
        expected = model.backbone.eval()(image())
        condense(model, size=(64, 64), tune=True)
        names = model.backbone.one_by_ones()
        assert set(model.backbone.dense) <= set(names)
        assert len(names) == 12
        deploy(model)
        close(model.backbone(image()), expected)


def test_tuning_takes_the_faster_way(monkeypatch):
    net = Model().backbone
    net.condense()
    slow = iter(range(10**6))
    # Later calls look slower, but dense ones of sfr are always faster than that.
    monkeypatch.setattr(
        'mmdense.apis.deploy._seconds',
        lambda run, device: next(slow) + (-(10**7) if _is_dense_sfr(run) else 10**7),
    )
    names = faster_dense(net, (64, 64))
    assert {name for name in net.one_by_ones() if name.endswith('.sfr')} <= set(names)


def _is_dense_sfr(run):
    module = run.func
    return type(module).__name__ == 'DeployedReactivation' and module.dense


def test_deploy_turns_the_backbone_of_a_model():
    model = Model()
    with torch.no_grad():
        expected = model.backbone.eval()(image(2))
        deploy(model)
        close(model.backbone(image(2)), expected)
    assert model.backbone.form == 'deployed'
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        close(again.backbone(image(2)), expected)


def test_deploy_needs_a_network_that_can():
    with pytest.raises(UserError, match='DenseNet has no form for deployment'):
        deploy(Model(backbone=DenseNet(arch=dict(growth_rate=4, layers=(1, 1)))))


def test_deployed_config_describes_the_condensed_model():
    net = Model().backbone
    net.condense()
    net.dense = ['denseblock_1.denselayer_1.sfr']
    hooks = [dict(type='mmdense.CondenseScheduleHook'), dict(type='mmdense.ChannelsLastHook')]
    init = dict(type='Pretrained', checkpoint='nowhere.pth')
    cfg = Config(dict(model=dict(backbone=dict(arch=ARCH, init_cfg=init)), custom_hooks=hooks))
    new = deployed_config(cfg, net)
    assert new.custom_hooks == hooks[1:]
    backbone = dict(new.model.backbone)
    assert backbone == dict(arch=ARCH, form='condensed', dense=net.dense, init_cfg=None)
    assert CondenseNetV2(**backbone).dense == net.dense
    assert cfg.custom_hooks == hooks  # the caller's is left alone
