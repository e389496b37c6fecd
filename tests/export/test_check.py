"""Exported files beside their models: in test_step, in the check, and in lower precision."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmdense.errors import UserError
from mmdense.export.check import _differences, check_file, find_images, resize
from support import DEMOS

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from mmdense.export.onnx_model import OnnxModel  # noqa: E402
from mmdense.export.quantize import to_half, to_int8  # noqa: E402
from onnx_files import BOXES, LABELS, MASKS, SCORES, write, write_detector, write_segmentor  # noqa: E402

PIXELS = torch.randint(256, (3, 3, 16, 20), generator=torch.Generator().manual_seed(0)).byte()
BATCHES = [(1, 32, 48), (2, 32, 64)]


def sample_of(kind, ori_shape, scale=(1.0, 1.0)):
    return kind(metainfo=dict(ori_shape=ori_shape, scale_factor=scale))


def test_detections_of_images_of_several_sizes(tmp_path):
    file = write_detector(tmp_path / 'boxes.onnx', masks=MASKS)
    images = [torch.zeros(3, 48, 64), torch.full((3, 48, 64), 99.6), torch.zeros(3, 96, 64).byte()]
    data = [sample_of(DetDataSample, (24, 32), (2.0, 2.0)) for _ in images]
    results = OnnxModel(file).test_step(dict(inputs=images, data_samples=data))
    for result, more in zip(results, (0, 0.1, 0), strict=True):  # rounded, as uint8 is
        found = result.pred_instances
        np.testing.assert_allclose(found.bboxes, np.array(BOXES[:2]) / 2)
        np.testing.assert_allclose(found.scores, np.add(SCORES[:2], more), atol=1e-6)
        assert found.labels.tolist() == LABELS[:2]
        assert found.masks.shape == (2, 24, 32)
        assert found.masks[0, 3:8, 5:19].all()
        assert not found.masks[0, 9:].any()


@pytest.mark.parametrize('slide', [None, dict(crop_size=[8, 8], stride=[6, 6])])
def test_segmentations_are_resized_and_slide(slide, tmp_path):
    settings = dict(threshold=None, slide=slide)
    file = write_segmentor(tmp_path / 'classes.onnx', postprocessing=settings)
    red = torch.tensor([0, 0, 255])[:, None, None].expand(3, 12, 16).byte()  # BGR
    samples = [sample_of(SegDataSample, (24, 32)) for _ in range(2)]
    results = OnnxModel(file).test_step(dict(inputs=[red, red.flip(0)], data_samples=samples))
    maps = [result.pred_sem_seg.data for result in results]
    assert [map.shape for map in maps] == [(1, 24, 32)] * 2
    assert not maps[0].any()  # red


class Fake(nn.Module):
    """A detector that finds the boxes of :func:`write_detector`, but for ``changes``."""

    def __init__(self, noisy=False, score_thr=0.05, **changes):
        super().__init__()
        self.backbone, self.bbox_head = nn.Identity(), nn.Identity()
        self.bbox_head.test_cfg = Config(dict(score_thr=score_thr))
        self.noisy = noisy
        self.found = dict(bboxes=BOXES[:2], scores=SCORES[:2], labels=LABELS[:2]) | changes

    def test_step(self, data):
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            found = {name: torch.tensor(values) for name, values in self.found.items()}
            found['scores'] = found['scores'] + image.float().mean() / 1000
            clean = torch.zeros(1)
            if self.noisy and self.backbone(clean) != clean:
                found['bboxes'] = found['bboxes'] + 50.0
            found['bboxes'] = found['bboxes'].float()
            high = found['scores'] > self.bbox_head.test_cfg.score_thr
            sample.pred_instances = InstanceData(**found)[high]
        return data['data_samples']


def check(file, model):
    network = SimpleNamespace(part='model', task='detection', model=model)
    return check_file(file, network, BATCHES)


def shifted(by):
    return dict(bboxes=np.add(BOXES[:2], by).tolist())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(), ''),
        (shifted(5e-4), ''),
        (shifted(0.01), 'lost 0, boxes 0.01, scores'),
        (shifted(30), 'lost 1, boxes 0'),
        (dict(scores=[0.6, 0.1001]), 'scores 0.0001'),
        (dict(labels=[1, 1]), 'lost 0.5'),
        (dict(bboxes=BOXES[:1], scores=SCORES[:1], labels=LABELS[:1]), 'lost 0.3'),
        # Where the model itself changes as much by noise, rounding is to blame.
        (shifted(30) | dict(noisy=True), ''),
        (dict(bboxes=BOXES[:1], scores=SCORES[:1], labels=LABELS[:1], noisy=True), ''),
    ],
)
def test_what_the_check_refuses(changes, message, tmp_path):
    file = write_detector(tmp_path / 'x.onnx', precision='float32')
    if message:
        with pytest.raises(UserError, match=f'differs from the model: .*{message}'):
            check(file, Fake(**changes))
    else:
        check(file, Fake(**changes))


def test_lower_precision_may_lose_half_of_the_boxes(tmp_path):
    file = write_detector(tmp_path / 'x.onnx', precision='int8')
    assert check(file, Fake(**shifted(2)))['boxes'] == 2
    boxes = [BOXES[0], [50, 50, 60, 60]]  # the second has a low score
    assert check(file, Fake(bboxes=boxes))['lost'] == 0
    with pytest.raises(UserError, match='lost'):
        check(file, Fake(**shifted(30)))


def test_ties_at_the_threshold_and_at_the_end_of_full_lists():
    def lost(*scores, **settings):
        samples = []
        for values in scores:
            boxes = torch.tensor([[100 * v, 0, 100 * v + 9, 9] for v in values])
            boxes[1:, 1::2] += 50 * len(samples)  # the first ones are pairs
            found = dict(bboxes=boxes, scores=torch.tensor(values), labels=torch.zeros(len(values)))
            samples.append(DetDataSample(pred_instances=InstanceData(**found)))
        return _differences(samples[:1], samples[1:], True, settings)['lost']

    assert lost([0.9, 0.500001], [0.9], score_thr=0.5) == 0
    assert lost([0.9, 0.51], [0.9], score_thr=0.5) == 1 / 3
    assert lost([0.9, 0.6], [0.9, 0.600001], max_per_img=2) == 0
    assert lost([0.9, 0.6], [0.9, 0.61], max_per_img=2) == 0.25
    assert lost([0.9, 0.6], [0.9, 0.600001], max_per_img=3) == 0.5


def test_classifiers_differ_in_scores_and_confident_classes():
    def sample(*scores):
        element = DetDataSample()
        element.pred_score = torch.tensor(scores)
        element.pred_label = element.pred_score.argmax(0, keepdim=True)
        return element

    results = [sample(0.5, 0.3, 0.2), sample(0.29, 0.28, 0.22)]
    expected = [sample(0.4, 0.5, 0.1), sample(0.28, 0.29, 0.22)]
    found = _differences(results, expected, True, {})
    assert found == pytest.approx(dict(lost=0.5, scores=0.2))


def test_segmentations_differ_in_pixels_alone():
    maps = torch.zeros(1, 2, 2), torch.tensor([[[0, 0], [0, 1]]])
    a, b = (SegDataSample(pred_sem_seg=PixelData(data=x)) for x in maps)
    assert _differences([a], [b], True, {}) == dict(segmentation=0.25)


def test_without_boxes_the_threshold_is_lowered(tmp_path):
    file, make = tmp_path / 'boxes.onnx', onnx.helper.make_node
    write_detector(file, precision='float32')
    program = onnx.load(file)
    graph = program.graph
    (last,) = (node for node in graph.node if node.output[0] == 'scores')
    last.output[0] = 'before'
    for name, value in (('threshold', 0.9), ('padding', -1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    graph.node.append(make('Greater', ['before', 'threshold'], ['high']))
    graph.node.append(make('Where', ['high', 'before', 'padding'], ['scores']))
    onnx.save(program, file)
    assert check(file, Fake(score_thr=0.9))['lost'] == 0
    with pytest.raises(UserError, match='lost 1'):
        check(file, Fake(score_thr=0.9, **shifted(30)))


def test_images_come_from_the_test_data(project, monkeypatch):
    monkeypatch.chdir(project)
    cfg = Config.fromfile(DEMOS['detection'])
    images = find_images(cfg, 9)
    assert [(x.dtype, tuple(x.shape)) for x in images] == [(torch.uint8, (3, 192, 192))] * 4
    cfg.test_dataloader.dataset.ann_file = 'none.json'
    assert find_images(cfg) == find_images(Config()) == find_images(None) == []


@pytest.fixture
def products(tmp_path):
    """A file of two convolutions of images of 8 x 12."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 3, 3, 3)).astype('f') / 9 for name in ('a', 'b')}
    nodes = [
        onnx.helper.make_node('Conv', ['x', 'a'], ['y'], name='first'),
        onnx.helper.make_node('Conv', ['y', 'b'], ['z'], name='second'),
        onnx.helper.make_node('Identity', ['z'], ['logits'], name='last'),
    ]
    outputs = [('logits', onnx.TensorProto.FLOAT, ['N', 3, 4, 8])]
    settings = dict(task='semantic segmentation', postprocessing={})
    return write(tmp_path / 'a.onnx', nodes, outputs, values, shape=['N', 3, 8, 12], **settings)


@pytest.mark.parametrize(
    ('convert', 'precision', 'kind'),
    [
        (to_half, 'float16', onnx.TensorProto.FLOAT16),
        (lambda *files: to_int8(*files, [*PIXELS]), 'int8', onnx.TensorProto.INT8),
    ],
)
def test_lower_precision(convert, precision, kind, products, tmp_path):
    target = tmp_path / 'b.onnx'
    convert(products, target)
    model = onnx.load(target)
    weights = [x.data_type for x in model.graph.initializer if len(x.dims) == 4]
    assert weights == [kind] * 2
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata['mmdense'])['precision'] == precision
    images = resize(PIXELS, (8, 12)).flip(1).numpy()
    a, b = (OnnxModel(file).session.run(images)['logits'] for file in (products, target))
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()
