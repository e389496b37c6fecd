"""Small files as tools/export_onnx.py writes them, without a network."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper

BASE = dict(
    schema=1,
    part='model',
    classes=['cat', 'dog'],
    palette=[[255, 0, 0], [0, 0, 255]],
    categories=[dict(id=3, name='cat'), dict(id=7, name='dog')],
    input=dict(channels='RGB', dtype='uint8', normalized=True, divisor=1),
    resize=None,
)
SIZE = ['N', 3, 'H', 'W']
# What a detector finds; the last is padding, and masks are the upper half of the boxes.
BOXES, SCORES, LABELS = [[8, 4, 40, 30], [2, 2, 20, 20], [0, 0, 0, 0]], [0.6, 0.1, -1.0], [1, 0, 0]
MASKS = np.zeros((3, 28, 28), np.float32)
MASKS[:, :14] = 0.9


def write(file, nodes, outputs, values=None, dtype=TensorProto.UINT8, shape=SIZE, **metadata):
    """Write a graph that reads ``x``, the images [N, 3, H, W] in float32."""
    graph = helper.make_graph(
        [helper.make_node('Cast', ['images'], ['x'], to=TensorProto.FLOAT), *nodes],
        'graph',
        [helper.make_tensor_value_info('images', dtype, shape)],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in (values or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)], ir_version=9)
    helper.set_model_props(model, dict(mmdense=json.dumps({**BASE, **metadata})))
    onnx.save(model, file)
    return file


def write_detector(file, boxes=BOXES, scores=SCORES, labels=LABELS, masks=None, **options):
    """Write a detector that finds the same in each image: boxes [K, 4] and so on.

    The mean of an image, divided by 1000, is added to its scores.
    """
    found = dict(boxes=np.float32(boxes), scores=np.float32(scores), labels=np.int64(labels))
    found |= {} if masks is None else dict(masks=np.float32(masks))
    values = dict(zeros=np.float32(0), thousandth=np.float32(0.001))
    nodes = [
        helper.make_node('ReduceMean', ['x'], ['mean'], axes=[1, 2, 3], keepdims=0),
        helper.make_node('Mul', ['mean', 'thousandth'], ['small']),
        helper.make_node('Mul', ['mean', 'zeros'], ['none']),
    ]
    outputs = []
    for name, value in found.items():
        axes = list(range(1, value.ndim + 1))
        values[f'{name}_'] = value[None]
        kind = TensorProto.INT64 if name == 'labels' else TensorProto.FLOAT
        mean = 'small' if name == 'scores' else 'none'
        values[f'{name}_axes'] = np.int64(axes)
        nodes += [
            helper.make_node('Unsqueeze', [mean, f'{name}_axes'], [f'{name}_mean']),
            helper.make_node('Cast', [f'{name}_mean'], [f'{name}_more'], to=kind),
            helper.make_node('Add', [f'{name}_', f'{name}_more'], [name]),
        ]
        outputs.append((name, kind, ['N', *value.shape]))
    task = 'detection' if masks is None else 'instance segmentation'
    metadata = dict(task=task, postprocessing=dict(score_thr=0.05, mask_thr=0.5)) | options
    return write(file, nodes, outputs, values, **metadata)


def write_segmentor(file, channels=2, **options):
    """Write a segmentor whose logits are red and green over 100, or red alone."""
    values = dict(start=np.int64([0]), end=np.int64([channels]), axis=np.int64([1]))
    values['hundredth'] = np.float32(0.01)
    nodes = [
        helper.make_node('Mul', ['x', 'hundredth'], ['y']),
        helper.make_node('Slice', ['y', 'start', 'end', 'axis'], ['logits']),
        helper.make_node('ArgMax', ['logits'], ['segmentation'], axis=1, keepdims=0),
    ]
    outputs = [
        ('logits', TensorProto.FLOAT, ['N', channels, 'H', 'W']),
        ('segmentation', TensorProto.INT64, ['N', 'H', 'W']),
    ]
    metadata = (
        dict(task='semantic segmentation', postprocessing=dict(threshold=0.5, slide=None)) | options
    )
    return write(file, nodes, outputs, values, **metadata)


def write_classifier(file, **options):
    """Write a classifier of red, green and blue, by the means of the channels over 100."""
    nodes = [
        helper.make_node('ReduceMean', ['x'], ['mean'], axes=[2, 3], keepdims=0),
        helper.make_node('Mul', ['mean', 'hundredth'], ['logits']),
        helper.make_node('Softmax', ['logits'], ['scores'], axis=1),
    ]
    outputs = [('scores', TensorProto.FLOAT, ['N', 3])]
    values = dict(hundredth=np.float32(0.01))
    metadata = dict(task='classification', postprocessing={}, classes=['red', 'green', 'blue'])
    metadata |= dict(palette=[[255, 0, 0]] * 3, categories=[dict(id=i) for i in (1, 2, 3)])
    return write(file, nodes, outputs, values, **(metadata | options))
