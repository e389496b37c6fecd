"""Predictions on images of all kinds, how they are drawn, and what is written of them."""

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
from mmdense.apis import Predictor, classes, predict
from mmdense.apis.predict import find_images, save_predictions
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


def config(task='detection', ann_file='nowhere.json', masks=False):
    """Return a demo's config whose detector lets every box through."""
    cfg = load_config(str(DEMOS[task]))
    if task == 'detection':
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
        cfg.test_evaluator.ann_file = str(ann_file)
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


@pytest.fixture
def log(monkeypatch):
    lines = []
    for module in (predict, classes):
        monkeypatch.setattr(module, 'print_log', lambda text, *args: lines.append(text))
    return lines


def save(model, file, **meta):
    torch.save(dict(state_dict=model.state_dict(), meta=meta), file)
    return file


def same(one, other):
    """Whether two predictions are the same."""
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
    assert same(Predictor(cfg, checkpoint, device='cpu')(pixels)[0], detector(pixels)[0])
    assert cfg.model.backbone.init_cfg.checkpoint == 'timm://nothing'  # the caller's is left alone


def test_a_checkpoint_must_fill_the_model(detector, pixels, tmp_path, log):
    with pytest.raises(UserError, match=r'^no checkpoint nowhere\.pth$'):
        predictor(config(), 'nowhere.pth')
    state = detector.model.state_dict()
    del state['neck.fpn_convs.0.conv.weight']
    torch.save(dict(state_dict=state), tmp_path / 'x.pth')
    with pytest.raises(
        UserError, match=r'x\.pth fills .*missing: neck\.fpn_convs\.0\.conv\.weight'
    ):
        predictor(config(), tmp_path / 'x.pth')
    assert predictor(config(), tmp_path / 'x.pth', min_loaded=0.9).classes == DIGITS
    assert predictor(config(), tmp_path / 'x.pth', min_coverage=0.9).classes == DIGITS  # its alias
    assert not log
    predictor(config())
    assert log == ['no checkpoint: random weights']


def test_deployed(detector, pixels, tmp_path):
    deployed = predictor(config(), save(detector.model, tmp_path / 'x.pth'), deploy=True)
    assert deployed.model.backbone.form == 'deployed'
    one, other = (p(pixels)[0].pred_instances for p in (detector, deployed))
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)


def test_the_config_s_own_reading_and_norms(file, pixels):
    cfg = config()
    cfg.test_dataloader.dataset.pipeline[0].to_float32 = True  # resized without rounding
    cfg.model.neck.norm_cfg = dict(type='SyncBN')
    model = predictor(cfg)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.model.modules())
    assert same(model(file)[0], model(pixels)[0])


def test_models_that_cannot_be(file):
    with pytest.raises(UserError, match=r'^no config nowhere\.py'):
        predictor('nowhere.py')
    with pytest.raises(UserError, match=r'nyu-480x480\.py predicts depth: '):
        predictor(str(NYU))
    with pytest.raises(UserError, match='^no device abacus: '):
        Predictor(config(), device='abacus')
    cfg = config()
    cfg.test_dataloader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline[1:]
    with pytest.raises(UserError, match='must begin with LoadImageFromFile, not Resize'):
        predictor(cfg)
    cfg.pop('test_dataloader')
    with pytest.raises(UserError, match='has no test_dataloader'):
        predictor(cfg)


# Names, colours and ids


def test_classes_come_from_the_checkpoint_the_config_or_the_data_set(detector, tmp_path, log):
    def of(meta, cfg=None):
        found = predictor(cfg or config(), save(detector.model, tmp_path / 'x.pth', **meta))
        return found.classes, found.palette

    letters, colours = tuple('abcdefghij'), [(i, i, i) for i in range(10)]
    digit_colours = [tuple(c) for c in config().metainfo.palette]
    both = dict(classes=letters, palette=colours)
    assert of(dict(dataset_meta=both)) == (letters, colours)
    assert of(dict(dataset_meta=dict(CLASSES=letters))) == (letters, digit_colours)
    assert of(dict(CLASSES=letters, PALETTE=colours, epoch=3)) == (letters, colours)
    assert of(dict(dataset_meta=dict(both, palette='random'))) == (letters, digit_colours)
    assert of({}) == (DIGITS, digit_colours)
    assert of(dict(dataset_meta=dict(classes=('cat', 'dog')))) == (DIGITS, digit_colours)
    assert not log
    cfg = config()
    del cfg.test_dataloader.dataset.metainfo
    cfg.test_dataloader.dataset.type = 'mmdet.VOCDataset'
    classes, palette = of({}, cfg)  # VOC has twenty
    assert classes == tuple(f'class {i}' for i in range(10))
    assert len(palette) >= 10
    assert log == ['neither the checkpoint nor the config names 10 classes']
    cfg.model.roi_head.bbox_head.num_classes = 20
    assert predictor(cfg).classes[:2] == ('aeroplane', 'bicycle')


