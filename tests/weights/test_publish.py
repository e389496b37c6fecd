"""Publishing weights: which ones, how they are stored, what the file is called, what is left out.

The average comes from mmengine's own hook, in runs of two iterations.
"""

import copy
import hashlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from mmdense.errors import UserError
from mmdense.weights import publish as module
from mmdense.weights.files import read_checkpoint
from mmdense.weights.publish import publish

TOOL = Path(__file__).parents[2] / 'tools/publish_model.py'
SUFFIXES = ['.pth', '.safetensors']
META = dict(cfg='model = dict()', epoch=3, dataset_meta=dict(classes=['a', 'b']))
NUMBERS = itertools.count()


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)  # the norm would leave no gradient to one
        self.norm = nn.BatchNorm2d(2)

    def forward(self, images, mode='tensor'):
        x = self.norm(self.conv(images))
        return dict(loss=(x - 1).abs().mean()) if mode == 'loss' else x


class Look(Hook):
    """Keep what the model and its average hold after the last iteration."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
        self.trained = copy.deepcopy(runner.model.state_dict())
        self.average = copy.deepcopy(hook.ema_model.module.state_dict())


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Return a function that trains with an average: (checkpoint, trained, average)."""
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)

    def run(update_buffers):
        torch.manual_seed(0)
        look = Look()
        ema = dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers)
        data = [dict(images=image) for image in torch.randn(8, 1, 6, 6)]
        folder = tmp_path / 'run'
        Runner(
            model=Net(),
            work_dir=str(folder),
            experiment_name=f'publish-{next(NUMBERS)}',
            train_dataloader=dict(
                dataset=data,
                sampler=dict(type=InfiniteSampler, shuffle=False),
                batch_size=4,
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.5, momentum=0.9)),
            param_scheduler=dict(type='ConstantLR', by_epoch=False),
            custom_hooks=[ema, look],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
            log_processor=dict(by_epoch=False),
        ).train()
        return folder / 'iter_2.pth', look.trained, look.average

    yield run
    DefaultScope._instance_dict.clear()


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    return folder


def save(folder, held, name='checkpoint.pth'):
    torch.save(held, folder / name)
    return folder / name


