"""Config files as the tools read them."""

import pytest
from mmengine.config import Config

from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

COCO = str(ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py')


def test_work_dir_and_options():
    cfg = load_config(COCO, options={'model.backbone.arch': 'small'})
    assert cfg.work_dir == 'work_dirs/faster-rcnn_rdnet-t_fpn_1x_coco'
    assert cfg.model.backbone.arch == 'small'
    assert load_config(COCO, work_dir='elsewhere').work_dir == 'elsewhere'


@pytest.mark.parametrize('path', [COCO, *map(str, DEMOS.values())])
def test_data_root_moves_every_path(path):
    cfg = load_config(path, options=dict(data_root='/big/disk'))
    old = Config.fromfile(path).data_root
    assert old not in cfg.pretty_text
    assert cfg.train_dataloader.dataset.data_root == '/big/disk/'
    assert cfg.test_dataloader.dataset.data_root == '/big/disk/'
    if 'ann_file' in cfg.val_evaluator:
        assert cfg.val_evaluator.ann_file.startswith('/big/disk/annotations/')


def test_data_root_moves_folders_not_prefixes(tmp_path):
    file = tmp_path / 'leaf.py'
    file.write_text(
        "model = dict(type='SGD')\ndata_root = 'data/ade'\n"
        "paths = ('data/ade', 'data/ade/x.json', 'data/ade_more/x.json')\n"
    )
    cfg = load_config(str(file), options=dict(data_root='/new/'))
    assert cfg.paths == ('/new', '/new/x.json', 'data/ade_more/x.json')
    assert cfg.data_root == '/new'


@pytest.mark.parametrize(
    ('path', 'options', 'message'),
    [
        ('mmdet::_base_/models/retinanet_r50_fpn.py', dict(data_root='x'), 'has no data_root'),
        (COCO, dict(data_root=''), 'data_root is empty'),
        (COCO.replace('rdnet-t', 'rdnet-tiny'), {}, 'did you mean .*faster-rcnn_rdnet-t_fpn_1x_c'),
        (str(ROOT / 'configs/detection/_base_/coco_adamw-1x.py'), {}, 'has no model'),
    ],
)
def test_errors(path, options, message):
    with pytest.raises(UserError, match=message):
        load_config(path, options=options)
