"""The terminal of the tools, and configs of installed packages."""

import importlib
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger, print_log
from pycocotools.coco import COCO

from mmdense import cli
from mmdense.config.read import load_config
from mmdense.errors import UserError
from mmdense.patches import SILENCED, find_config, quiet_terminal
from support import DEMOS

METRICS = 'Epoch(val) [1][25/25]    coco/bbox_mAP: 0.5000  coco/bbox_mAP_l: -1.0000  time: 0.1'
MESSAGES = (  # package, level, message, and whether the terminal shows it
    ('mmengine.runner', 'INFO', 'Config:\nmodel = dict()', False),
    ('mmengine.hooks', 'INFO', METRICS, True),
    ('mmengine.hooks', 'INFO', 'Epoch(test) [ 5/25]    eta: 0:00:10', True),
    ('mmengine.hooks', 'INFO', METRICS.replace('val', 'test'), False),  # tools/test.py has a table
    ('mmdet.evaluation', 'INFO', '\n+-------+\n| class |', True),
    ('mmdet.models', 'WARNING', 'something is wrong', True),
    ('mmpretrain.datasets', 'INFO', 'Could not import OneDL', False),
    ('mmengine.fileio', 'WARNING', SILENCED[-1], False),
    ('mmdense.weights', 'INFO', 'from the checkpoint', True),
    ('mmdet_hooks', 'INFO', "a user's hook", True),
)


@pytest.mark.parametrize('direct', [True, False])
def test_the_terminal_is_short_and_the_log_file_complete(direct, tmp_path, capsys):
    with quiet_terminal():
        logger = MMLogger(f'short-{direct}', log_file=str(tmp_path / 'x.log'))
        for package, level, message, _ in MESSAGES:
            code = 'logger.log(level, message)' if direct else 'print_log(message, logger, level)'
            level = getattr(logging, level)
            names = dict(__name__=package, logger=logger, level=level, message=message)
            exec(code, dict(names, print_log=print_log))
    output, log = capsys.readouterr().out, (tmp_path / 'x.log').read_text()
    for *_, message, shown in MESSAGES:
        assert (message.replace('-1.0000', '-') in output) == shown, message
        assert message in log
    assert '-1.0000' not in output


def test_what_pycocotools_prints_is_logged(tmp_path, capsys):
    with quiet_terminal():
        MMLogger.get_instance(str(tmp_path), log_file=str(tmp_path / 'x.log'))
        COCO().createIndex()
    assert capsys.readouterr().out == ''
    assert 'index created!' in (tmp_path / 'x.log').read_text()
    COCO().createIndex()
    assert 'index created!' in capsys.readouterr().out


def test_warnings_of_libraries_are_silenced_by_name():
    with warnings.catch_warnings(record=True) as caught:
        importlib.reload(cli)  # pytest has removed its filters
        for text in (*SILENCED, 'faster_coco_eval fails'):
            warnings.warn(f'{text}: more')
    assert [str(warning.message) for warning in caught] == ['faster_coco_eval fails: more']


# Configs of installed packages

DEMO = DEMOS['detection']
NAME = f'mmdense::detection/demo/{DEMO.name}'


def test_installed_configs_have_names(tmp_path):
    assert find_config(NAME).samefile(DEMO)
    assert find_config('configs/x.py') == Path('configs/x.py')
    assert load_config(NAME).work_dir == f'work_dirs/{DEMO.stem}'
    assert load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model.type == 'RetinaNet'
    with pytest.raises(UserError, match=f'no config {NAME}x; did you mean .*{DEMO.name}'):
        load_config(f'{NAME}x')
    assert get_config(NAME).model == Config.fromfile(DEMO).model


@pytest.mark.parametrize(
    ('base', 'scope'),
    [
        (NAME, 'mmdet'),
        ('mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet'),
        pytest.param(
            'mmseg::_base_/models/upernet_r50.py',
            'mmseg',
            marks=pytest.mark.skipif(not find_spec('mmseg'), reason='needs mmseg'),
        ),
        ('mmdense::segmentation/demo/' + DEMOS['segmentation'].name, None),
    ],
)
def test_bases_of_installed_packages(base, scope, tmp_path):
    (tmp_path / 'own.py').write_text(f'_base_ = {base!r}\n')
    cfg = Config.fromfile(tmp_path / 'own.py')
    assert cfg.model.get('_scope_') == scope
    if base.startswith('mmdense'):  # as if it inherited the file
        assert cfg.to_dict() == Config.fromfile(find_config(base)).to_dict()
