"""tools/doctor.py with broken packages, which stand-ins in front of the real ones imitate."""

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest

from support import DEMOS, ROOT, load_tool

doctor = load_tool('doctor')

# Stand-ins for all packages: they import in milliseconds, and only what a test breaks is broken.
FAKES = {
    'numpy/__init__.py': '',
    'torch/__init__.py': 'from types import SimpleNamespace as _N\n'
    "__version__, version = '2.9.0+cpu', _N(cuda=None, hip=None)\n"
    'cuda = _N(is_available=lambda: False)',
    'torchvision.py': '',
    'timm.py': '',
    'cv2.py': 'imread = None',
    'mmengine/__init__.py': '',
    'mmengine/registry.py': 'class Registry:\n'
    '    name = None\n'
    '    def __init__(self, *args, **kwargs): pass\n'
    'def __getattr__(name): return Registry',
    'mmengine/config.py': 'class Config: _get_cfg_path = None\nclass utils: MODULE2PACKAGE = {}',
    'mmengine/logging.py': 'MMLogger = logger = None',
    'mmcv/__init__.py': '',
    'mmcv/ops.py': 'import mmcv._ext',
    'mmcv/_ext.py': '',
    'mmdet.py': '',
    'mmseg.py': '',
}


def distribution(name, version, *requires):
    """Return the path and the text of a distribution's metadata."""
    lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}']
    lines += [f'Requires-Dist: {requirement}' for requirement in requires]
    return f'{name.replace("-", "_")}-{version}.dist-info/METADATA', '\n'.join(lines) + '\n'


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Return a function that writes stand-ins, some of them replaced, in front of the packages."""
    folder = tmp_path / 'packages'
    monkeypatch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{ROOT}')
    monkeypatch.syspath_prepend(str(folder))  # for the distributions
    monkeypatch.chdir(tmp_path)

    def write(files=()):
        for path, text in {**FAKES, **dict(files)}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)

    return write


@pytest.fixture
def examine(stand_ins, capsys):
    """Run the command over stand-ins; return (status, the worst finding of each check)."""

    def run(files=()):
        stand_ins(files)
        with pytest.raises(SystemExit) as ended:
            doctor.main(['--json'])
        rows = json.loads(capsys.readouterr().out)['findings']
        for row in rows:
            assert '\n' not in row['message']
            assert bool(row['fix']) == (row['level'] != 'ok'), row
        rows.sort(key=lambda row: ('ok', 'warning', 'error').index(row['level']))
        return int(ended.value.code), {row['check']: row for row in rows}

    return run


def levels(rows, level):
    return {name for name, row in rows.items() if row['level'] == level}


def test_an_intact_installation(examine):
    status, rows = examine()
    assert status == 0, rows
    assert not levels(rows, 'error')
    checks = {'operators', 'gpu', 'requirements', 'shared memory', 'disk'}
    assert {*doctor.PACKAGES, *checks} <= rows.keys()


LIBGL = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
SEGFAULT = 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'
NMS = "raise RuntimeError('operator torchvision::nms does not exist')"
NUMPY_ABI = "raise ImportError('numpy.core.multiarray failed to import')"
GONE = "raise ModuleNotFoundError('No module named timm', name='timm')"


@pytest.mark.parametrize(
    ('file', 'code', 'message', 'fix', 'skipped'),
    [
        ('cv2.py', LIBGL, 'libGL.so.1', 'opencv-python-headless', 'mmcv mmdense mmdet operators'),
        ('cv2.py', '', "no attribute 'imread'", 'opencv-python-headless', 'mmcv'),
        ('torchvision.py', NMS, 'torchvision::nms', 'torch torchvision', 'timm mmdense'),
        ('timm.py', SEGFAULT, 'killed by SIGSEGV', '--no-deps timm==', ''),
        ('timm.py', GONE, 'No module named timm', 'pip install', ''),
        ('mmseg.py', 'import os; os._exit(3)', 'exits with status 3', 'mmseg', ''),
        ('mmseg.py', 'raise SystemExit("bye")', 'SystemExit: bye', 'mmseg', ''),
        ('mmseg.py', 'import ftfy_', 'mmseg needs ftfy_, which is not', 'pip install ftfy_', ''),
        ('mmdet.py', NUMPY_ABI, 'numpy.core', '--upgrade --force-reinstall --no-deps', ''),
        ('mmcv/_ext.py', '1 / 0', 'ZeroDivisionError', 'torch torchvision', ''),
        ('torch/__init__.py', '1 / 0', 'ZeroDivisionError', 'torch torchvision', 'mmengine timm'),
    ],
)
def test_a_broken_package_is_named_with_its_fix(
    file, code, message, fix, skipped, examine, monkeypatch
):
    monkeypatch.setattr(doctor, 'check_requirements', tuple)  # pip takes its time
    status, rows = examine({file: code})
    name = 'operators' if file == 'mmcv/_ext.py' else file.partition('.')[0].partition('/')[0]
    assert status == 1
    assert levels(rows, 'error') == {name}
    assert message in rows[name]['message']
    assert fix in rows[name]['fix']
    for other in skipped.split():
        assert rows[other]['level'] == 'warning'
        assert 'not checked' in rows[other]['message']


def test_an_import_that_never_ends_and_an_empty_folder(stand_ins, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, 'TIMEOUT', 2)
    (tmp_path / 'packages/remains').mkdir(parents=True)
    (tmp_path / 'packages/hangs.py').write_text('import time; time.sleep(600)')
    results = doctor.run_probes(['remains', 'hangs'])
    assert results['remains']['error'].endswith('remains is a folder without the package')
    assert results['hangs']['error'] == 'no result within 2 seconds'


def test_operators(examine, monkeypatch):
    def import_module(name):
        if name == 'mmcv.ops':
            warnings.warn("mmcv's compiled extension is not used")
        return SimpleNamespace(backend=lambda: 'torchvision', VARIABLE='MMDENSE_OPS')

    monkeypatch.setattr(doctor, 'check_requirements', tuple)
    monkeypatch.setenv('MMDENSE_OPS', 'compiled')
    _, rows = examine({'mmcv/_ext.py': "raise ImportError('undefined symbol: _ZN2at')"})
    assert 'undefined symbol' in rows['operators']['message']
    assert rows['operators']['fix'] == 'unset MMDENSE_OPS'
    monkeypatch.setattr(doctor.importlib, 'import_module', import_module)
    text = doctor.probe_operators()
    assert text.startswith('mmcv.ops: torchvision (MMDENSE_OPS=compiled); mmcv')


# Of the MM distribution that is not installed.
OTHER = 'mmdet' if doctor.installed(['onedl-mmdetection']) else 'onedl-mmdetection'


@pytest.mark.parametrize(
    ('files', 'check', 'level', 'message', 'fix'),
    [
        (
            [('torchvision', '0.19.0', 'torch==2.4.0'), ('torch', '2.9.0')],
            *('requirements', 'error', 'torchvision 0.19.0', 'torch torchvision'),
        ),
        (
            [('timm', '0.9.0'), ('mmdense', '0.1.0', 'timm>=1.0.31; extra == "mm"')],
            *('requirements', 'error', 'timm>=1.0.31, but 0.9.0 is', "install 'timm>=1.0.31'"),
        ),
        ([('a', '1', 'nosuch>1')], 'requirements', 'warning', 'nosuch', 'install nosuch'),
        ([(OTHER, '3.3.0')], 'distributions', 'error', 'over each other', 'uninstall -y'),
        ([('mmcv-full', '1.7.0')], 'distributions', 'error', 'over each other', 'mmcv-full'),
        (
            [('opencv-python', '4.1.0'), ('opencv-python-headless', '4.2.0')],
            *('distributions', 'warning', 'opencv-python 4.1.0', 'uninstall -y opencv'),
        ),
    ],
)
def test_distributions_that_do_not_fit(examine, files, check, level, message, fix):
    status, rows = examine(distribution(*file) for file in files)
    assert status == (level == 'error')
    assert rows[check]['level'] == level
    assert message in rows[check]['message']
    assert fix in rows[check]['fix']


FACTS = dict(torch='2.9', built_for='12.8', devices=[], reason='unknown')


@pytest.mark.parametrize(
    ('gpus', 'facts', 'level', 'fix'),
    [
        ('', {}, 'ok', ''),
        ('A card', dict(devices=[['A card', None]]), 'ok', ''),
        ('A card', dict(devices=[['A card', 'no kernel image']]), 'error', 'torch torchvision'),
        ('A card', dict(built_for=None), 'warning', 'pypi.org'),
        ('A card', dict(reason='driver is too old'), 'warning', '/whl/cu126'),
        ('A card', {}, 'warning', 'modprobe nvidia_uvm'),
    ],
)
def test_gpus(gpus, facts, level, fix, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    (finding,) = doctor.check_gpu(gpus, **{**FACTS, **facts})
    assert finding.level == level
    assert fix in finding.fix


def test_a_hidden_gpu(examine, tmp_path, monkeypatch):
    smi = tmp_path / 'bin/nvidia-smi'
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\necho "NVIDIA H200"\n')
    smi.chmod(0o755)
    monkeypatch.setenv('PATH', f'{smi.parent}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    _, rows = examine()
    assert rows['gpu']['message'] == 'NVIDIA H200 is hidden by CUDA_VISIBLE_DEVICES='
    assert rows['gpu']['fix'] == 'unset CUDA_VISIBLE_DEVICES'


def test_a_full_or_read_only_disk(monkeypatch):
    full = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda path: full)
    rows = [*doctor.check_machine()]
    assert [row.level for row in rows] == ['warning'] * 3
    assert [fix in row.fix for row, fix in zip(rows, ('8G', '--work-dir', 'HF_HOME'), strict=True)]
    monkeypatch.setattr(doctor.os, 'access', lambda *args: False)  # root may write anywhere
    assert {row.level for row in doctor.check_machine()} == {'error'}


def test_it_needs_nothing_but_python(stand_ins):
    """One real process, as a user runs it."""
    stand_ins({'torch/__init__.py': '1 / 0'})
    command = [sys.executable, '-S', ROOT / 'tools/doctor.py']
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, '')
    assert 'error    torch: torch fails: ZeroDivisionError' in done.stdout
    assert f'fix: {sys.executable} -m pip install --force-reinstall torch' in done.stdout


# A config


def test_a_config_without_data_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('MMDENSE_WEIGHTS', str(tmp_path))

    def probe(checkpoint):
        init = dict(type='Pretrained', checkpoint=checkpoint)
        text = (
            f'_base_ = [{str(DEMOS["detection"])!r}]\nmodel = dict(backbone=dict(init_cfg={init}))'
        )
        (tmp_path / 'config.py').write_text(text)
        rows = doctor.probe_config(str(tmp_path / 'config.py'))
        return rows, rows[-1]

    rows, weights = probe('timm://rdnet_tiny.nv_in1k')
    assert [row.level for row in rows] == ['ok', *['error'] * 4]
    assert rows[1].fix == 'python tools/make_demo_dataset.py --out data/digits/'
    assert 'HF_HUB_OFFLINE is set' in weights.message
    assert f'-o {tmp_path}/rdnet_tiny.nv_in1k.safetensors https://' in weights.fix
    (tmp_path / 'rdnet_tiny.nv_in1k.safetensors').write_bytes(b'weights')
    assert probe('timm://rdnet_tiny.nv_in1k')[1].level == 'ok'
    for name, message in (('none.pth', 'no checkpoint'), ('timm://rdnet_tini', 'did you mean')):
        assert message in probe(name)[1].message


def test_weights_are_not_downloaded(monkeypatch):
    def urlopen(request, timeout):
        assert request.method == 'HEAD'
        if 'gone' in request.full_url:
            raise HTTPError(request.full_url, 404, 'Not Found', {}, None)
        return nullcontext()

    monkeypatch.setattr(doctor, 'urlopen', urlopen)
    assert doctor.check_weights('x', 'http://host/here.pth').level == 'ok'
    assert 'HTTP Error 404' in doctor.check_weights('x', 'http://host/gone.pth').message


@pytest.mark.slow
def test_the_real_installation(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as ended:
        doctor.main(['--json', '--config', str(DEMOS['detection'])])
    document = json.loads(capsys.readouterr().out)
    assert not ended.value.code, document
    checks = {row['check'] for row in document['findings']}
    assert checks >= {*doctor.PACKAGES, 'operators', 'config', 'data', 'gpu'}
    assert document['versions']['torch']
    assert document['environment']['MMEngine']
