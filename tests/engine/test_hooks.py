"""Channels-last training and compiled backbones."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import HOOKS, MODELS
from torch import nn

import mmdense  # noqa: F401
from mmdense.errors import UserError
from runs import build_runner, loader

RDNET = dict(type='mmdense.RDNet', arch=dict(stem=8, growth=(8, 8), down=(1,), blocks=1))
DENSENET = dict(type='mmdense.DenseNet', arch=dict(growth_rate=4, layers=(1, 2, 1)))
SIDES = (32, 64, 96)


class Tiny(nn.Module):
    out_channels = (8,)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.norm(self.conv(x)).relu(),)


class Classifier(BaseModel):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = MODELS.build(backbone) if backbone else Tiny()
        self.head = nn.Linear(self.backbone.out_channels[-1], 2)

    def forward(self, images, labels, mode):
        logits = self.head(self.backbone(images)[-1].mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return list(logits)


def picture(i):
    """Return an image, in one of three sizes, and its label."""
    generator = torch.Generator().manual_seed(i)
    return torch.randn(3, SIDES[i // 2], 160, generator=generator, dtype=torch.float64), i % 2


DATA = [picture(i) for i in range(2 * len(SIDES))]


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(number=len(results))


def validation():
    return dict(val_dataloader=loader(DATA[:2]), val_cfg=dict(), val_evaluator=dict(type=Metric))


def train(folder, *, backbone=None, iters=3, **options):
    """Train in float64, so that results don't depend on the order of sums."""
    torch.manual_seed(0)
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
    model = Classifier(backbone).double()
    runner = build_runner(folder, model, DATA, iters=iters, optim_wrapper=wrapper, **options)
    runner.train()
    return runner


def in_channels_last(model):
    """Return whether all weights are in channels-last format, if their strides can tell."""
    weights = [p for p in model.parameters() if p.ndim == 4 and p[0, 0].numel() > 1 < p.shape[1]]
    assert weights
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


CHANNELS_LAST = dict(type='mmdense.ChannelsLastHook')
COMPILE = dict(type='mmdense.CompileBackboneHook')


def test_channels_last_changes_only_the_format():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(image)
    HOOKS.build(CHANNELS_LAST).before_run(SimpleNamespace(model=model))
    after = model(image)
    assert not before.is_contiguous(memory_format=torch.channels_last)
    assert after.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after, before)


def test_channels_last_survives_resuming_and_averaging(tmp_path):
    plain = train(tmp_path)
    assert not in_channels_last(plain.model)
    average = EMAHook()
    hooks = [CHANNELS_LAST, average]
    checkpoint = str(tmp_path / 'iter_3.pth')
    for resume in (False, True):
        options = dict(load_from=checkpoint, resume=resume, iters=5, hooks=hooks, **validation())
        runner = train(tmp_path / str(resume), **options)
        assert in_channels_last(runner.model)
        assert in_channels_last(average.ema_model)


