"""Recipes as users run them: a step, a prediction, the schedule, test-time augmentation."""

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData, PixelData

import mmdense  # noqa: F401
from mmdense.config.edit import drop_amp, use_tta
from mmdense.config.read import load_config
from support import ROOT

DETECTORS = {
    'faster-rcnn_rdnet-t_fpn_1x_coco': {'model.train_cfg.rcnn.sampler.num': 16},
    'retinanet_rdnet-t_fpn_1x_coco': {},
    'mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco': {'model.train_cfg.rcnn.sampler.num': 16},
    'cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco': {
        # The larger anchors reach over the edges of so small an image.
        'model.train_cfg.rpn.allowed_border': -1,
        **{f'model.train_cfg.rcnn.{i}.sampler.num': 16 for i in range(3)},
    },
}
UPERNET = 'segmentation/rdnet/upernet_rdnet-t_amp-160k_ade20k-512x512'
SIDE = 64


@pytest.fixture(autouse=True)
def _scope():
    yield
    DefaultScope._instance_dict.clear()


def load(name, **options):
    options['model.backbone.init_cfg'] = None
    options['optim_wrapper.optimizer.weight_decay'] = 0.0  # which moves what gets no gradient
    cfg = load_config(str(ROOT / f'configs/{name}.py'), options=options)
    if 'drop_path_rate' in cfg.model.backbone:
        cfg.model.backbone.drop_path_rate = 0.0  # what it drops gets no gradient
    drop_amp(cfg)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return cfg


def train_one_step(cfg, data):
    """Return the model after one step of its own optimizer, which moved every part of it."""
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train_step(data, optimizer)
    assert all(torch.isfinite(value).all() for value in losses.values())
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    return model.eval()


def detection_data(*, masks):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for i in range(2):
        truth = InstanceData(
            bboxes=torch.tensor([[4.0, 6, 40, 44], [20, 8, 60, 30 + i]]),
            labels=torch.tensor([1, 7 + i]),
        )
        if masks:
            truth.masks = BitmapMasks(np.ones((2, SIDE, SIDE), np.uint8), SIDE, SIDE)
        shape = (SIDE, SIDE)
        meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1, 1))
        samples.append(DetDataSample(metainfo=meta, gt_instances=truth))
    images = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples)


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_train_and_predict(name):
    cfg = load(f'detection/rdnet/{name}', **DETECTORS[name])
    masks = 'mask' in name
    model = train_one_step(cfg, detection_data(masks=masks))
    with torch.no_grad():
        found = model.test_step(detection_data(masks=masks))
    assert len(found) == 2
    for sample in found:
        boxes = sample.pred_instances
        assert boxes.bboxes.shape == (len(boxes), 4)
        assert ((boxes.labels >= 0) & (boxes.labels < 80)).all()
        if masks:
            assert boxes.masks.shape == (len(boxes), SIDE, SIDE)


def test_segmentor_trains_and_predicts():
    from mmseg.structures import SegDataSample

    cfg = load(UPERNET, **{'model.data_preprocessor.size': (SIDE, SIDE)})
    samples = [
        SegDataSample(
            metainfo=dict(img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE)),
            gt_sem_seg=PixelData(data=torch.randint(150, (1, SIDE, SIDE))),
        )
        for _ in range(2)
    ]
    images = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    model = train_one_step(cfg, dict(inputs=list(images), data_samples=samples))
    with torch.no_grad():
        found = model.test_step(dict(inputs=list(images), data_samples=samples))
    assert found[0].pred_sem_seg.data.shape == (1, SIDE, SIDE)
    assert found[0].seg_logits.data.shape == (150, SIDE, SIDE)


def test_segmentation_schedule_is_the_product_of_both():
    """Warm-up times linear decay over all iterations, as mmseg 0.x had it."""
    cfg = load(UPERNET)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    for i in range(3000):
        warm_up = min(1, 6e-6 + (1 - 6e-6) * i / 1499)
        expected = warm_up * (1 - i / 160000)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-6), i
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


# ---------------------------------------------------------------------------- TTA


@pytest.fixture
def tta(tmp_path):
    """Return a function that segments an image file, with flips or without, in one scale."""
    cfg = load(UPERNET)
    arch = dict(stem=8, growth=(8, 8, 8, 16), down=(1, 2, 3), blocks=1, layer_scale=1.0)
    channels = [16, 16, 16, 24]
    cfg.model.backbone.arch = arch
    cfg.model.decode_head.update(in_channels=channels, channels=8)
    cfg.model.auxiliary_head.update(in_channels=channels[2], channels=8)
    use_tta(cfg)
    views = cfg.tta_pipeline[1].transforms
    assert [len(v) for v in views] == [6, 2, 1, 1]
    assert [v.scale for v in views[0]] == [
        (1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)
    ]  # fmt: skip
    views[0] = [dict(type='Resize', scale=(128, 96), keep_ratio=True)]
    model = MODELS.build(cfg.model).eval()
    for parameter in model.parameters():  # random nets answer one class everywhere
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)

    def segment(image, *, flips=True):
        views[1][1].prob = 1.0 if flips else 0.0
        file = str(tmp_path / 'image.png')
        cv2.imwrite(file, image)
        data = Compose(cfg.tta_pipeline)(
            dict(img_path=file, seg_map_path=file, seg_fields=[], reduce_zero_label=True)
        )
        with torch.no_grad():
            return model.test_step(pseudo_collate([data]))[0].pred_sem_seg.data

    return model.module, segment


def photo(*, symmetric):
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = cv2.resize(image, (128, 96), interpolation=cv2.INTER_CUBIC)
    if symmetric:
        image[:, 64:] = image[:, 63::-1]
    return image


def test_flips_of_a_symmetric_image_change_nothing(tta):
    """A network with symmetric kernels sees the same in the mirror."""
    model, segment = tta
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.copy_((parameter + parameter.flip(3)) / 2)
    image = photo(symmetric=True)
    plain, flipped = segment(image, flips=False), segment(image)
    assert len(plain.unique()) > 5
    assert (plain == flipped).float().mean() > 0.999
    assert (flipped == flipped.flip(-1)).float().mean() > 0.999


def test_flips_are_undone_before_averaging(tta):
    model, segment = tta
    image = photo(symmetric=False)
    found = segment(image)
    probabilities = []
    for view in (image, image[:, ::-1]):
        inputs = torch.from_numpy(view.copy()).permute(2, 0, 1)
        data = model.data_preprocessor(dict(inputs=[inputs], data_samples=None))
        with torch.no_grad():
            logits = model.encode_decode(data['inputs'], [dict(img_shape=(96, 128))])
        probabilities.append(logits.softmax(1)[0])
    expected = (probabilities[0] + probabilities[1].flip(-1)).argmax(0)
    assert len(expected.unique()) > 5
    assert (found == expected).float().mean() > 0.999
    assert (found != probabilities[0].argmax(0)).float().mean() > 0.02