def test_category_ids_are_those_of_the_annotations(tmp_path, log):
    def ids(cfg):
        model = predictor(cfg)
        return [c['id'] for c in model.categories], model.classes

    file = tmp_path / 'truth.json'
    known = [dict(id=3 * i + 2, name=name) for i, name in enumerate(('sky', *DIGITS))]
    file.write_text(json.dumps(dict(categories=known)))
    assert ids(config(ann_file=file)) == ([3 * i + 2 for i in range(1, 11)], DIGITS)
    # mmdet counts labels in the file's order.
    file.write_text(json.dumps(dict(categories=known[::-1])))
    del log[:]
    backwards = [3 * i + 2 for i in range(1, 11)][::-1]
    assert ids(config(ann_file=file)) == (backwards, DIGITS[::-1])
    assert sum('order of the annotation file' in line for line in log) == 1
    # A file that is damaged or of another data set says nothing.
    file.write_text('[{')
    assert ids(config(ann_file=file)) == ([*range(1, 11)], DIGITS)
    file.write_text(json.dumps(dict(categories=known[:-1])))
    assert ids(config(ann_file=file)) == ([*range(1, 11)], DIGITS)
    assert ids(config()) == ([*range(1, 11)], DIGITS)
    assert ids(config('segmentation'))[0] == [1, 2]
    cfg = config()
    del cfg.test_dataloader.dataset.metainfo
    cfg.model.roi_head.bbox_head.num_classes = 80
    found, classes = ids(cfg)
    assert dict(zip(found, classes, strict=True)).items() >= {1: 'person', 13: 'stop sign'}.items()
    assert (found[-1], classes[-1]) == (90, 'toothbrush')


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