@pytest.fixture
def process():
    """A process group of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def step(model, images, labels):
    return model(images, labels, mode='loss')['loss']


def wrapped_run(model, **options):
    """Return a runner with a wrapped model, reduced to what the hook uses."""

    def wrap_model(cfg, model):
        return MMDistributedDataParallel(model, **cfg)

    cfg = dict(model_wrapper_cfg=options)
    return SimpleNamespace(model=wrap_model(options, model), wrap_model=wrap_model, cfg=cfg)


@pytest.mark.parametrize('find_unused_parameters', [False, True])
def test_gradients_of_ddp_in_channels_last(find_unused_parameters, process):
    """They are right from the first iteration: DDP's buckets have the new strides."""
    images, labels = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1])
    gradients = []
    for hook in (None, HOOKS.build(CHANNELS_LAST)):
        torch.manual_seed(0)
        runner = wrapped_run(Classifier().double(), find_unused_parameters=find_unused_parameters)
        if hook:
            hook.before_run(runner)
        assert in_channels_last(runner.model.module) == bool(hook)
        assert runner.model.find_unused_parameters == find_unused_parameters
        gradients.append([])
        for _ in range(3):
            runner.model.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings('error', 'Grad strides do not match')
                step(runner.model, images, labels).backward()
            gradients[-1].append([p.grad.clone() for p in runner.model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.fixture
def runs(monkeypatch):
    """Compile with a fast backend; return a list of all graphs that ran forward."""
    from torch._dynamo.backends.debugging import aot_eager

    executed = []

    def backend(graph, inputs):
        compiled = aot_eager(graph, inputs)

        def run(*args):
            executed.append(graph)
            return compiled(*args)

        return run

    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        'compile',
        lambda self, **options: compile(self, backend=backend, **options),
    )
    torch._dynamo.reset()
    return executed


class CountGraphs(Hook):
    """Count the graphs that ran in each phase."""

    priority = 'LOWEST'

    def __init__(self, executed):
        self.executed, self.count = executed, dict(train=[], val=[])

    def _begin(self, runner, **_):
        self.before = len(self.executed)

    before_train_iter = before_val_epoch = _begin

    def after_train_iter(self, runner, **_):
        self.count['train'].append(len(self.executed) - self.before)

    def after_val_epoch(self, runner, **_):
        self.count['val'].append(len(self.executed) - self.before)


def check_compiled(folder, runs, backbone=None):
    counts = CountGraphs(runs)
    options = dict(backbone=backbone, iters=5, **validation())
    compiled = train(folder, hooks=[COMPILE, counts, EMAHook()], **options)
    assert counts.count == dict(train=[1] * 5, val=[0] * 3)
    assert len(set(map(id, runs))) == 2  # one for the first size, one with dynamic shapes
    plain = train(folder / 'plain', hooks=[EMAHook()], **options)
    assert len(runs) == 5
    expected = plain.model.state_dict()
    assert compiled.model.state_dict().keys() == expected.keys()
    for name, value in compiled.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8)
    return compiled, plain


def test_compiled_backbone_trains_like_the_plain_one(runs, tmp_path):
    compiled, plain = check_compiled(tmp_path, runs)
    checkpoint = torch.load(tmp_path / 'iter_5.pth', weights_only=False)
    plain.model.load_state_dict(checkpoint['state_dict'])
    compiled.model(*next(iter(compiled.train_dataloader)), mode='loss')
    assert len(runs) == 5  # training has ended


@pytest.mark.slow
@pytest.mark.parametrize('backbone', [RDNET, DENSENET], ids=lambda b: b['type'])
@pytest.mark.parametrize('with_cp', [False, True], ids=['', 'with_cp'])
def test_compiled_backbones_count_each_batch_once(backbone, with_cp, runs, tmp_path):
    check_compiled(tmp_path, runs, {**backbone, 'with_cp': with_cp})


def test_teacher_and_student_are_compiled(runs):
    model = nn.ModuleDict(dict(teacher=Classifier(), student=Classifier()))
    hook = HOOKS.build(COMPILE)
    hook.before_train(SimpleNamespace(model=model))
    for part in model.values():
        part.backbone(torch.randn(1, 3, 32, 64))
    assert len(runs) == 2


def test_compiled_backbone_in_ddp(process, runs):
    wrapped = MMDistributedDataParallel(Classifier())
    HOOKS.build(COMPILE).before_train(SimpleNamespace(model=wrapped))
    for side in SIDES:
        wrapped.zero_grad()
        step(wrapped, torch.randn(2, 3, side, 160), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None for p in wrapped.parameters())
    assert len(runs) == len(SIDES)


def test_nothing_to_compile():
    with pytest.raises(UserError, match='^Linear has no backbone to compile$'):
        HOOKS.build(COMPILE).before_train(SimpleNamespace(model=nn.Linear(2, 2)))


@pytest.mark.slow
def test_inductor_code_trains_like_the_plain_one(tmp_path):
    torch._dynamo.reset()
    runners = [
        train(tmp_path / str(len(hooks)), backbone=RDNET, hooks=hooks, iters=2)
        for hooks in ([COMPILE], [])
    ]
    losses = [r.message_hub.get_scalar('train/loss')._log_history for r in runners]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
