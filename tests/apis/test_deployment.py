"""Condensing and deploying whole models."""

import copy
import pickle

import pytest
import torch
from mmengine.config import Config
from torch import nn

import mmdense
from mmdense.apis import deploy
from mmdense.apis.deployment import compare_forms, condense, deployed_config, faster_dense
from mmdense.errors import UserError
from mmdense.flops import backbone_macs, count_parameters
from mmdense.models import CondenseNetV2, DenseNet, ReXNet, ShuffleNetV2

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
    forms = ['learned', 'condensed', 'deployed', 'deployed, all grouped']
    assert [cost.form for cost in costs] == forms
    assert [cost.parameters for cost in costs] == [before, count_parameters(model), None, None]
    assert costs[1].parameters < before
    assert costs[1].macs < costs[2].macs < costs[0].macs  # sfr runs dense by default
    assert costs[3].macs == costs[1].macs
    assert costs[0].difference == 0
    assert all(0 < cost.difference < 1e-5 for cost in costs[1:])
    assert model.backbone.form == 'condensed'
    fresh = CondenseNetV2(arch=ARCH, form='condensed')
    fresh.load_state_dict(model.backbone.state_dict())


def test_condense_of_the_condensed_deploys_alone():
    model = Model()
    model.backbone.condense()
    costs = condense(model, size=(64, 64))
    assert [cost.form for cost in costs] == ['condensed', 'deployed', 'deployed, all grouped']
    assert costs[0].parameters == count_parameters(model)


def test_condense_compares_in_float32():
    model = Model().bfloat16().train()
    assert all(cost.difference < 1e-5 for cost in condense(model, size=(64, 64)))
    assert model.backbone.features['denseblock_1'].denselayer_1.conv_1.norm.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_condense_refuses_what_is_not_fully_pruned():
    model = Model(progress=0.2)
    with pytest.raises(UserError, match='stage 1 of 3'):
        condense(model, size=(64, 64))
    assert model.backbone.form == 'learned'
    costs = condense(model, size=(64, 64), allow_partial=True)
    assert costs[-1].difference < 1e-5
    cfg = Config(dict(model=dict(backbone=dict(arch=ARCH))))
    cfg = deployed_config(cfg, model.backbone, 'out.pth')
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
    with pytest.raises(RuntimeError, match="'condensed' differs from 'learned' by"):
        condense(model, size=(64, 64))
    assert model.backbone.form == 'learned'


def test_condense_needs_an_image_that_fits():
    with pytest.raises(UserError, match='at least 32'):
        condense(Model(), size=(8, 8))


def test_tuning_of_a_network_that_was_trained_condensed(monkeypatch):
    net = Model().backbone
    net.condense()
    norm = net.features['denseblock_2'].denselayer_1.conv_1.norm
    with torch.no_grad():
        norm.bias.copy_(torch.arange(len(norm.bias)))
    monkeypatch.setattr('mmdense.apis.deployment._seconds', lambda run, device: -_runs_dense(run))
    names = set(net.one_by_ones()) - {'denseblock_2.denselayer_1.conv_1'}
    assert set(faster_dense(net, (64, 64))) == names


def _runs_dense(run):
    return run.func.dense


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


@pytest.mark.parametrize('way', ['conv_1', 'sfr'])
def test_tuning_takes_the_faster_way(way, monkeypatch):
    net = Model().backbone
    net.condense()
    kind = dict(conv_1='DeployedGroupConv', sfr='DeployedReactivation')[way]

    def seconds(run, device):
        return 1 + (-0.5 if type(run.func).__name__ == kind else 0.5) * run.func.dense

    monkeypatch.setattr('mmdense.apis.deployment._seconds', seconds)
    names = [name for name in net.one_by_ones() if name.endswith(way)]
    assert faster_dense(net, (64, 64)) == names


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
    message = 'ShuffleNetV2 has no form for deployment: CondenseNetV2, .*and ReXNet have one'
    for command in (deploy, compare_forms):
        with pytest.raises(UserError, match=message):
            command(Model(backbone=ShuffleNetV2(arch='0.5')))


def test_deploy_is_imported_when_it_is_asked_for():
    assert mmdense.apis.deploy is deploy
    with pytest.raises(AttributeError, match="'mmdense.apis' has no attribute 'undeploy'"):
        mmdense.apis.undeploy  # noqa: B018


