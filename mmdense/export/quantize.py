"""Lower precision for exported files: float16, or int8 after calibration.

Convolutions and matrix products compute in it. Boxes do not: above 1024 float16 has steps of 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import onnx
from torch import Tensor

from mmdense.export.check import resize
from mmdense.runtime.session import Session

PRODUCTS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
HALF = (*PRODUCTS, 'Relu', 'Gelu', 'HardSigmoid', 'HardSwish', 'LayerNormalization')


def to_half(file: Path, target: Path) -> None:
    """Write a file with float16 weights, which computes products in float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(file)
    float32 = [node.name for node in model.graph.node if node.op_type not in HALF]
    model = convert_float_to_float16(model, node_block_list=float32, keep_io_types=True)
    _save(model, target, 'float16')


def to_int8(file: Path, target: Path, images: Sequence[Tensor]) -> None:
    """Write a file with int8 weights, which quantizes the inputs of products to uint8.

    Their ranges come from ``images``, as :func:`.find_images` returns them.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    dtype, fixed = (session := Session(file)).dtype, session.shape[2:]
    pixels = (resize(x.flip(0)[None], fixed if all(fixed) else x.shape[1:]) for x in images)
    inputs = (dict(images=x.numpy().astype(dtype)) for x in pixels)
    with mock.patch('logging.warning'):  # it advises what the exporter has done
        quantize_static(
            file,
            target,
            SimpleNamespace(get_next=lambda: next(inputs, None)),
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=dict(MatMulConstBOnly=True),
        )
    _save(onnx.load(target), target, 'int8')


def _save(model: onnx.ModelProto, target: Path, precision: str) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == 'mmdense')
    entry.value = json.dumps(dict(json.loads(entry.value), precision=precision))
    onnx.save(model, target)