def test_files_that_are_no_images(detector, pixels, tmp_path):
    whole = cv2.imencode('.jpg', cv2.resize(pixels, (400, 300)))[1].tobytes()
    png = cv2.imencode('.png', cv2.resize(pixels, (400, 300)))[1].tobytes()
    for name, content, reason in (
        ('nothing.jpg', b'', 'empty file$'),
        ('text.jpg', b'no image at all', 'not an image that can be read$'),
        ('half.jpg', whole[: len(whole) // 2], r'damaged \(OSError: image file is truncated'),
        ('half.png', png[: len(png) // 2], r'damaged \(.*[Tt]runcated'),
        ('head.jpg', whole[:20], 'not an image that can be read$|damaged'),
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


def test_arrays_that_are_no_images(detector, pixels):
    for array in (pixels[..., 0], pixels[..., :2], pixels / 255, pixels[:0]):
        with pytest.raises(UserError, match=r'must be uint8 \[H, W, 3\] in BGR, not '):
            detector(array)


def test_images_that_cannot_be_used(detector, segmentor):
    with pytest.raises(UserError, match=r'^the image: cannot be preprocessed \('):
        detector(np.zeros((1, 2000, 3), np.uint8))  # no pixel is left of its height
    with pytest.raises(UserError, match='^the image: .*(small|at least)'):
        segmentor(np.zeros((3, 3, 3), np.uint8))


# Pictures


class Sample(dict):
    __getattr__ = dict.__getitem__


def test_instances_below_the_threshold_are_not_drawn(mask_detector):
    image = np.full((200, 300, 3), 128, np.uint8)
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


def test_ground_truth_is_drawn_dashed(mask_detector, segmentor):
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    image = np.full((200, 300, 3), 128, np.uint8)
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


def test_a_drawing_needs_the_image_of_its_sample(detector, pixels):
    (sample,) = detector(pixels)
    with pytest.raises(UserError, match='the image has 40 x 100 pixels, but the sample is of one'):
        detector.draw(pixels[:40], sample)


# COCO's format


def test_results_of_boxes(detector, pixels):
    (sample,) = detector(pixels)
    results = detector.coco(sample, 7)
    found = sample.pred_instances
    assert len(results) == len(found) > 1
    for i, result in enumerate(results):
        assert set(result) == {'image_id', 'category_id', 'bbox', 'score'}
        assert result['image_id'] == 7
        assert result['category_id'] == found.labels[i] + 1
        x, y, width, height = result['bbox']
        box = torch.tensor([x, y, x + width, y + height])
        torch.testing.assert_close(box, found.bboxes[i], rtol=0, atol=0.01)
        assert abs(result['score'] - found.scores[i]) < 1e-4
    middle = results[1]['score']
    assert 0 < len(detector.coco(sample, 7, middle + 1e-3)) < len(results)
    assert detector.coco(sample, 7, 1.0) == []
    json.dumps(results)


def test_results_of_masks(mask_detector, pixels):
    (sample,) = mask_detector(pixels)
    results = mask_detector.coco(sample, 7)
    assert results
    for i, result in enumerate(results):
        mask = coco_mask.decode(json.loads(json.dumps(result['segmentation'])))
        assert (mask == sample.pred_instances.masks[i].numpy()).all()


def test_results_of_segments(segmentor, pixels):
    (sample,) = segmentor(pixels)
    labels = sample.pred_sem_seg.data[0]
    labels[:30], labels[30:] = 0, 1
    results = segmentor.coco(sample, 7, 0.999)  # the threshold is for instances
    assert [r['category_id'] for r in results] == [1, 2]
    assert [r['bbox'] for r in results] == [[0, 0, 100, 30], [0, 30, 100, 30]]
    surest = sample.seg_logits.data.softmax(0).amax(0)
    for label, result in enumerate(results):
        assert (coco_mask.decode(result['segmentation']) == (labels == label).numpy()).all()
        assert abs(result['score'] - surest[labels == label].mean()) < 1e-4


def test_results_of_segments_by_a_threshold(segmentor):
    labels, probabilities = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0.1, 0.3, 0.8, 0.6]]])
    sample = Sample(
        pred_sem_seg=PixelData(data=labels.float()), seg_logits=PixelData(data=probabilities)
    )
    results = segmentor.coco(sample, 7)
    assert [(r['category_id'], r['score']) for r in results] == [(1, 0.8), (2, 0.7)]


# Folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_are_searched_in_order(tmp_path):
    touch(tmp_path, 'in/b.JPG', 'in/a.png', 'in/sub/c.tif', 'in/notes.txt', 'in/.d.jpg')
    touch(tmp_path, 'in/.cache/e.jpg', 'in/out/pictures/f.jpg', 'odd.name')
    folder, out = tmp_path / 'in', tmp_path / 'in/out'
    pictures = out / 'pictures'
    assert list(find_images([folder], out).items()) == [
        (folder / 'a.png', pictures / 'a.png'),
        (folder / 'b.JPG', pictures / 'b.JPG'),
        (folder / 'sub/c.tif', pictures / 'sub/c.tif.png'),
    ]
    # A file is taken whatever its name, and once.
    found = find_images([tmp_path / 'odd.name', folder, folder / 'a.png'], out)
    assert [p.relative_to(pictures).as_posix() for p in found.values()] == [
        'odd.name.png',
        'in/a.png',
        'in/b.JPG',
        'in/sub/c.tif.png',
    ]


def test_images_of_one_name_get_pictures_of_their_own(tmp_path, monkeypatch):
    touch(tmp_path, 'a/x.jpg', 'b/x.jpg', 'c/x.bmp', 'c/x.bmp.png', 'c/x.png')
    names = ['a/x.jpg', 'b/x.jpg', 'c/x.bmp.png', 'c/x.bmp_.png', 'c/x.png']
    sources = ['b/x.jpg', 'a', str(tmp_path / 'a/x.jpg'), 'c']
    monkeypatch.chdir(tmp_path)
    found = find_images(sources, 'out')
    assert sorted(p.as_posix() for p in found.values()) == [f'out/pictures/{n}' for n in names]
    assert len(found) == 5


def test_images_that_are_not_there(tmp_path):
    touch(tmp_path, 'in/a.txt', 'x/pictures/a.jpg')
    with pytest.raises(UserError, match=r'no image found in .*in \(suffixes: \.bmp'):
        find_images([tmp_path / 'in'], tmp_path / 'out')
    with pytest.raises(UserError, match=r'no image or folder .*nothing\.jpg'):
        find_images([tmp_path / 'nothing.jpg'], tmp_path / 'out')
    with pytest.raises(UserError, match='would be overwritten by its picture'):
        find_images([tmp_path / 'x/pictures/a.jpg'], tmp_path / 'x')


@pytest.mark.parametrize('kind', ['detector', 'segmentor', 'mask_detector'])
def test_what_is_written(kind, file, pixels, request):
    model, folder = request.getfixturevalue(kind), file.parent
    (folder / 'bad.jpg').touch()
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
        own = [truth.anns[i] for i in truth.getAnnIds(image['id'])]
        assert [a['bbox'] for a in own] == [r['bbox'] for r in model.coco(sample, 0)]
    nothing = list(save_predictions(model, images, out, score_thr=1.0))
    assert nothing == failures
    if kind != 'segmentor':
        assert json.loads((out / 'predictions.json').read_text())['annotations'] == []


def test_nothing_is_written_below_a_file(detector, file):
    results = save_predictions(detector, {file: file.parent / 'x.png'}, file / 'out')
    with pytest.raises(UserError, match='cannot write'):
        next(results)
