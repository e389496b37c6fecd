"""Predictions on images of all kinds: drawn, and written in COCO's format."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from bad_data import EPS, bomb
from mmdense.apis import Predictor, find_images, save_predictions
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

DIGITS = tuple('0123456789')
NYU = ROOT / 'configs/segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480.py'
MASKS = dict(
    type='MaskRCNN',
    roi_head=dict(
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=48,
            featmap_strides=[4, 8, 16],
        ),
        mask_head=dict(
            type='FCNMaskHead', num_convs=1, in_channels=48, conv_out_channels=8, num_classes=10
        ),
    ),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5, max_per_img=4, score_thr=0.0)),
)


def config(task='detection', masks=False):
    """Return the config of a demo; its detector keeps boxes of any score."""
    cfg = load_config(str(DEMOS[task]))
    if task == 'detection':
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
    if masks:
        cfg.merge_from_dict(dict(model=MASKS))
    return cfg


def predictor(*args, **options):
    torch.manual_seed(0)
    return Predictor(*args, device='cpu', **options)


@pytest.fixture(scope='module')
def detector():
    return predictor(config())


@pytest.fixture(scope='module')
def segmentor():
    return predictor(config('segmentation'))


@pytest.fixture(scope='module')
def mask_detector():
    return predictor(config(masks=True))


@pytest.fixture
def pixels():
    """A smooth colour image [60, 100, 3], BGR."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    return cv2.resize(noise, (100, 60), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def file(pixels, tmp_path):
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    return tmp_path / 'image.png'


def save(model, file, **meta):
    torch.save(dict(state_dict=model.state_dict(), meta=meta), file)
    return file


def same(one, other):
    if 'pred_sem_seg' in one:
        return torch.equal(one.seg_logits.data, other.seg_logits.data)
    one, other = one.pred_instances, other.pred_instances
    return torch.equal(one.bboxes, other.bboxes) and torch.equal(one.scores, other.scores)


# The model


def test_predictions_are_those_of_mmdet_and_mmseg(detector, segmentor, file, tmp_path):
    from mmdet.apis import inference_detector, init_detector
    from mmseg.apis import inference_model, init_model

    checkpoint = save(detector.model, tmp_path / 'd.pth', dataset_meta=dict(classes=DIGITS))
    theirs = init_detector(config(), str(checkpoint), device='cpu')
    assert same(detector(file)[0], inference_detector(theirs, str(file)))
    checkpoint = save(segmentor.model, tmp_path / 's.pth', dataset_meta=dict(classes=('a', 'b')))
    cfg = config('segmentation')
    theirs = init_model(cfg, str(checkpoint), device='cpu')
    assert same(segmentor(file)[0], inference_model(theirs, str(file)))


@pytest.mark.parametrize('kind', ['detector', 'segmentor', 'mask_detector'])
def test_files_and_arrays_alone_and_in_company(kind, file, pixels, request):
    model = request.getfixturevalue(kind)
    alone = model(str(file))
    assert len(alone) == 1
    together = model([pixels, file, pixels[:40]])
    assert same(together[0], alone[0])
    assert same(together[1], alone[0])
    assert not same(together[2], alone[0])
    assert together[2].ori_shape == (40, 100)
    if kind == 'segmentor':
        assert together[2].pred_sem_seg.data.shape == (1, 40, 100)
        return
    boxes = together[2].pred_instances.bboxes
    assert len(boxes)
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([100, 40, 100, 40])).all()
    if kind == 'mask_detector':
        assert together[2].pred_instances.masks.shape == (len(boxes), 40, 100)


def test_a_checkpoint_replaces_pretrained_weights(detector, pixels, tmp_path):
    cfg = config()
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='timm://nothing')
    checkpoint = save(detector.model, tmp_path / 'x.pth')
    torch.manual_seed(1)
    deployed = Predictor(cfg, checkpoint, device='cpu', deploy=True)
    assert cfg.model.backbone.init_cfg.checkpoint == 'timm://nothing'  # not modified
    assert deployed.model.backbone.form == 'deployed'
    a, b = (p(pixels)[0].pred_instances.scores for p in (detector, deployed))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_checkpoint_must_fill_the_model(detector, tmp_path):
    state = detector.model.state_dict()
    del state['neck.fpn_convs.0.conv.weight']
    file = tmp_path / 'x.pth'
    torch.save(dict(state_dict=state), file)
    with pytest.raises(
        UserError, match=r'x\.pth fills .*missing: neck\.fpn_convs\.0\.conv\.weight'
    ):
        predictor(config(), file)
    for name in ('min_loaded', 'min_coverage'):  # the second is a deprecated alias
        assert predictor(config(), file, **{name: 0.9}).classes == DIGITS