def checkpoint(**more):
    torch.manual_seed(1)
    return dict(state_dict=Net().state_dict(), meta=dict(META), **more)


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def assert_fails(said, folder, *args, **options):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as error:
        publish(*args, **options)
    assert said in str(error.value)
    assert '\n' not in str(error.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('update_buffers', [False, True])
def test_average_and_trained_weights(update_buffers, suffix, train, out):
    file, trained, average = train(update_buffers)
    differ = {name for name in trained if not torch.equal(trained[name], average[name])}
    buffers = {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}
    assert differ == set(dict(Net().named_parameters())) | (buffers if update_buffers else set())
    for averaged, expected in ((True, average), (False, trained)):
        done = publish(file, out / f'model{suffix}', averaged=averaged)
        assert done.weights == ('average' if averaged else 'trained')
        assert done.tensors == len(expected)
        assert done.halves == 0
        assert set(done.left_out) == {
            'message_hub',
            'optimizer',
            'param_schedulers',
            'ema_state_dict',
        }
        held = read_checkpoint(done.file)
        assert set(held) == {'state_dict', 'meta'}
        assert_same(held['state_dict'], expected)
        assert held['meta']['iter'] == 2
        assert done.before == file.stat().st_size > done.after == done.file.stat().st_size
        net = Net()
        load_checkpoint(net, str(done.file), strict=True)
        assert_same(net.state_dict(), expected)
    assert len(list(out.iterdir())) == 2


def test_what_the_average_lacks_is_trained(tmp_path, out):
    """The hook exchanges only what both have."""
    held = checkpoint()
    other = {f'module.{k}': v + 1 for k, v in held['state_dict'].items() if k != 'norm.weight'}
    file = save(tmp_path, dict(**held, ema_state_dict=dict(steps=torch.tensor(2), **other)))
    got = read_checkpoint(publish(file, out / 'model.pth', averaged=False).file)['state_dict']
    assert_same(got, {k: v if k == 'norm.weight' else v + 1 for k, v in held['state_dict'].items()})


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_meta_is_kept(suffix, tmp_path, out):
    held = checkpoint(optimizer=dict(state={}))
    held['meta']['hook_msgs'] = dict(best=1)
    done = publish(save(tmp_path, held), out / f'model{suffix}')
    assert read_checkpoint(done.file)['meta'] == META
    assert done.left_out == ('optimizer', 'meta.hook_msgs')
    assert done.weights == 'only'


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_bare_state_dicts(suffix, tmp_path, out):
    expected = checkpoint()['state_dict']
    done = publish(save(tmp_path, expected), out / f'model{suffix}')
    held = read_checkpoint(done.file)
    assert_same(held['state_dict'], expected)
    assert held['meta'] == {}
    assert done.left_out == ()
    # A published file is a source again.
    again = read_checkpoint(publish(done.file, out / 'again.pth').file)
    assert_same(again['state_dict'], expected)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_half(suffix, tmp_path, out):
    whole = dict(
        matrix=torch.tensor([[0.1, 65504.0]]),
        double=torch.full((2, 1, 3), 0.3, dtype=torch.float64),
        infinite=torch.tensor([[float('-inf'), float('nan')]]),
        rounded=torch.tensor([[65519.0]]),  # to 65504, the largest
        half=torch.ones(2, 2, dtype=torch.float16),
    )
    kept = dict(
        large=torch.tensor([[0.1, 65520.0]]),
        negative=torch.tensor([[0.1], [-1e30]]),
        brain=torch.full((2, 2), 1e30, dtype=torch.bfloat16),
        vector=torch.tensor([0.1, 0.2]),
        scalar=torch.tensor(0.1),
        integers=torch.arange(4).view(2, 2),
        flags=torch.ones(2, 2, dtype=torch.bool),
    )
    file = save(tmp_path, dict(state_dict={**whole, **kept}))
    done = publish(file, out / f'model{suffix}', half=True)
    assert done.halves == len(whole)
    assert done.overflowing == ('large', 'negative', 'brain')
    got = read_checkpoint(done.file)['state_dict']
    nan = got['infinite'].isnan()
    assert nan.tolist() == [[False, True]]
    whole['infinite'][0, 1] = got['infinite'][0, 1] = 0.0  # no NaN is equal to itself
    assert_same(got, {**{k: v.half() for k, v in whole.items()}, **kept})
    assert publish(file, out / f'full{suffix}').overflowing == ()


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_halves_fit_the_model(suffix, tmp_path, out):
    file = save(tmp_path, checkpoint())
    done = publish(file, out / f'model{suffix}', half=True)
    net = Net()
    load_checkpoint(net, str(done.file), strict=True)
    expected = checkpoint()['state_dict']
    assert not torch.equal(net.conv.weight, expected['conv.weight'])
    expected['conv.weight'] = expected['conv.weight'].half().float()
    assert_same(net.state_dict(), expected)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_the_name_is_that_of_the_content(suffix, tmp_path, out):
    file = save(tmp_path, checkpoint())
    done = publish(file, out / f'model.pth.v2{suffix}')
    digits = hashlib.sha256(done.file.read_bytes()).hexdigest()[:8]
    assert done.file == out / f'model.pth.v2-{digits}{suffix}'
    assert torch.hub.HASH_REGEX.search(done.file.name)[1] == digits
    assert not done.existed
    # Neither a second time nor another name gives another content.
    done.file.touch()
    written = done.file.stat().st_mtime_ns
    for _ in range(8):  # safetensors would write several entries of metadata in any order
        again = publish(file, out / f'model.pth.v2{suffix}')
        assert again.existed
        assert again.file == done.file
    assert done.file.stat().st_mtime_ns == written
    assert list(out.iterdir()) == [done.file]
    assert publish(file, out / f'other{suffix}').file == out / f'other-{digits}{suffix}'
    done.file.write_bytes(b'cut off')
    assert_fails(f'{done.file} is there already', out, file, out / f'model.pth.v2{suffix}')
    assert done.file.read_bytes() == b'cut off'


def test_sources_that_cannot_be_published(tmp_path, out):
    target = out / 'model.pth'
    empty = tmp_path / 'empty.pth'
    empty.touch()
    assert_fails('empty.pth is empty (0 bytes)', out, empty, target)
    assert_fails('no file', out, tmp_path / 'none.pth', target)
    file = save(tmp_path, checkpoint())
    assert_fails('checkpoint.pth holds no average', out, file, target, averaged=False)
    # Not as the hook writes it: without its prefix.
    file = save(tmp_path, checkpoint(ema_state_dict=checkpoint()['state_dict']))
    for averaged in (True, False):
        assert_fails("not of mmengine's EMAHook", out, file, target, averaged=averaged)
    file = save(tmp_path, dict(model=checkpoint()['state_dict']))
    assert_fails('model in it is no tensor', out, file, target)
    for held in ({}, dict(state_dict={}), dict(state_dict=[1])):
        assert_fails('holds no weights', out, save(tmp_path, held), target)


def test_targets_that_cannot_be_written(tmp_path, out):
    file = save(tmp_path, checkpoint())
    for name in ('model.bin', 'model', '.pth', 'model.pth.tar'):
        assert_fails(f'{name} must end in .pth or .safetensors', out, file, out / name)
    assert_fails('no folder', tmp_path, file, tmp_path / 'none/model.pth')
    assert_fails("would take 'b' in rdnet-b.v2.pth", out, file, out / 'rdnet-b.v2.pth')


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('error', [OSError(28, 'No space left'), RuntimeError('fail\nat')])
def test_failures_leave_nothing(error, suffix, monkeypatch, tmp_path, out):
    file = save(tmp_path, checkpoint())

    def fail(file, state_dict, meta):
        file.write_bytes(b'begun')
        assert len(list(out.iterdir())) == 1
        raise error

    monkeypatch.setattr(module, 'write_checkpoint', fail)
    assert_fails(f'{out} cannot be written to, or is full', out, file, out / f'model{suffix}')
    error = KeyboardInterrupt()  # what fail raises from here on
    with pytest.raises(KeyboardInterrupt):
        publish(file, out / f'model{suffix}')
    assert not list(out.iterdir())


@pytest.mark.slow
def test_the_command(run_tool, tmp_path, out):
    held = checkpoint(optimizer=dict(state={}))
    held['state_dict']['conv.weight'][0, 0, 0, 0] = 1e6
    held['state_dict']['other'] = torch.ones(300, 1000)
    other = {f'module.{name}': value for name, value in held['state_dict'].items()}
    file = save(tmp_path, dict(**held, ema_state_dict=other))
    command = (sys.executable, TOOL, file, out / '[red]model.safetensors', '--no-ema', '--half')
    status, said = run_tool(*command)
    assert status == 0, said
    (written,) = out.iterdir()
    lines = [
        f'{written}',
        f'size: {file.stat().st_size / 1e6:.2f} MB before, 0.60 MB after',
        'tensors: 7, 1 of them float16',
        'weights: as they were trained, not the average',
        'left out: optimizer, ema_state_dict',
        'too large for float16, left as they were: conv.weight',
    ]
    assert said.splitlines()[-6:] == lines
    assert run_tool(*command)[1].splitlines()[-6] == f'{written} (was there already)'
    status, said = run_tool(sys.executable, TOOL, tmp_path / 'none.pth', out / 'model.pth')
    assert status == 2
    assert said.splitlines()[-1] == f'error: no file {tmp_path / "none.pth"}'
