"""The decoder of the ReXNet U-Net, alone and in mmseg's segmentors.

tests/weights/test_formats.py compares its outputs with the published network's.
"""

import pytest
import torch
from families import DEVICE

pytest.importorskip('mmseg')

from mmengine.config import ConfigDict  # noqa: E402
from mmengine.optim import OptimWrapper  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from mmdense.models.backbones.rexnet import ReXNet  # noqa: E402
from mmdense.models.heads.rexunet import ReXUNetDepthHead, ReXUNetHead  # noqa: E402

TINY = dict(width=0.25, depth=0.2)
CHANNELS = ReXNet(arch=TINY, taps='unet').out_channels
NAMES = [f's{2**k}' for k in range(6)]
pytestmark = [
    pytest.mark.filterwarnings('ignore:.*avg_non_ignore:UserWarning'),
    pytest.mark.filterwarnings('ignore:threshold is not defined:UserWarning'),
]


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def features(height=64, width=96, channels=CHANNELS, batch=2):
    """Return the encoder's feature maps for an image of this size."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    strides = (2, 4, 8, 16, 32, 32)
    return tuple(
        torch.randn(batch, c, -(-height // s), -(-width // s), generator=generator)
        for c, s in zip(channels, strides, strict=True)
    )


def segmentor(kind='EncoderDecoder', test_cfg=None, **head):
    torch.manual_seed(0)
    depth = kind == 'DepthEstimator'
    name = 'ReXUNetDepthHead' if depth else 'ReXUNetHead'
    return MODELS.build(
        dict(
            type=kind,
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
            backbone=dict(type='mmdense.ReXNet', arch=TINY, taps='unet'),
            decode_head=dict(type=f'mmdense.{name}', in_channels=CHANNELS, **head),
            test_cfg=ConfigDict(test_cfg or dict(mode='whole')),
        )
    )


def samples(height=64, width=64, batch=2):
    generator = torch.Generator(DEVICE).manual_seed(1)
    samples = []
    for _ in range(batch):
        shape = dict(ori_shape=(height, width), img_shape=(height, width))
        sample = SegDataSample(metainfo=dict(shape, pad_shape=(height, width)))
        label = torch.randint(3, (1, height, width), generator=generator)
        depth = torch.rand(1, height, width, generator=generator) * 9 + 0.1
        sample.gt_sem_seg = PixelData(data=label)
        sample.set_data(dict(gt_depth_map=PixelData(data=depth)))
        samples.append(sample)
    return samples


def batch(height=64, width=64, number=2):
    images = torch.randint(0, 255, (number, 3, height, width), dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=samples(height, width, number))


@pytest.mark.parametrize('size', [(64, 96), (33, 47), (65, 50)])
def test_six_outputs(size):
    outputs = ReXUNetHead(in_channels=CHANNELS, num_classes=20)(features(*size))
    assert isinstance(outputs, tuple)
    assert all(x.shape[:2] == (2, 20) for x in outputs)
    halves = [tuple(-(-side // 2**k) for side in size) for k in range(1, 6)]
    assert [tuple(x.shape[2:]) for x in outputs[1:]] == halves
    assert tuple(outputs[0].shape[2:]) == tuple(2 * side for side in halves[0])


def test_in_index_and_align_corners_have_an_effect():
    head = ReXUNetHead(in_channels=CHANNELS, num_classes=20).eval()
    turned = ReXUNetHead(in_channels=CHANNELS, in_index=(5, 4, 3, 2, 1, 0), num_classes=20).eval()
    turned.load_state_dict(head.state_dict())
    outputs = head(features())
    for a, b in zip(turned(features()[::-1]), outputs, strict=True):
        assert torch.equal(a, b)
    head.align_corners = True
    assert not torch.allclose(head(features())[0], outputs[0])


@pytest.mark.parametrize('weights', [(1, 0.5, 0.5, 0.5, 0.5, 0.5), (2, 0, 0, 1, 0, 0)])
def test_loss_weights(weights):
    plain = segmentor(num_classes=3, loss_weights=[1] * 6)
    weighted = segmentor(num_classes=3, loss_weights=weights)
    data = plain.data_preprocessor(batch(), True)
    expected = plain.loss(**data)
    result = weighted.loss(**data)
    assert list(result) == [*(f'decode.loss_ce_{name}' for name in NAMES), 'decode.acc_seg']
    for name, weight in zip(NAMES, weights, strict=True):
        key = f'decode.loss_ce_{name}'
        torch.testing.assert_close(result[key], weight * expected[key])
    torch.testing.assert_close(result['decode.acc_seg'], expected['decode.acc_seg'])
    # DDP needs a gradient of every parameter, also of scales with weight 0.
    weighted.parse_losses(result)[0].backward()
    assert all(p.grad is not None for p in weighted.parameters())


def test_each_scale_is_compared_at_full_size():
    net = segmentor(num_classes=3, loss_weights=[1] * 6)
    data = net.data_preprocessor(batch(), True)
    losses = net.decode_head.loss_by_feat(logits := net(data['inputs']), data['data_samples'])
    label = torch.cat([s.gt_sem_seg.data for s in data['data_samples']])
    for name, x in zip(NAMES, logits, strict=True):
        x = torch.nn.functional.interpolate(x, (64, 64), mode='bilinear')
        expected = torch.nn.functional.cross_entropy(x, label)
        torch.testing.assert_close(losses[f'loss_ce_{name}'], expected)


def test_several_losses_and_an_ignored_label():
    losses = [dict(type='CrossEntropyLoss', loss_weight=w) for w in (1.0, 2.0)]
    losses.append(dict(type='DiceLoss'))
    net = segmentor(num_classes=3, loss_decode=losses, ignore_index=2)
    single = segmentor(num_classes=3, ignore_index=2)
    other = segmentor(num_classes=3)
    data = net.data_preprocessor(batch(), True)
    result, alone, counted = (n.loss(**data) for n in (net, single, other))
    assert [k for k in result if 'dice' in k] == [f'decode.loss_dice_{name}' for name in NAMES]
    key = 'decode.loss_ce_s32'
    torch.testing.assert_close(result[key], 3 * alone[key])
    assert alone[key] < counted[key]


def test_binary():
    net = segmentor(num_classes=2, out_channels=1, threshold=0.6)
    data = batch()
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.clamp_(max=1)
    optim = OptimWrapper(torch.optim.SGD(net.parameters(), lr=0.01))
    before = net.train_step(data, optim)['loss']
    assert 0.1 < before < 10
    for head in (dict(num_classes=1), dict(num_classes=2, out_channels=1)):
        assert ReXUNetHead(in_channels=CHANNELS, **head).loss_decode.use_sigmoid
    (result, _) = net.eval().test_step(data)
    assert torch.equal(result.pred_sem_seg.data, (result.seg_logits.data > 0.6).float())


@pytest.mark.parametrize(
    ('test_cfg', 'size'),
    [
        (dict(mode='whole'), (64, 64)),
        (dict(mode='whole'), (47, 65)),
        (dict(mode='slide', crop_size=(32, 48), stride=(20, 32)), (64, 75)),
    ],
)
def test_predict(test_cfg, size):
    net = segmentor(num_classes=3, test_cfg=test_cfg).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        (result,) = net.predict(image, samples(*size, batch=1))
    assert result.seg_logits.data.shape == (3, *size)
    assert result.pred_sem_seg.data.shape == (1, *size)
    if size == (64, 64):
        with torch.no_grad():
            finest = net(image, mode='tensor')[0]
        torch.testing.assert_close(result.seg_logits.data, finest[0])


def test_depth_training_and_prediction():
    net = segmentor('DepthEstimator', max_depth=20)
    optim = OptimWrapper(torch.optim.AdamW(net.parameters(), lr=3e-3))
    data = batch()
    log = [net.train_step(data, optim) for _ in range(4)]
    assert set(log[0]) == {'loss', *(f'decode.loss_silog_{name}' for name in NAMES)}
    assert log[-1]['loss'] < log[0]['loss']
    net.parse_losses(net.loss(**net.data_preprocessor(data, True)))[0].backward()
    assert all(p.grad is not None for p in net.parameters())
    for result in net.eval().test_step(data):
        depth = result.pred_depth_map.data
        assert depth.shape == (1, 64, 64)
        assert depth.min() > 0
        assert depth.max() < 20


def test_depth_weights_and_range():
    net = segmentor('DepthEstimator', loss_weights=[1] * 6).eval()
    far = segmentor('DepthEstimator', loss_weights=(0, 0, 1, 0, 0, 3), max_depth=40).eval()
    data = net.data_preprocessor(batch(), True)
    depths, farther = net(data['inputs']), far(data['inputs'])
    assert len(depths) == 6
    for a, b in zip(depths, farther, strict=True):
        torch.testing.assert_close(4 * a, b)
    far.decode_head.max_depth = 10.0
    expected, result = net.loss(**data), far.loss(**data)
    for name, weight in zip(NAMES, (0, 0, 1, 0, 0, 3), strict=True):
        key = f'decode.loss_silog_{name}'
        torch.testing.assert_close(result[key], weight * expected[key])


def test_disparities():
    head = ReXUNetDepthHead(in_channels=CHANNELS, max_depth=5.0).eval()
    result = head.disparities(features())
    assert list(result) == [('disp', k) for k in range(6)]
    for disparity, depth in zip(result.values(), head(features()), strict=True):
        assert disparity.min() >= 0
        assert disparity.max() <= 1
        torch.testing.assert_close(5 * disparity, depth)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_channels=CHANNELS[:5]), 'reads six feature maps'),
        (dict(in_index=(0, 1, 2)), 'reads six feature maps'),
        (dict(loss_weights=(1, 1)), 'must be six'),
        (dict(loss_weights=(1, 1, 1, 1, 1, -1)), 'none negative'),
        (dict(max_depth=0), 'must be positive'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ReXUNetDepthHead(**{'in_channels': CHANNELS, **options})
