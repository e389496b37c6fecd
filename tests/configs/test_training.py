"""A recipe for each family and head trains two iterations on demo data, and predicts."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmdense.config.read import load_config
from mmdense.datasets.digits import CLASSES
from mmdense.engine.runner import build_runner
from support import ROOT

RECIPES = [
    'classification/condensenetv2/condensenetv2-110_300e_cifar10',
    'classification/condensenetv2/condensenetv2-a_350e_in1k',
    'classification/densenet/densenet-121_90e_in1k',
    'classification/densenet/densenet-bc-100-k12_300e_cifar100',
    'classification/rdnet/rdnet-t_amp-300e_in1k',
    'classification/rexnet/rexnet-1.0_amp-400e_in1k',
    'detection/baselines/faster-rcnn_mobilenetv2-1.0_fpn_1x_coco',
    'detection/baselines/faster-rcnn_shufflenetv2-0.5_fpn_1x_coco',
    'detection/condensenetv2/faster-rcnn_condensenetv2-c_fpn_condense-3x_coco',
    'detection/condensenetv2/retinanet_condensenetv2-c_fpn_1x_coco',
    'detection/densenet/faster-rcnn_densenet-121_fpn_1x_coco',
    'detection/densenet/mask-rcnn_densenet-121_fpn_1x_coco',
    'detection/densenet/retinanet_densenet-121_fpn_1x_coco',
    'detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco',
    'detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco',
    'detection/rdnet/mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco',
    'detection/rdnet/retinanet_rdnet-t_fpn_1x_coco',
    'detection/rexnet/faster-rcnn_rexnet-1.0_fpn_1x_coco',
    'detection/rexnet/mask-rcnn_rexnet-1.0_fpn_1x_coco',
    'detection/rexnet/retinanet_rexnet-1.0_fpn_1x_coco',
    'detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320',
    'segmentation/condensenetv2/upernet_condensenetv2-c_160k_ade20k-512x512',
    'segmentation/densenet/upernet_densenet-121_160k_ade20k-512x512',
    'segmentation/rdnet/upernet_rdnet-t_amp-160k_ade20k-512x512',
    'segmentation/rexnet/deeplabv3plus_rexnet-1.0_160k_ade20k-512x512',
    'segmentation/rexnet/unet_rexnet-1.0_160k_ade20k-512x512',
    'segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480',
]
FAST = ('mask-rcnn_rexnet-1.0', 'unet_rexnet-1.0_160k', 'condensenetv2-a_350e')
SIDE = 64


@pytest.fixture(scope='session')
def depth_data(project):
    """The demo's images with depths in millimetres, derived from the labels."""
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
    """Replace a value of a key anywhere in a config."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, dict | list):
            replace(child, key, old, new)
    if isinstance(node, dict) and node.get(key) == old:
        node[key] = new


def shrink(cfg, project, depth_data, crops):
    """Train on demo data, with few RoIs, for two iterations, without validation."""
    load, pack = dict(type='LoadImageFromFile'), cfg.train_pipeline[-1]
    resize = dict(type='Resize', scale=(SIDE, SIDE), keep_ratio=True)
    if cfg.model.type == 'DepthEstimator':
        dataset = cfg.train_dataloader.dataset
        dataset.data_root = str(depth_data)
        dataset.pipeline[3].crop_size = (SIDE, SIDE)
        cfg.model.data_preprocessor.size = (SIDE, SIDE)
    elif cfg.default_scope == 'mmpretrain':
        steps = cfg.train_pipeline
        replace(steps, 'scale', 224, SIDE)
        if steps[0].type != 'LoadImageFromFile':  # CIFAR's are in one file
            steps = [load, dict(type='Resize', scale=(32, 32)), *steps]
        folders = dict(data_root=str(crops), data_prefix='train', metainfo=dict(classes=CLASSES))
        dataset = dict(type='CustomDataset', pipeline=steps, **folders)
        for part in (cfg.model.head, cfg.model.data_preprocessor):
            part.num_classes = len(CLASSES)
        cfg.optim_wrapper.accumulative_counts = 1
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
    replace(cfg.model, 'num', 512, 32)
    replace(cfg.model, 'max_per_img', 1000, 50)
    cfg.model.backbone.init_cfg = None
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=10)
    cfg.param_scheduler = [s for s in cfg.param_scheduler if not s.get('by_epoch', True)]
    for part in ('val', 'test'):
        cfg.update({f'{part}_cfg': None, f'{part}_dataloader': None, f'{part}_evaluator': None})
    cfg.default_hooks.checkpoint = None
    cfg.randomness = dict(seed=0)


class MissingGradients(Hook):
    """Record the parameters without a gradient in each step."""

    def before_train(self, runner):
        self.missing = []

        def record(optimizer, args, kwargs):
            parameters = runner.model.named_parameters()
            self.missing.append([n for n, p in parameters if p.requires_grad and p.grad is None])

        runner.optim_wrapper.optimizer.register_step_pre_hook(record)


def recipe(name):
    fast = name.rpartition('/')[2].startswith(FAST)
    return pytest.param(name, marks=() if fast else pytest.mark.slow, id=name.rpartition('/')[2])


@pytest.mark.parametrize('name', map(recipe, RECIPES))
def test_two_iterations_and_a_prediction(name, project, depth_data, crops, tmp_path):
    if name.startswith('classification'):
        pytest.importorskip('mmpretrain')
    cfg = load_config(str(ROOT / f'configs/{name}.py'), work_dir=str(tmp_path))
    shrink(cfg, project, depth_data, crops)
    runner = build_runner(cfg, loaders=('train',))
    gradients = MissingGradients()
    runner.register_hook(gradients)
    model = runner.train().eval()
    assert runner.iter == 2
    losses = runner.message_hub.get_scalar('train/loss')._log_history
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    assert gradients.missing == [[], []]
    batch = next(iter(runner.train_dataloader))
    with torch.no_grad():
        results = model.test_step(batch)
    assert len(results) == 2
    for sample in results:
        if cfg.model.type == 'DepthEstimator':
            assert sample.pred_depth_map.data.shape[-2:] == sample.ori_shape
        elif cfg.default_scope == 'mmpretrain':
            assert sample.pred_score.shape == (10,)
            assert sample.pred_score.sum() == pytest.approx(1)
        elif cfg.default_scope == 'mmseg':
            assert sample.pred_sem_seg.data.shape == (1, *sample.ori_shape)
        else:
            objects = sample.pred_instances
            assert objects.bboxes.shape == (len(objects), 4)
            assert ((objects.labels >= 0) & (objects.labels < 10)).all()
            if 'mask-rcnn' in name:
                assert objects.masks.shape == (len(objects), *sample.ori_shape)


@pytest.mark.slow
def test_depth_metrics(project, depth_data, tmp_path):
    path = ROOT / 'configs/segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480.py'
    cfg = load_config(str(path), work_dir=str(tmp_path), options=dict(data_root=str(depth_data)))
    cfg.model.backbone.init_cfg = None
    metrics = build_runner(cfg, loaders=('test',)).test()
    assert 0 < metrics['rmse'] < 10
    assert cfg.default_hooks.checkpoint.save_best == 'rmse'
