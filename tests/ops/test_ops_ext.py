"""The import of ``mmcv._ext`` and the module's attributes."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import mmcv.ops
import pytest
import torch
import torchvision

from mmdense import ops

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
GARBAGE = f'_ext{SUFFIX}', 'no machine code'
THEIRS = '_ext.py', "nms = 'theirs'"  # loads as an extension would
OSERROR = '_ext.py', "raise OSError('undefined symbol: _ZN2at\\nmore')"


def load(folder, *files):
    """Import ``mmcv._ext`` as if mmcv were in ``folder``, without replacing the loaded one."""
    for name, text in files:
        (folder / name).write_text(text)
    spec = ops._Finder().find_spec('mmcv._ext', [str(folder)])
    assert spec.name == 'mmcv._ext'
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def choose(monkeypatch):
    return lambda choice: monkeypatch.setenv('MMDENSE_OPS', choice)


@pytest.mark.parametrize('choice', [None, 'auto'])
def test_auto_uses_an_extension_that_loads(tmp_path, monkeypatch, choice):
    monkeypatch.delenv('MMDENSE_OPS', raising=False)
    if choice:
        monkeypatch.setenv('MMDENSE_OPS', choice)
    module = load(tmp_path, THEIRS)
    assert module.nms == 'theirs'
    assert module.__name__ == module.__spec__.name == 'mmcv._ext'
    assert module.__file__ == module.__spec__.origin == str(tmp_path / '_ext.py')
    monkeypatch.setitem(sys.modules, 'mmcv._ext', module)
    assert ops.backend() == 'compiled'


def test_auto_without_an_extension_is_silent(tmp_path, choose):
    choose('auto')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert callable(load(tmp_path).nms)


@pytest.mark.parametrize('files', [[GARBAGE], [OSERROR]])
def test_auto_warns_once_of_an_extension_that_fails(tmp_path, choose, files):
    choose('auto')
    with pytest.warns(UserWarning, match='does not load') as caught:
        module = load(tmp_path, *files)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert files[0][0] in message
    assert '\n' not in message
    assert 'more' not in message
    assert callable(module.nms)
    assert module.__file__ == ops.OURS


def test_torchvision_ignores_extensions(tmp_path, choose):
    choose('torchvision')
    for file in (GARBAGE, THEIRS):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert callable(load(tmp_path, file).nms)


def test_compiled_accepts_nothing_else(tmp_path, choose):
    choose('compiled')
    with pytest.raises(ImportError, match='MMDENSE_OPS=compiled.* installed without it.*=auto'):
        load(tmp_path)
    with pytest.raises(ImportError, match=re.escape(GARBAGE[0])) as error:
        load(tmp_path, GARBAGE)
    assert '\n' not in str(error.value)
    (tmp_path / GARBAGE[0]).unlink()
    assert load(tmp_path, THEIRS).nms == 'theirs'


def test_an_unknown_choice_lists_the_choices(tmp_path, choose):
    choose('tensorrt')
    with pytest.raises(ValueError, match="'tensorrt'.*auto, torchvision, compiled"):
        load(tmp_path)


def test_the_finder_finds_one_name():
    finder = ops._Finder()
    for name in ('mmcv', 'mmcv.ops', 'mmcv._ext.x', 'other._ext'):
        assert finder.find_spec(name, ['/tmp']) is None
    assert finder.find_spec('mmcv._ext', None) is None


def test_install_is_idempotent():
    ops.install()
    assert sum(isinstance(finder, ops._Finder) for finder in sys.meta_path) == 1


def test_the_module_is_complete():
    module = sys.modules['mmcv._ext']
    assert ops.backend() == 'torchvision'
    assert isinstance(module, types.ModuleType)
    assert module.__name__ == module.__spec__.name == 'mmcv._ext'
    assert importlib.import_module('mmcv._ext') is module
    assert importlib.util.find_spec('mmcv._ext') is module.__spec__
    assert pkgutil.get_loader('mmcv._ext') is not None
    assert inspect.getsourcefile(module) == ops.OURS


def test_mm_libraries_find_it():
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available

    assert check_ops_exist()
    assert mmcv_full_available()
    assert torchvision.__version__ in mmcv.ops.get_compiler_version()
    assert mmcv.ops.get_compiling_cuda_version() == (torch.version.cuda or 'not available')


def test_an_imported_extension_is_left_alone(monkeypatch):
    theirs = types.ModuleType('mmcv._ext')
    monkeypatch.setitem(sys.modules, 'mmcv._ext', theirs)
    ops.install()
    assert importlib.import_module('mmcv._ext') is theirs
    assert ops.backend() == 'compiled'


def test_other_operators_raise_when_called():
    from mmcv.ops import box_iou_rotated

    box = torch.tensor([[5.0, 5, 4, 2, 0]])
    with pytest.raises(NotImplementedError, match="'box_iou_rotated'.*MMCV_WITH_OPS=1"):
        box_iou_rotated(box, box)
    module = sys.modules['mmcv._ext']
    with pytest.raises(NotImplementedError, match="'no_such_operator'"):
        module.no_such_operator(1, a=2)
    with pytest.raises(AttributeError, match='__wrapped__'):
        module.__wrapped__  # noqa: B018


def test_parameters_are_named_as_in_the_extension():
    sources = Path(mmcv.ops.__file__).parent / 'csrc' / 'pytorch' / 'pybind.cpp'
    if not sources.exists():
        pytest.skip('this mmcv came without its sources')
    theirs = {
        name: re.findall(r'py::arg\("(\w+)"\)', rest)
        for name, rest in re.findall(r'm\.def\("(\w+)",(.*?)\);', sources.read_text(), re.DOTALL)
    }
    module = sys.modules['mmcv._ext']
    operators = {k: f for k, f in inspect.getmembers(module, inspect.isfunction) if k[0] != '_'}
    assert len(operators) == 29
    for name, operator in operators.items():
        parameters = inspect.signature(operator).parameters.values()
        # Sizes that mmcv passes by name go on as **sizes; test_ops_fuzz.py calls these by mmcv.
        ours = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        assert set(ours) <= set(theirs[name]), name
        assert len(ours) < len(parameters) or ours == theirs[name], name


def test_installing_imports_nothing_and_needs_no_mmcv():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('ops', {ops.__file__!r})
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
ops.install()
assert not {{'torch', 'mmcv', 'mmengine', 'numpy'}} & set(sys.modules)
try:
    importlib.util.find_spec('mmcv._ext')
except ModuleNotFoundError as error:
    assert error.name == 'mmcv', error
"""
    subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True, timeout=60)


def test_a_fresh_process_with_a_broken_extension(tmp_path):
    (tmp_path / GARBAGE[0]).write_text(GARBAGE[1])
    code = f"""
import warnings
import mmdense
import mmcv
mmcv.__path__.insert(0, {str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import mmcv.ops
assert [str(w.message) for w in caught if {GARBAGE[0]!r} in str(w.message)], caught
assert mmdense.ops.backend() == 'torchvision'
"""
    env = {name: value for name, value in os.environ.items() if name != 'MMDENSE_OPS'}
    options = dict(check=True, timeout=120, capture_output=True, text=True, env=env)
    subprocess.run([sys.executable, '-c', code], **options)
