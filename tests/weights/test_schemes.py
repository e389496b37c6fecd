"""The checkpoint schemes ``timm://`` and ``condensenetv2://``, and safe loading."""

import argparse
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader

import mmdense  # noqa: F401
from mmdense.errors import UserError
from mmdense.weights.files import allow_training_state

INIT = dict(type='Pretrained', checkpoint='timm://rdnet_tiny.nv_in1k')


def test_weights_come_from_timm(monkeypatch):
    torch.manual_seed(0)
    published = timm.create_model('rdnet_tiny')
    expected = {k: v for k, v in published.state_dict().items() if not k.startswith('head.')}
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return published

    monkeypatch.setattr(timm, 'create_model', create_model)
    net = MODELS.build(dict(type='mmdense.RDNet', init_cfg=INIT))
    net.init_weights()
    # With its classifier: without, timm would not look whether all weights are there.
    assert asked == [('rdnet_tiny.nv_in1k', dict(pretrained=True, pretrained_cfg_overlay=None))]
    assert net.state_dict().keys() == expected.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name


SCRATCH = '(To train from scratch: --cfg-options model.backbone.init_cfg=None)'


def test_without_network_training_stops(monkeypatch, tmp_path):
    def create_model(name, **options):
        raise OSError('cannot reach the hub\nand much more')

    monkeypatch.setattr(timm, 'create_model', create_model)
    net = MODELS.build(dict(type='mmdense.RDNet', init_cfg=INIT))
    with pytest.raises(UserError) as error:
        net.init_weights()
    assert str(error.value) == (
        'timm://rdnet_tiny.nv_in1k could not be downloaded (OSError: cannot reach the hub): get '
        'model.safetensors of naver-ai/rdnet_tiny.nv_in1k from the Hugging Face hub, and put it as '
        'rdnet_tiny.nv_in1k.safetensors into a folder of yours that the variable MMDENSE_WEIGHTS '
        f'names {SCRATCH}'
    )


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        (
            'rdnet_tiny.nope',
            'timm has no weights named rdnet_tiny.nope; did you mean timm://rdnet_t',
        ),
        ('rdnet_tinny.nv_in1k', 'did you mean timm://rdnet_tiny.nv_in1k?'),
    ],
)
def test_unknown_weights(name, hint):
    with pytest.raises(UserError) as error:
        CheckpointLoader.load_checkpoint(f'timm://{name}')
    assert hint in str(error.value)


def test_training_state_loads_safely(tmp_path):
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    file = tmp_path / 'x.pth'
    torch.save(dict(message_hub=dict(loss=buffer), lr=np.float64(0.5)), file)
    allow_training_state()
    state = torch.load(file, weights_only=True)
    assert state['message_hub']['loss'].statistics('max') == 3
    assert state['lr'] == 0.5


class Attack:
    def __reduce__(self):
        return getattr, (int, 'from_bytes')


def test_getattr_stays_forbidden(tmp_path):
    allow_training_state()
    file = tmp_path / 'x.pth'
    torch.save(Attack(), file)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


RESULTS = 'https://github.com/jianghaojun/CondenseNetV2#results'


def load_condensenetv2(file):
    return CheckpointLoader.load_checkpoint(f'condensenetv2://{file}')


def test_a_missing_condensenetv2_says_where_it_is(tmp_path):
    init = dict(type='Pretrained', checkpoint='condensenetv2://weights/a.pth.tar')
    net = MODELS.build(dict(type='mmdense.CondenseNetV2', arch='a', init_cfg=init))
    with pytest.raises(UserError) as error:
        net.init_weights()
    assert str(error.value) == (
        'condensenetv2://weights/a.pth.tar: no file weights/a.pth.tar: download the model that is '
        f'linked in {RESULTS} {SCRATCH}'
    )
    with pytest.raises(UserError, match='no file'):
        load_condensenetv2(tmp_path)


def test_condensenetv2_in_the_user_s_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('MMDENSE_WEIGHTS', str(tmp_path))
    (tmp_path / 'a.pth.tar').write_bytes(b'')
    with pytest.raises(UserError, match=f'{tmp_path}/a.pth.tar is empty'):
        load_condensenetv2('weights/a.pth.tar')


class Execution:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize('place', ['state_dict', 'args', 'inside args'])
def test_condensenetv2_executes_nothing(place, tmp_path):
    attack = Execution(tmp_path / 'executed')
    held = dict(args=argparse.Namespace(x=attack)) if 'inside' in place else {place: attack}
    torch.save(held, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=r'holds more than weights \(posix.mkdir\)'):
        load_condensenetv2(tmp_path / 'x.pth')
    assert not (tmp_path / 'executed').exists()


def test_arguments_are_allowed_for_that_load_only(tmp_path):
    file = tmp_path / 'x.pth'
    torch.save(dict(state_dict={}, args=argparse.Namespace(lr=0.1)), file)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(UserError) as error:
        load_condensenetv2(file)  # read, and found to hold nothing of it
    assert str(error.value).startswith(f'{file} is no model of {RESULTS}: ')
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before
    with pytest.raises(pickle.UnpicklingError, match='Namespace'):
        torch.load(file, weights_only=True)
    torch.serialization.add_safe_globals([argparse.Namespace])
    with pytest.raises(UserError):
        load_condensenetv2(file)
    allowed = torch.serialization.get_safe_globals()  # as someone else allowed it
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(before))
    assert argparse.Namespace in allowed
