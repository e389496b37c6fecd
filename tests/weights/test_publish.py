"""Publishing: which weights are taken, how they are stored, named, and what is left out.

The averages are those of mmengine's own EMAHook, in runs of two iterations.
"""

import copy
import hashlib
import os

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import nn

from checkpoints import assert_same, error_of, make_runner, short_runs  # noqa: F401
from mmdense.weights.files import read_checkpoint
from mmdense.weights.publish import publish

META = dict(cfg='model = dict()', epoch=3, dataset_meta=dict(classes=['a', 'b']))
every_suffix = pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)  # the norm would leave no gradient to one
        self.norm = nn.BatchNorm2d(2)

    def forward(self, images, mode='tensor'):
        x = self.norm(self.conv(images))
        return dict(loss=(x - 1).abs().mean()) if mode == 'loss' else x


class Look(Hook):
    """Keep the model and its average as they are after the last iteration."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
        self.trained = copy.deepcopy(runner.model.state_dict())
        self.average = copy.deepcopy(hook.ema_model.module.state_dict())


@pytest.fixture
def train(tmp_path, short_runs):  # noqa: F811
    """Return a function that trains with an average: (checkpoint, trained, average)."""

    def run(update_buffers):
        torch.manual_seed(0)
        look = Look()
        ema = dict(type='EMAHook', momentum=0.1, update_buffers=update_buffers)
        data = [dict(images=image) for image in torch.randn(8, 1, 6, 6)]
        make_runner(tmp_path / 'run', Net(), data, hooks=[ema, look]).train()
        return tmp_path / 'run/iter_2.pth', look.trained, look.average

    return run


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    return folder


def save(folder, content, name='checkpoint.pth'):
    torch.save(content, folder / name)
    return folder / name


def checkpoint(**more):
    torch.manual_seed(1)
    return dict(state_dict=Net().state_dict(), meta=dict(META), **more)


def check_fails(message, folder, *args, **options):
    before = sorted(folder.iterdir())
    assert message in error_of(publish, *args, **options)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(('update_buffers', 'suffix'), [(False, '.pth'), (True, '.safetensors')])
def test_averages(update_buffers, suffix, train, out):
    file, trained, average = train(update_buffers)
    differ = {name for name in trained if not torch.equal(trained[name], average[name])}
    buffers = {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}
    assert differ == set(dict(Net().named_parameters())) | (buffers if update_buffers else set())
    done = publish(file, out / f'model{suffix}')
    assert (done.tensors, done.halves) == (len(average), 0)
    left_out = {'message_hub', 'optimizer', 'param_schedulers', 'ema_state_dict'}
    assert set(done.left_out) == left_out
    content = read_checkpoint(done.file)
    assert set(content) == {'state_dict', 'meta'}
    assert_same(content['state_dict'], average)
    assert content['meta']['iter'] == 2
    assert done.before == file.stat().st_size > done.after == done.file.stat().st_size
    net = Net()
    load_checkpoint(net, str(done.file), strict=True)
    assert_same(net.state_dict(), average)
    assert list(out.iterdir()) == [done.file]


@every_suffix
def test_meta_and_bare_state_dicts(suffix, tmp_path, out):
    content = checkpoint(optimizer=dict(state={}))
    content['meta']['hook_msgs'] = dict(best=1)
    done = publish(save(tmp_path, content), out / f'model{suffix}')
    assert read_checkpoint(done.file)['meta'] == META
    assert done.left_out == ('optimizer', 'meta.hook_msgs')
    weights = content['state_dict']
    done = publish(save(tmp_path, weights), out / f'bare{suffix}')
    content = read_checkpoint(done.file)
    assert_same(content['state_dict'], weights)
    assert content['meta'] == {}
    assert done.left_out == ()
    # A published file can be a source.
    again = publish(done.file, out / 'again.pth')
    assert_same(read_checkpoint(again.file)['state_dict'], weights)


@every_suffix
def test_half(suffix, tmp_path, out):
    halved = dict(
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
    file = save(tmp_path, dict(state_dict={**halved, **kept}))
    done = publish(file, out / f'model{suffix}', half=True)
    assert done.halves == len(halved)
    weights = read_checkpoint(done.file)['state_dict']
    assert weights['infinite'].isnan().tolist() == [[False, True]]
    halved['infinite'][0, 1] = weights['infinite'][0, 1] = 0.0  # NaN is not equal to itself
    assert_same(weights, {**{k: v.half() for k, v in halved.items()}, **kept})
    assert publish(file, out / f'full{suffix}').halves == 1  # as it is
    # A model takes them.
    expected = checkpoint()['state_dict']
    done = publish(save(tmp_path, checkpoint()), out / f'net{suffix}', half=True)
    net = Net()
    load_checkpoint(net, str(done.file), strict=True)
    assert not torch.equal(net.conv.weight, expected['conv.weight'])
    expected['conv.weight'] = expected['conv.weight'].half().float()
    assert_same(net.state_dict(), expected)


@every_suffix
def test_the_name_is_that_of_the_content(suffix, tmp_path, out):
    file = save(tmp_path, checkpoint())
    target = out / f'model.pth.v2{suffix}'
    done = publish(file, target)
    digits = hashlib.sha256(done.file.read_bytes()).hexdigest()[:8]
    assert done.file == out / f'model.pth.v2-{digits}{suffix}'
    assert torch.hub.HASH_REGEX.search(done.file.name)[1] == digits
    assert not done.existed
    # The content depends neither on the time nor on the name.
    done.file.touch()
    written = done.file.stat().st_mtime_ns
    for _ in range(8):  # safetensors would write several entries of metadata in any order
        again = publish(file, target)
        assert again.existed
        assert again.file == done.file
    assert done.file.stat().st_mtime_ns == written
    assert list(out.iterdir()) == [done.file]
    assert publish(file, out / f'other{suffix}').file == out / f'other-{digits}{suffix}'
    done.file.write_bytes(b'cut off')
    check_fails(f'{done.file} exists already with other content', out, file, target)
    assert done.file.read_bytes() == b'cut off'


def test_sources_that_cannot_be_published(tmp_path, out):
    target = out / 'model.pth'
    check_fails('no file', out, tmp_path / 'none.pth', target)
    file = save(tmp_path, checkpoint())
    file = save(tmp_path, dict(model=checkpoint()['state_dict']))
    check_fails('model in it is not a tensor', out, file, target)
    for content in ({}, dict(state_dict={}), dict(state_dict=[1])):
        check_fails('holds no weights', out, save(tmp_path, content), target)


def test_targets_that_cannot_be_written(tmp_path, out, monkeypatch):
    file = save(tmp_path, checkpoint())
    for name in ('model.bin', 'model', '.pth', 'model.pth.tar'):
        check_fails(f'{name} must end in .pth or .safetensors', out, file, out / name)
    check_fails('no folder', tmp_path, file, tmp_path / 'none/model.pth')

    def fail(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    check_fails('No space left on device', out, file, out / 'model.pth')


def test_the_command(call_tool, tmp_path, out):
    content = checkpoint(optimizer=dict(state={}))
    content['state_dict']['conv.weight'][0, 0, 0, 0] = 1e6
    content['state_dict']['other'] = torch.ones(300, 1000)
    ema = {f'module.{name}': value for name, value in content['state_dict'].items()}
    file = save(tmp_path, dict(**content, ema_state_dict=ema))
    command = ('publish_model', file, out / '[red]model.safetensors', '--half')
    status, output, _ = call_tool(*command)
    (written,) = out.iterdir()
    assert (status, output.splitlines()) == (
        0,
        [
            f'{written}',
            f'size: {file.stat().st_size / 1e6:.2f} MB before, 0.60 MB after',
            'tensors: 7, 1 of them float16',
            'weights: the moving average',
            'left out: optimizer, ema_state_dict',
        ],
    )
    assert call_tool(*command)[1].splitlines()[0] == f'{written} (exists already)'
    status, _, error = call_tool('publish_model', tmp_path / 'none.pth', out / 'model.pth')
    assert (status, error) == (2, f'error: no file {tmp_path / "none.pth"}\n')
