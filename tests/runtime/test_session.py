"""Exported files in onnxruntime and OpenVINO."""

import numpy as np
import pytest
from onnx import TensorProto

from mmdense.errors import UserError
from mmdense.runtime.session import PACKAGES, Session
from onnx_files import write_detector, write_segmentor

IMAGES = np.stack([np.full((3, 8, 12), value, np.uint8) for value in (100, 200)])


@pytest.mark.parametrize('provider', ['cpu', 'openvino'])
def test_outputs_of_batches(provider, tmp_path):
    if provider == 'openvino':
        pytest.importorskip('openvino')
    file = write_detector(tmp_path / 'x.onnx', [[1, 2, 3, 4]] * 2, [0.5, 0.4], [1, 0])
    session = Session(file, provider=provider, threads=1)
    assert session.metadata['classes'] == ['cat', 'dog']
    assert (session.dtype, session.shape) == (np.uint8, (None, 3, None, None))
    found = session.run(IMAGES)
    assert {name: value.shape for name, value in found.items()} == dict(
        boxes=(2, 2, 4), scores=(2, 2), labels=(2, 2)
    )
    np.testing.assert_allclose(found['scores'], [[0.6, 0.5], [0.7, 0.6]], atol=1e-6)
    assert list(session.run(IMAGES[:1], ['labels'])) == ['labels']


def test_images_get_the_type_of_the_file(tmp_path):
    file = write_segmentor(tmp_path / 'x.onnx', dtype=TensorProto.FLOAT)
    session = Session(file)
    assert session.dtype == np.float32
    np.testing.assert_allclose(session.run(IMAGES, ['logits'])['logits'][1], 2, atol=1e-6)


@pytest.mark.parametrize(('policy', 'spinning'), [('passive', ['0']), ('active', [])])
def test_waiting_threads_sleep_where_those_of_torch_do(policy, spinning, tmp_path, monkeypatch):
    import onnxruntime

    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, name, value):
            entries.append(value)
            super().add_session_config_entry(name, value)

    monkeypatch.setattr(onnxruntime, 'SessionOptions', Options)
    monkeypatch.setenv('OMP_WAIT_POLICY', policy)
    Session(write_segmentor(tmp_path / 'x.onnx'))
    assert entries == spinning


def test_errors_are_one_line(tmp_path):
    def detector(name, **options):
        return write_detector(tmp_path / name, [[1, 2, 3, 4]], [0.5], [1], **options)

    (tmp_path / 'text.onnx').write_text('text')
    for file, message in (
        (tmp_path / 'nothing.onnx', r'^no file .*nothing\.onnx'),
        (tmp_path / 'text.onnx', 'cannot be loaded'),
        (detector('a.onnx', schema=0, part=None), 'is no model of mmdense: export it by'),
        (detector('b.onnx', schema=99), r'exported by a later mmdense: pip install -U mmdense$'),
        (detector('c.onnx', part='neck'), "is only the model's part 'neck': export it by"),
    ):
        with pytest.raises(UserError, match=message) as error:
            Session(file)
        assert '\n' not in str(error.value)
    with pytest.raises(
        UserError, match='images 2 x 3 x 8 x 12, it takes 1 x 3 x 16 x any '
    ) as error:
        Session(detector('d.onnx', shape=[1, 3, 16, 'W'])).run(IMAGES)
    assert '\n' not in str(error.value)


@pytest.mark.filterwarnings('ignore:Specified provider')
def test_providers_that_are_missing(tmp_path, monkeypatch):
    import onnxruntime

    file = write_detector(tmp_path / 'x.onnx', [[1, 2, 3, 4]], [0.5], [1])
    with pytest.raises(ValueError, match="no provider 'gpu'"):
        Session(file, provider='gpu')
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['CPUExecutionProvider'])
    with pytest.raises(UserError, match='this onnxruntime has no CUDA: pip uninstall'):
        Session(file, provider='cuda')
    providers = ['CUDAExecutionProvider', 'CPUExecutionProvider']  # but no driver
    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: providers)
    with pytest.raises(UserError, match='onnxruntime cannot use the GPU'):
        Session(file, provider='cuda')
    monkeypatch.setitem(PACKAGES, 'openvino', 'package_that_is_not_installed')
    with pytest.raises(UserError, match='is missing: pip install package_that'):
        Session(file, provider='openvino')