def rexnet():
    """A small network whose norms have seen images."""
    torch.manual_seed(0)
    net = ReXNet(arch=dict(width=0.25, depth=0.5), out_indices=(0, 1))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(4, 3, 64, 64))
    return net


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forms_are_compared_and_the_model_is_left_alone(dtype):
    model = Model(backbone=rexnet()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    trained, deployed = compare_forms(model, size=(64, 96))
    assert (trained.form, deployed.form) == ('trained', 'deployed')
    assert (trained.parameters, deployed.parameters) == (count_parameters(model), None)
    assert trained.difference == 0
    assert 0 < deployed.difference < 1e-5
    assert trained.macs == backbone_macs(copy.deepcopy(model.backbone).to('meta').eval(), (64, 96))
    assert 0 < deployed.macs <= trained.macs
    assert not trained.not_counted
    assert model.backbone.form == 'trained'
    assert model.backbone.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_comparing_forms_needs_one_that_is_not_deployed():
    model = Model(backbone=rexnet())
    with pytest.raises(UserError, match='at least 32'):
        compare_forms(model, size=(4, 4))
    both = r'ReXNet \(trained\), CondenseNetV2 \(learned\)$'
    with pytest.raises(UserError, match=f'one backbone to deploy is needed, not {both}'):
        compare_forms(nn.ModuleList([model, Model()]))
    deploy(model)
    with pytest.raises(UserError, match=r'not ReXNet \(deployed\)$'):
        compare_forms(model)


def test_a_form_that_differs_is_reported(monkeypatch):
    folded = ReXNet.switch_to_deploy

    def wrong(self):
        folded(self)
        next(p for p in self.parameters() if p.dim() == 1).data.add_(0.1)

    monkeypatch.setattr(ReXNet, 'switch_to_deploy', wrong)
    with pytest.raises(RuntimeError, match="'deployed' differs from 'trained' by"):
        compare_forms(Model(backbone=rexnet()), size=(64, 64))


def test_products_that_a_form_hides_are_named(monkeypatch):
    forward = ReXNet.forward

    def hidden(self, x):
        torch.mv(x[0, 0], x[0, 0, 0])
        return forward(self, x)

    monkeypatch.setattr(ReXNet, 'forward', hidden)
    costs = compare_forms(Model(backbone=rexnet()), size=(64, 64))
    assert [cost.not_counted for cost in costs] == [{'aten::mv': 1}] * 2


def test_deployed_config_of_a_network_that_needs_no_condensing():
    hooks = [dict(type='mmdense.ChannelsLastHook')]
    init = dict(type='Pretrained', checkpoint='nowhere.pth')
    model = dict(backbone=dict(arch='0.5', init_cfg=init))
    cfg = Config(dict(model=model, custom_hooks=hooks, work_dir='old', launcher='none'))
    new = deployed_config(cfg, ReXNet(), 'out.pth')
    assert new.to_dict() == dict(
        model=dict(backbone=dict(arch='0.5', init_cfg=None)),
        custom_hooks=hooks,
        load_from='out.pth',
    )


def test_deployed_config_describes_the_condensed_model():
    net = Model().backbone
    net.condense()
    net.dense = ['denseblock_1.denselayer_1.sfr']
    hooks = [dict(type='mmdense.CondenseScheduleHook'), dict(type='mmdense.ChannelsLastHook')]
    init = dict(type='Pretrained', checkpoint='nowhere.pth')
    cfg = Config(dict(model=dict(backbone=dict(arch=ARCH, init_cfg=init)), custom_hooks=hooks))
    cfg.update(work_dir='old', launcher='none', resume=True)
    new = deployed_config(cfg, net, 'out.pth')
    assert new.load_from == 'out.pth'
    assert not {'work_dir', 'launcher', 'resume'} & set(new)
    assert new.custom_hooks == hooks[1:]
    backbone = dict(new.model.backbone)
    assert backbone == dict(arch=ARCH, form='condensed', dense=net.dense, init_cfg=None)
    assert CondenseNetV2(**backbone).dense == net.dense
    assert cfg.custom_hooks == hooks  # the caller's is left alone
