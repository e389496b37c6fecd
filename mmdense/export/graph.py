"""Write a network to an ONNX file of standard operators."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdense.export.nms import translations

AXES = {0: 'batch', 2: 'height', 3: 'width'}


def write_graph(
    network: nn.Module,
    images: Tensor,
    file: Path,
    names: Sequence[str],
    axes: Mapping[int, str],
    metadata: Mapping[str, Any],
) -> tuple[dict[str, tuple[int | str, ...]], int]:
    """Write a network of one input to a file.

    ``images`` [N, C, H, W] are an example of the input, whose H and W differ where they are
    dynamic; ``names`` are those of the outputs, ``axes`` the dynamic axes of the input with their
    names. ``metadata`` becomes JSON in the file, under ``mmdense``. Returns the shapes of the input
    and outputs, whose dynamic axes are names, and the opset.
    """
    with ExitStack() as stack, warnings.catch_warnings(), torch.no_grad():
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # the exporter either works or raises an error
        warnings.simplefilter('ignore')
        dynamic = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
        # First, as inside torch.onnx.export mmdet's coders would import what mmdet 2 had for it.
        traced = torch.export.export(network, (images,), dynamic_shapes=dynamic, strict=False)
        _make_functional(traced)
        program = torch.onnx.export(
            traced,
            input_names=['images'],
            output_names=list(names),
            dynamic_shapes=(axes,) if axes else None,
            custom_translation_table=translations(),
            dynamo=True,
            verbose=False,
        )
    graph = program.model.graph
    for value in graph.outputs:
        for axis, side in enumerate(value.shape):
            if not isinstance(side, int) and side.value not in axes.values():  # a long formula
                detections = axis == 1 and value.name in ('boxes', 'scores', 'labels', 'masks')
                name = f'{value.name}_{AXES.get(axis, axis)}'
                value.shape[axis] = 'detections' if detections else name
    shapes = {
        value.name: tuple(s if isinstance(s, int) else str(s.value) for s in value.shape)
        for value in (*graph.inputs, *graph.outputs)
    }
    for node in graph:
        node.metadata_props.clear()  # stack traces of this machine
        for value in node.inputs:  # onnxscript forgets constants of fused Clips with one name
            if value is not None and value.const_value is not None and value.producer() is None:
                graph.initializers.setdefault(value.name, value)
    program.model.metadata_props['mmdense'] = json.dumps(metadata)
    program.save(file, external_data=False)
    return shapes, program.model.opset_imports['']


def _make_functional(program: torch.export.ExportedProgram) -> None:
    """Replace operators in place where nothing else reads what they overwrite.

    torch.onnx decomposes activations in place, which takes minutes for CondenseNetV2.
    """
    for module in program.graph_module.modules():  # autocast regions are modules of their own
        for node in getattr(module, 'graph', torch.fx.Graph()).nodes:
            schema = getattr(node.target, '_schema', None)
            name = schema.name.removeprefix('aten::') if schema else ''
            if not name.endswith('_') or [*node.args[0].users] != [node]:
                continue
            made = getattr(node.args[0].target, '_schema', None)
            fresh = made and not any(x.alias_info for x in made.returns)
            operator = getattr(torch.ops.aten, name[:-1], None)
            if fresh and 'dropout' not in made.name and operator:  # dropout may return its input
                node.target = getattr(operator, schema.overload_name or 'default')
        if isinstance(module, torch.fx.GraphModule):
            module.recompile()
