"""An exported file in onnxruntime or OpenVINO."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mmdense.errors import UserError, explain, suggest_file, suggest_name

SCHEMA = 1  # of the metadata
PACKAGES = dict(cpu='onnxruntime', cuda='onnxruntime', openvino='openvino')  # by provider
NO_CUDA = (
    'this onnxruntime has no CUDA: pip uninstall onnxruntime, then '
    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
)


class Session:
    """A complete model in an ONNX file that ``tools/export_onnx.py`` wrote.

    ``provider`` is 'cpu' or 'cuda' of onnxruntime, or 'openvino' on the CPU in float32. ``threads``
    are those of one operator on the CPU, by default as many as there are cores. UserError if there
    is no such file, it is not a complete model of mmdense or needs a later version, or the provider
    is not installed.

    Attributes:
        metadata: The model's description, from the file.
        dtype: Of the images.
        shape: (N, 3, H, W) of the images; None where any size will do.
    """

    def __init__(
        self, file: str | Path, *, provider: str = 'cpu', threads: int | None = None
    ) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise UserError(f'no file {file}{suggest_file(file, "*.onnx")}')
        if provider not in PACKAGES:
            raise ValueError(f'no provider {provider!r}{suggest_name(provider, PACKAGES)}')
        if not find_spec(PACKAGES[provider]):
            raise UserError(f'{PACKAGES[provider]} is missing: pip install {PACKAGES[provider]}')
        load = self._load_openvino if provider == 'openvino' else self._load_onnxruntime
        with explain(f'{file}: cannot be loaded'):
            text, dtype = load(provider, threads or 0)
        self.dtype = np.dtype('uint8' if 'uint8' in dtype else 'float32')
        self.metadata: dict[str, Any] = json.loads(text or '{}')
        schema, part = self.metadata.get('schema', 0), self.metadata.get('part')
        if schema > SCHEMA:
            raise UserError(f'{file} was exported by a later mmdense: pip install -U mmdense')
        if not schema or part != 'model':
            kind = f"only the model's part {part!r}" if part else 'no model of mmdense'
            raise UserError(f'{file} is {kind}: export it by tools/export_onnx.py, without --part')

    def _load_onnxruntime(self, provider: str, threads: int) -> tuple[str, str]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if os.environ.get('OMP_WAIT_POLICY', '').lower() == 'passive':  # as torch's threads then
            options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        name = f'{provider.upper()}ExecutionProvider'
        if name not in onnxruntime.get_available_providers():
            raise UserError(NO_CUDA)
        if provider == 'cuda' and hasattr(onnxruntime, 'preload_dlls'):
            onnxruntime.preload_dlls()  # CUDA's libraries from pip's packages
        session = onnxruntime.InferenceSession(self.file, options, [name])
        if name not in session.get_providers():  # it falls back to the CPU
            raise UserError("onnxruntime cannot use the GPU: check the driver, and CUDA's version")
        self._run, (images,) = session.run, session.get_inputs()
        self._names = [output.name for output in session.get_outputs()]
        self.shape = tuple(n if isinstance(n, int) else None for n in images.shape)
        return session.get_modelmeta().custom_metadata_map.get('mmdense', ''), images.type

    def _load_openvino(self, provider: str, threads: int) -> tuple[str, str]:
        import openvino

        core, path = openvino.Core(), ['framework', 'mmdense']
        model = core.read_model(self.file)
        options = dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=threads)
        compiled = core.compile_model(model, 'CPU', options)
        self._run = lambda names, feed: [*map(compiled(feed).__getitem__, names)]
        self._names, (images,) = [o.any_name for o in compiled.outputs], compiled.inputs
        self.shape = tuple(n.get_length() if n.is_static else None for n in images.partial_shape)
        text = model.get_rt_info(path).astype(str) if model.has_rt_info(path) else ''
        return text, str(images.element_type)

    def run(
        self, images: np.ndarray, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the outputs, by default all, for images [N, 3, H, W] in RGB, from 0 to 255.

        UserError if the model does not take images of this size or number.
        """
        names = self._names if outputs is None else outputs
        shapes = images.shape, self.shape
        given, taken = (' x '.join(str(n or 'any') for n in shape) for shape in shapes)
        with explain(f'{self.file} fails on images {given}, it takes {taken}'):
            values = self._run(names, dict(images=np.ascontiguousarray(images, self.dtype)))
        return dict(zip(names, values, strict=True))
