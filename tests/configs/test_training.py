"""Every recipe trains two iterations on demo data, and predicts."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdense.config.read import load_config
from mmdense.engine.runner import build_runner
from support import ROOT

RECIPES = sorted(
    p for p in ROOT.glob('configs/*/*/*.py') if p.parent.name not in ('_base_', 'demo')
)
SIDE = 64
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _scope():
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='session')
def depth_data(project):
    """The demo's images with depths, in metres: the farther, the larger the label."""
    import cv2

    root = project / 'data/nyu'
    for split, size in (('train', (192, 192)), ('test', (640, 480))):
        for folder in ('images', 'annotations'):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(sorted((project / 'data/digits/train').glob('*.jpg'))[:2]):
            labels = cv2.imread(str(project / f'data/digits/semantic/train/{file.stem}.png'), -1)
            image = cv2.resize(cv2.imread(str(file)), size)
            depths = cv2.resize(labels.astype('uint16') * 500 + 1000, size)
            cv2.imwrite(str(root / f'images/{split}/kitchen_{i:04}.jpg'), image)
            cv2.imwrite(str(root / f'annotations/{split}/kitchen_{i:04}.png'), depths)
    return root


def replace(node, key, old, new):
    """Replace values of a key anywhere in a config."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            replace(child, key, old, new)
    if isinstance(node, dict) and node.get(key) == old:
        node[key] = new


def shrink(cfg, project, depth_data):
    """Put the demo's data in place of the config's, few RoIs, and two iterations without a test."""
    load, pack = dict(type='LoadImageFromFile'), cfg.train_pipeline[-1]
    resize = dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=True)
    if cfg.model.type == 'DepthEstimator':
        dataset = cfg.train_dataloader.dataset
        dataset.data_root = str(depth_data)
        dataset.pipeline[3].crop_size = (SIDE, SIDE)
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
    else:
        task = dict(mmdet='detection', mmseg='segmentation')[cfg.default_scope]
        base = Config.fromfile(ROOT / f'configs/{task}/_base_/digits_{task}.py')
        dataset = base.train_dataloader.dataset
        dataset.data_root = str(project / 'data/digits')
        truth = dict(type='LoadAnnotations')
        if task == 'detection':
            truth.update(with_bbox=True, with_mask='mask' in str(cfg.model.get('roi_head')))
            replace(cfg.model, 'num_classes', 80, 10)
        else:
            replace(cfg.model, 'num_classes', 150, len(base.metainfo.classes))
            cfg.model.data_preprocessor.size = (SIDE, SIDE)
        dataset.pipeline = [load, truth, resize, pack]
    loader = cfg.train_dataloader
    loader.dataset, loader.batch_size, loader.num_workers = dataset, 2, 0
    loader.persistent_workers = False
    replace(cfg.model, 'num', 512, 32)
    replace(cfg.model, 'max_per_img', 1000, 50)
    cfg.model.backbone.init_cfg = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=10)
    for part in ('val', 'test'):
        cfg.update({f'{part}_cfg': None, f'{part}_dataloader': None, f'{part}_evaluator': None})
    cfg.default_hooks.checkpoint = None
    cfg.randomness = dict(seed=0)


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_two_iterations_and_a_prediction(path, project, depth_data, tmp_path):
    cfg = load_config(str(path), work_dir=str(tmp_path))
    shrink(cfg, project, depth_data)
    runner = build_runner(cfg, loaders=('train',))
    model = runner.train().eval()
    assert runner.iter == 2
    losses = runner.message_hub.get_scalar('train/loss')
    assert len(losses._log_history) == 2
    assert all(torch.isfinite(torch.tensor(losses._log_history)))
    batch = next(iter(runner.train_dataloader))
    with torch.no_grad():
        results = model.test_step(batch)
    assert len(results) == 2
    if cfg.model.type == 'DepthEstimator':
        assert results[0].pred_depth_map.data.shape[-2:] == results[0].ori_shape
    elif cfg.default_scope == 'mmseg':
        assert results[0].pred_sem_seg.data.shape[-2:] == results[0].ori_shape
    else:
        assert (results[0].pred_instances.labels < 10).all()


def test_depth_is_measured(project, depth_data, tmp_path):
    path = ROOT / 'configs/segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480.py'
    cfg = load_config(str(path), work_dir=str(tmp_path), options=dict(data_root=str(depth_data)))
    cfg.model.backbone.init_cfg = None
    metrics = build_runner(cfg, loaders=('test',)).test()
    assert 0 < metrics['rmse'] < 10
    assert cfg.default_hooks.checkpoint.save_best == 'rmse'