def test_the_config_s_image_loader_and_norms(file, pixels, log):
    cfg = config()
    cfg.test_dataloader.dataset.pipeline[0].to_float32 = True  # resized without rounding
    cfg.model.neck.norm_cfg = dict(type='SyncBN')
    model = predictor(cfg)
    assert log == ['no checkpoint: random weights']
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.model.modules())
    assert same(model(file)[0], model(pixels)[0])


def test_errors_name_config_checkpoint_device_or_pipeline():
    headless, without = config(), config()
    headless.test_dataloader.dataset.pipeline = headless.test_dataloader.dataset.pipeline[1:]
    without.pop('test_dataloader')
    for arguments, message in (
        (['nowhere.py'], r'^no config nowhere\.py'),
        ([config(), 'nowhere.pth'], r'^no checkpoint nowhere\.pth$'),
        ([str(NYU)], r'nyu-480x480\.py predicts depth: '),
        ([headless], 'must begin with LoadImageFromFile, not Resize'),
        ([without], 'has no test_dataloader'),
    ):
        with pytest.raises(UserError, match=message):
            predictor(*arguments)
    with pytest.raises(UserError, match='^no device abacus: '):
        Predictor(config(), device='abacus')


# Images


def test_grey_transparent_and_deep_images(detector, pixels, tmp_path):
    grey = pixels[..., 1]
    alpha = np.zeros_like(grey)
    deep = pixels.astype(np.uint16) * 256 + 99
    for name, content, expected in (
        ('grey.png', grey, np.stack([grey] * 3, -1)),
        ('alpha.png', np.dstack([pixels, alpha]), pixels),
        ('deep.png', deep, pixels),
        ('deep.tif', deep, pixels),
        ('deep-grey.png', deep[..., 1], np.stack([grey] * 3, -1)),
    ):
        cv2.imwrite(str(tmp_path / name), content)
        (sample,) = detector(tmp_path / name)
        drawn = detector.draw(tmp_path / name, sample, 2)  # nothing but the image
        difference = np.abs(drawn.astype(int) - expected[..., ::-1])
        assert difference.max() <= name.endswith('.tif'), name  # where OpenCV rounds
        assert same(sample, detector(np.ascontiguousarray(drawn[..., ::-1]))[0]), name


def test_photographs_are_turned_upright(detector, pixels, tmp_path):
    file = tmp_path / 'turned.png'
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: upright is a quarter turn clockwise from the file
    Image.fromarray(pixels[..., ::-1]).save(file, exif=exif)
    upright = np.ascontiguousarray(np.rot90(pixels, -1))
    (sample,) = detector(file)
    assert sample.ori_shape == (100, 60)
    assert same(sample, detector(upright)[0])
    assert (detector.draw(file, sample, 2) == upright[..., ::-1]).all()


