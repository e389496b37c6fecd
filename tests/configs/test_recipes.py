"""RDNet's recipe for ADE20K: learning rate schedule and test-time augmentation."""

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

from mmdense.config.edit import use_tta
from mmdense.config.read import load_config
from support import ROOT

UPERNET = ROOT / 'configs/segmentation/rdnet/upernet_rdnet-t_amp-160k_ade20k-512x512.py'


def load():
    cfg = load_config(str(UPERNET), options={'model.backbone.init_cfg': None})
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return cfg


def test_the_schedule_is_warm_up_times_linear_decay():
    """Warm-up times linear decay over all iterations, as in mmseg 0.x."""
    cfg = load()
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


@pytest.fixture
def tta(tmp_path):
    """Return a model and a function that segments an image at one scale."""
    cfg = load()
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
    for parameter in model.parameters():  # a random net predicts one class everywhere
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
    """A network with symmetric kernels predicts the mirror image."""
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
    predicted = segment(image)
    probabilities = []
    for view in (image, image[:, ::-1]):
        inputs = torch.from_numpy(view.copy()).permute(2, 0, 1)
        data = model.data_preprocessor(dict(inputs=[inputs], data_samples=None))
        with torch.no_grad():
            logits = model.encode_decode(data['inputs'], [dict(img_shape=(96, 128))])
        probabilities.append(logits.softmax(1)[0])
    expected = (probabilities[0] + probabilities[1].flip(-1)).argmax(0)
    assert len(expected.unique()) > 5
    assert (predicted == expected).float().mean() > 0.999
    assert (predicted != probabilities[0].argmax(0)).float().mean() > 0.02
