"""An exported file in onnxruntime or OpenVINO."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mmdense.errors import UserError, one_line, suggest_file, suggest_name

SCHEMA = 1  # of the metadata
PACKAGES = dict(cpu='onnxruntime', cuda='onnxruntime', openvino='openvino')  # by provider

Run = Callable[[Sequence[str] | None, dict[str, np.ndarray]], dict[str, np.ndarray]]
Loaded = tuple[str, str, Sequence[int | None], Run]  # metadata; dtype and shape of the images


class Session:
    """A complete model in an ONNX file that ``tools/export_onnx.py`` wrote.

    Args:
        file: The .onnx file.
        provider: Who runs it: 'cpu' or 'cuda' (onnxruntime's), or 'openvino' (the package, on the
            CPU, in float32).
        threads: Threads of one operator on the CPU; by default as many as there are cores.

    Attributes:
        metadata: The model's description, from the file.
        dtype: Of the images.
        shape: (N, 3, H, W) of the images; None where any size will do.

    Raises:
        UserError: if there is no such file, it is not a complete model of mmdense or needs a later
            version, or the provider is not installed.
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
        load = _load_openvino if provider == 'openvino' else _load_onnxruntime
        try:
            text, dtype, shape, self._run = load(str(file), provider, threads or 0)
        except UserError:
            raise
        except Exception as error:  # onnxruntime and OpenVINO have several of their own
            raise UserError(f'{file}: cannot be loaded ({one_line(error)})') from error
        self.dtype, self.shape = np.dtype(dtype), tuple(shape)
        self.metadata: dict[str, Any] = json.loads(text or '{}')
        schema, part = self.metadata.get('schema', 0), self.metadata.get('part')
        if schema > SCHEMA:
            raise UserError(f'{file} was exported by a later mmdense: pip install -U mmdense')
        if not schema or part != 'model':
            kind = f"only the model's part {part!r}" if part else 'no model of mmdense'
            raise UserError(f'{file} is {kind}: export it by tools/export_onnx.py, without --part')

    def run(
        self, images: np.ndarray, outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the outputs, by default all, for images [N, 3, H, W] in RGB, from 0 to 255.

        Raises:
            UserError: if the model does not take images of this size or number.
        """
        try:
            return self._run(outputs, dict(images=np.ascontiguousarray(images, self.dtype)))
        except Exception as error:  # onnxruntime and OpenVINO have several of their own
            given, taken = (
                ' x '.join(str(n or 'any') for n in s) for s in (images.shape, self.shape)
            )
            raise UserError(
                f'{self.file} fails on images {given}, it takes {taken} ({one_line(error)})'
            ) from error


def _load_onnxruntime(file: str, provider: str, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    name, providers = f'{provider.upper()}ExecutionProvider', ['CPUExecutionProvider']
    if provider == 'cuda':
        providers.insert(0, name)
        if name in onnxruntime.get_available_providers() and hasattr(onnxruntime, 'preload_dlls'):
            onnxruntime.preload_dlls()  # CUDA's libraries from pip's packages
    if name not in onnxruntime.get_available_providers():
        raise UserError(
            'this onnxruntime has no CUDA: pip uninstall onnxruntime, then '
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    session = onnxruntime.InferenceSession(file, options, providers)
    if name not in session.get_providers():  # it falls back to the CPU
        raise UserError("onnxruntime cannot use the GPU: check the driver, and CUDA's version")
    names = [output.name for output in session.get_outputs()]
    images = session.get_inputs()[0]
    dtype = 'uint8' if 'uint8' in images.type else 'float32'
    shape = [n if isinstance(n, int) else None for n in images.shape]

    def run(outputs: Sequence[str] | None, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = names if outputs is None else outputs
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return session.get_modelmeta().custom_metadata_map.get('mmdense', ''), dtype, shape, run


def _load_openvino(file: str, provider: str, threads: int) -> Loaded:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    path = ['framework', 'mmdense']
    text = model.get_rt_info(path).astype(str) if model.has_rt_info(path) else ''
    options = dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=threads)
    compiled = core.compile_model(model, 'CPU', options)
    names = [output.any_name for output in compiled.outputs]

    def run(outputs: Sequence[str] | None, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = compiled(feed)
        return {name: results[name] for name in (names if outputs is None else outputs)}

    images = compiled.input(0)
    shape = [n.get_length() if n.is_static else None for n in images.partial_shape]
    return text, images.element_type.to_dtype(), shape, run