def test_damaged_files(detector, pixels, tmp_path):
    jpeg = cv2.imencode('.jpg', cv2.resize(pixels, (400, 300)))[1].tobytes()
    png = cv2.imencode('.png', cv2.resize(pixels, (400, 300)))[1].tobytes()
    for name, content, reason in (
        ('nothing.jpg', b'', 'empty file$'),
        ('text.jpg', b'no image at all', 'not an image that can be read$'),
        ('half.jpg', jpeg[: len(jpeg) // 2], r'damaged \(OSError: image file is truncated'),
        ('half.png', png[: len(png) // 2], r'damaged \(.*[Tt]runcated'),
        ('head.jpg', jpeg[:20], 'not an image that can be read$|damaged'),
        ('bomb.png', bomb(50_000, 50_000), 'exceeds limit of 178956970 pixels'),
        ('drawing.png', EPS, 'not an image that can be read$'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=reason) as error:
            detector(tmp_path / name)
        assert str(error.value).startswith(f'{tmp_path / name}: ')
        assert '\n' not in str(error.value)
    for path in (tmp_path / 'missing.jpg', tmp_path):
        with pytest.raises(UserError, match='no such image'):
            detector(path)


def test_arrays_that_are_no_images(detector, segmentor, pixels):
    for array in (pixels[..., 0], pixels[..., :2], pixels / 255, pixels[:0]):
        with pytest.raises(UserError, match=r'must be uint8 \[H, W, 3\] in BGR, not '):
            detector(array)
    with pytest.raises(UserError, match=r'^the image: cannot be preprocessed \('):
        detector(np.zeros((1, 2000, 3), np.uint8))  # resized to a height of 0
    with pytest.raises(UserError, match='^the image: .*(small|at least)'):
        segmentor(np.zeros((3, 3, 3), np.uint8))


# Pictures


class Sample(dict):
    __getattr__ = dict.__getitem__


@pytest.fixture
def image():
    return np.full((200, 300, 3), 128, np.uint8)


def test_instances_below_the_threshold_are_not_drawn(mask_detector, image):
    masks = torch.zeros(2, 200, 300, dtype=torch.bool)
    masks[1, 80:140, 200:260] = True
    instances = InstanceData(
        bboxes=torch.tensor([[20.0, 60, 120, 160], [180, 60, 280, 160]]),
        labels=torch.tensor([3, 4]),
        scores=torch.tensor([0.9, 0.2]),
        masks=masks,
    )
    sample = Sample(ori_shape=(200, 300), pred_instances=instances)
    drawing = mask_detector.draw(image, sample)
    assert (drawing[60:161, 20] == mask_detector.palette[3]).all()
    assert (drawing[:, 150:] == 128).all()
    lower = mask_detector.draw(image, sample, 0.1)
    assert (lower[60:161, 180] == mask_detector.palette[4]).all()
    assert (lower[85:135, 205:255] != 128).any()
    with pytest.raises(UserError, match='the image has 40 x 300 pixels, but the sample is of one'):
        mask_detector.draw(image[:40], sample)


def test_ground_truth_is_drawn_dashed(mask_detector, segmentor, image):
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    masks = np.zeros((1, 200, 300), np.uint8)
    masks[:, 80:140, 40:100] = 1
    truth = InstanceData(
        bboxes=HorizontalBoxes([[20.0, 60, 120, 160]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(masks, 200, 300),
    )
    sample = Sample(ori_shape=(200, 300), gt_instances=truth)
    drawing = mask_detector.draw(image, sample, truth=True)
    side = (drawing[80:161, 20] == mask_detector.palette[3]).all(-1)
    assert 0.3 < side.mean() < 0.7
    assert (drawing[85:135, 45:95] != 128).any()
    labels = torch.full((1, 200, 300), 255)
    labels[:, :, :100] = 1
    truth = Sample(ori_shape=(200, 300), gt_sem_seg=PixelData(data=labels))
    drawing = segmentor.draw(image, truth, truth=True)
    assert (drawing[:, 100:] == 128).all()  # ignored
    assert (drawing[:, :100] != 128).any()
    for predictor in (mask_detector, segmentor):  # a pipeline that loads no annotations
        assert (predictor.draw(image, Sample(ori_shape=(200, 300)), truth=True) == image).all()


# COCO's format


@pytest.mark.parametrize('kind', ['detector', 'mask_detector'])
def test_results_of_instances(kind, pixels, request):
    model = request.getfixturevalue(kind)
    (sample,) = model(pixels)
    results = json.loads(json.dumps(model.coco(sample, 7)))
    instances = sample.pred_instances
    assert len(results) == len(instances) > 1
    for i, result in enumerate(results):
        assert (result['image_id'], result['category_id']) == (7, instances.labels[i] + 1)
        x, y, width, height = result['bbox']
        box = torch.tensor([x, y, x + width, y + height])
        torch.testing.assert_close(box, instances.bboxes[i], rtol=0, atol=0.01)
        assert abs(result['score'] - instances.scores[i]) < 1e-4
        assert ('segmentation' in result) == (kind == 'mask_detector')
        if 'segmentation' in result:
            mask = coco_mask.decode(result['segmentation'])
            assert (mask == instances.masks[i].numpy()).all()
    middle = results[1]['score']
    assert 0 < len(model.coco(sample, 7, middle + 1e-3)) < len(results)
    assert model.coco(sample, 7, 1.0) == []


def test_legend_of_segments(segmentor, detector, pixels):
    (sample,) = segmentor(pixels)
    sample.pred_sem_seg.data.zero_()
    assert segmentor.legend([sample]) == {segmentor.classes[0]: segmentor.palette[0]}
    sample.gt_sem_seg = PixelData(data=torch.full_like(sample.pred_sem_seg.data, 255))
    sample.gt_sem_seg.data[0, 0, 0] = 1
    assert list(segmentor.legend([sample])) == list(segmentor.classes[:2])
    assert detector.legend(detector(pixels)) == {}


def test_results_of_segments(segmentor, pixels):
    (sample,) = segmentor(pixels)
    labels = sample.pred_sem_seg.data[0]
    labels[:30], labels[30:] = 0, 1
    results = segmentor.coco(sample, 7, 0.999)  # the threshold is for instances
    segments = [(r['category_id'], r['bbox']) for r in results]
    assert segments == [(1, [0, 0, 100, 30]), (2, [0, 30, 100, 30])]
    surest = sample.seg_logits.data.softmax(0).amax(0)
    for label, result in enumerate(results):
        assert (coco_mask.decode(result['segmentation']) == (labels == label).numpy()).all()
        assert abs(result['score'] - surest[labels == label].mean()) < 1e-4
    # One channel for two classes.
    labels, probabilities = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0.1, 0.3, 0.8, 0.6]]])
    sample = Sample(
        pred_sem_seg=PixelData(data=labels.float()), seg_logits=PixelData(data=probabilities)
    )
    results = segmentor.coco(sample, 7)
    assert [(r['category_id'], r['score']) for r in results] == [(1, 0.8), (2, 0.7)]


# Files


@pytest.mark.parametrize('kind', ['detector', 'segmentor', 'mask_detector'])
def test_predictions_json_and_pictures(kind, file, pixels, request):
    model, folder = request.getfixturevalue(kind), file.parent
    (folder / 'bad.jpg').touch()
    with pytest.raises(UserError, match='cannot write'):
        next(save_predictions(model, {}, folder / 'bad.jpg'))
    cv2.imwrite(str(folder / 'low.jpg'), pixels[:40])
    out = folder / 'out'
    images = find_images([folder], out)
    failures = list(save_predictions(model, images, out, score_thr=0.0))
    assert failures == [f'{folder / "bad.jpg"}: empty file', None, None]
    written = json.loads((out / 'predictions.json').read_text())
    assert [i['file_name'] for i in written['images']] == [str(file), str(folder / 'low.jpg')]
    assert [(i['height'], i['width']) for i in written['images']] == [(60, 100), (40, 100)]
    for image in written['images']:
        picture = cv2.imread(str(out / image['picture']))
        assert picture.shape == (image['height'], image['width'], 3)
    (sample,) = model(file)
    drawn = model.draw(file, sample, 0.0)
    label_maps = [path.name for path in (out / 'label_maps').glob('*')]
    assert sorted(label_maps) == (['image.png', 'low.png'] if kind == 'segmentor' else [])
    if kind == 'segmentor':
        labels = np.array(Image.open(out / 'label_maps/image.png'))
        assert (labels == sample.pred_sem_seg.data[0].numpy()).all()
    assert (cv2.imread(str(out / 'pictures/image.png'))[..., ::-1] == drawn).all()
    assert not (out / 'pictures/bad.jpg').exists()
    truth = COCO(str(out / 'predictions.json'))
    results = truth.loadRes(written['annotations'])
    for loaded in (truth, results):
        assert len(loaded.anns) == len(written['annotations']) > 0
        for annotation in loaded.anns.values():
            assert loaded.cats[annotation['category_id']]['name'] in model.classes
        if kind != 'detector':  # loading them as results, pycocotools takes the boxes' areas
            areas = [loaded.annToMask(annotation).sum() for annotation in loaded.anns.values()]
            assert areas == [a['area'] for a in truth.anns.values()]
    for image in written['images']:
        (sample,) = model(image['file_name'])
        annotations = [truth.anns[i] for i in truth.getAnnIds(image['id'])]
        assert [a['bbox'] for a in annotations] == [r['bbox'] for r in model.coco(sample, 0)]
    nothing = list(save_predictions(model, images, out, score_thr=1.0))
    assert nothing == failures
    if kind != 'segmentor':
        assert json.loads((out / 'predictions.json').read_text())['annotations'] == []
