"""Suppression of boxes.

test_ops_fuzz.py compares random cases with references, test_ops_reference.py with mmcv.
"""

import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms
from torch import tensor

# IoUs with the first: 1, 0.5, 0.
BOXES = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [20.0, 20.0, 30.0, 30.0]]
SCORES = [0.9, 0.8, 0.7]


def crowd(rng, count):
    corner = torch.rand(count, 2, generator=rng, device=rng.device) * 30
    side = torch.rand(count, 2, generator=rng, device=rng.device) * 20 + 1
    return torch.cat((corner, corner + side), 1), torch.rand(
        count, generator=rng, device=rng.device
    )


@pytest.mark.parametrize(('threshold', 'kept'), [(0.4, [0, 2]), (0.5, [0, 1, 2])])
def test_nms_suppresses_above_the_threshold_only(device, threshold, kept):
    dets, keep = nms(tensor(BOXES, device=device), tensor(SCORES, device=device), threshold)
    assert keep.tolist() == kept
    assert dets.device.type == device.type
    torch.testing.assert_close(
        dets.cpu(), torch.cat((tensor(BOXES), tensor(SCORES)[:, None]), 1)[kept]
    )


def test_nms_compares_in_the_precision_of_the_boxes():
    # 3 / 5 in float32 is above the double 0.6, and equal to the float32 0.6.
    boxes = tensor([[0.0, 0.0, 5.0, 1.0], [0.0, 0.0, 3.0, 1.0]])
    assert nms(boxes, tensor([0.9, 0.8]), 0.6)[1].tolist() == [0, 1]
    assert nms(boxes, tensor([0.9, 0.8]), 0.59)[1].tolist() == [0]


def test_nms_keeps_the_order_of_equal_scores(device):
    apart = torch.arange(300.0, device=device)[:, None] * 10 + tensor(BOXES[0], device=device)
    same = tensor(BOXES[:1] * 300, device=device)
    scores = torch.full((300,), 0.5, device=device)
    assert nms(apart * 1.5, scores, 0.5)[1].tolist() == list(range(300))
    assert nms(same, scores, 0.5)[1].tolist() == [0]


def test_nms_keeps_the_digits_of_the_boxes(device):
    boxes = tensor([[0, 0, 10, 10], [0, 0, 10, 5 + 1e-9]], dtype=torch.float64, device=device)
    scores = tensor([0.9, 0.8], device=device)
    assert nms(boxes, scores, 0.5)[1].tolist() == [0]
    assert nms(boxes.float(), scores, 0.5)[1].tolist() == [0, 1]


@pytest.mark.parametrize('split_thr', [10000, 100])
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
def test_batched_nms_treats_classes_apart(device, rng, split_thr, kind):
    boxes, scores = crowd(rng, 400)
    labels = torch.arange(400, device=device) % 80
    config = dict(type=kind, iou_threshold=0.4, split_thr=split_thr)
    if kind == 'soft_nms':
        config['min_score'] = 0.2
    dets, keep = batched_nms(boxes, scores, labels, config)

    function = {'nms': nms, 'soft_nms': soft_nms}[kind]
    options = {k: v for k, v in config.items() if k not in ('type', 'split_thr')}
    expected = {}
    for label in range(80):
        index = (labels == label).nonzero()[:, 0]
        found, kept = function(boxes[index], scores[index], **options)
        expected |= dict(zip(index[kept].tolist(), found[:, 4].tolist(), strict=True))
    assert 80 < len(expected) < 400
    assert sorted(keep.tolist()) == sorted(expected)
    torch.testing.assert_close(
        dets[:, 4].cpu(), tensor([expected[i] for i in keep.tolist()]), rtol=1e-4, atol=1e-5
    )
    assert (dets[:, 4].diff() <= 0).all()
    torch.testing.assert_close(dets[:, :4], boxes[keep])


def test_nms_match_keeps_the_order_of_equal_scores(device):
    dets = tensor([[*box, 0.5] for box in BOXES[::2] * 100], device=device)
    assert [g.tolist() for g in nms_match(dets, 0.5)] == [[*range(k, 200, 2)] for k in (0, 1)]
