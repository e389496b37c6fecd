"""Condensing and deploying complete models."""

import copy

import pytest
import torch
from families import FAMILIES, image, run, same
from mmengine.config import Config
from torch import nn

import mmdense
from mmdense.apis import deploy
from mmdense.apis.deployment import compare_forms, condense, deployed_config
from mmdense.errors import UserError
from mmdense.flops import backbone_macs, count_parameters
from mmdense.models import CondenseNetV2, DenseNet, ReXNet, ShuffleNetV2

ARCH = dict(layers=(1, 1, 1, 2, 1), growth=(4, 4, 4, 8, 8), groups=4)


class Model(nn.Module):
    """A backbone with a head."""

    def __init__(self, backbone=None, progress=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = backbone or CondenseNetV2(arch=ARCH)
        if backbone is None:
            self.backbone.prune_to(progress)
        self.head = nn.Linear(3, 5)


def rexnet():
    """Return a small network whose norms have running statistics."""
    torch.manual_seed(0)
    net = ReXNet(arch=dict(width=0.25, depth=0.5), out_indices=(0, 1))
    for i in range(3):
        run(net, image(64, 64, batch=4, seed=i))
    return net


def test_condense_returns_the_costs():
    model = Model()
    before = count_parameters(model)
    expected = run(model.backbone.eval(), image())
    costs = condense(model, size=(64, 64))
    same(run(model.backbone, image()), expected)
    assert [cost.form for cost in costs] == ['learned', 'condensed', 'deployed']
    assert [cost.parameters for cost in costs] == [before, count_parameters(model), None]
    assert costs[1].parameters < before
    # Reactivation runs as a dense product once deployed.
    assert costs[1].macs < costs[2].macs < costs[0].macs
    assert costs[0].difference == 0
    assert all(cost.difference < 1e-5 for cost in costs[1:])
    assert model.backbone.form == 'condensed'
    CondenseNetV2(arch=ARCH, form='condensed').load_state_dict(model.backbone.state_dict())
    again = condense(model, size=(64, 64))
    assert [cost.form for cost in again] == ['condensed', 'deployed']
    assert again[0].parameters == costs[1].parameters


def test_condense_compares_in_float32():
    model = Model().bfloat16().train()
    assert all(cost.difference < 1e-5 for cost in condense(model, size=(64, 64)))
    assert model.backbone.features['denseblock_1'].denselayer_1.conv_1.norm.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_condense_refuses_a_network_that_is_not_fully_pruned():
    model = Model(progress=0.2)
    with pytest.raises(UserError, match='stage 1 of 3'):
        condense(model, size=(64, 64))
    assert model.backbone.form == 'learned'


def test_condense_and_compare_need_one_network():
    densenet = Model(DenseNet(**FAMILIES['DenseNet'].network))
    with pytest.raises(UserError, match='one CondenseNetV2 to condense is needed, .* has: none'):
        condense(densenet)
    both = r'has: ReXNet \(trained\), CondenseNetV2 \(learned\)$'
    model = Model(rexnet())
    with pytest.raises(UserError, match=f'one backbone to deploy is needed, .* {both}'):
        compare_forms(nn.ModuleList([model, Model()]))
    deploy(model)
    with pytest.raises(UserError, match=r'has: ReXNet \(deployed\)$'):
        compare_forms(model)
    message = 'ShuffleNetV2 has no inference form: CondenseNetV2, .*and ReXNet have one'
    for command in (deploy, compare_forms):
        with pytest.raises(UserError, match=message):
            command(Model(ShuffleNetV2(arch='0.5')))


@pytest.mark.parametrize(
    ('command', 'net', 'method', 'forms'),
    [
        (condense, None, 'condense', "'condensed' differs from 'learned' by"),
        (compare_forms, rexnet, 'switch_to_deploy', "'deployed' differs from 'trained' by"),
    ],
)
def test_small_probe_images_and_forms_that_differ(command, net, method, forms, monkeypatch):
    model = Model(net and net())
    with pytest.raises(UserError, match='at least 32'):
        command(model, size=(8, 8))
    convert = getattr(type(model.backbone), method)

    def wrong(self, **options):
        convert(self, **options)
        next(p for p in self.parameters() if p.dim() == 4).data.mul_(1.1)

    monkeypatch.setattr(type(model.backbone), method, wrong)
    before = model.backbone.form
    with pytest.raises(RuntimeError, match=forms):
        command(model, size=(64, 64))
    assert model.backbone.form == before


def test_deploy_is_imported_on_demand():
    assert mmdense.apis.deploy is deploy
    with pytest.raises(AttributeError, match="'mmdense.apis' has no attribute 'undeploy'"):
        mmdense.apis.undeploy  # noqa: B018


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_comparing_forms_does_not_change_the_model(dtype):
    model = Model(rexnet()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    trained, deployed = compare_forms(model, size=(64, 96))
    assert (trained.form, deployed.form) == ('trained', 'deployed')
    assert (trained.parameters, deployed.parameters) == (count_parameters(model), None)
    assert trained.difference == 0
    assert deployed.difference < 1e-5
    assert trained.macs == backbone_macs(copy.deepcopy(model.backbone).to('meta').eval(), (64, 96))
    assert 0 < deployed.macs <= trained.macs
    assert not trained.not_counted
    assert model.backbone.form == 'trained'
    assert model.backbone.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_products_that_are_not_counted_are_named(monkeypatch):
    forward = ReXNet.forward

    def hidden(self, x):
        torch.mv(x[0, 0], x[0, 0, 0])
        return forward(self, x)

    monkeypatch.setattr(ReXNet, 'forward', hidden)
    costs = compare_forms(Model(rexnet()), size=(64, 64))
    assert [cost.not_counted for cost in costs] == [{'aten::mv': 1}] * 2


@pytest.mark.parametrize(('net', 'form'), [(rexnet, {}), (None, dict(form='condensed'))])
def test_deployed_config(net, form):
    """It loads the deployed weights, and keeps other hooks; the caller's config is not changed."""
    net = Model(net and net()).backbone
    schedule, other = (dict(type=f'mmdense.{name}Hook') for name in ('CondenseSchedule', 'Other'))
    init = dict(type='Pretrained', checkpoint='nowhere.pth')
    hooks = [schedule, other] if form else [other]
    cfg = Config(dict(model=dict(backbone=dict(arch='a', init_cfg=init)), custom_hooks=hooks))
    cfg.update(work_dir='old', launcher='none', resume=True)
    if form:
        net.condense()
    assert deployed_config(cfg, net, 'out.pth').to_dict() == dict(
        model=dict(backbone=dict(arch='a', init_cfg=None, **form)),
        custom_hooks=[other],
        load_from='out.pth',
    )
    assert cfg.custom_hooks == hooks
    assert cfg.model.backbone.init_cfg
