"""tools/doctor.py where something is broken: what fails is put in front of the real packages."""

import http.server
import json
import os
import resource
import stat
import subprocess
import sys
import threading

import pytest

from mmdense import doctor
from support import DEMOS, ROOT

TOOL = ROOT / 'tools/doctor.py'
# Stand-ins for all packages that are tried, so that only what is broken counts.
FAKES = {
    'numpy': "__version__ = '2.2'",
    'torch': 'from types import SimpleNamespace as _N\n'
    "__version__, version = '2.9.0+cpu', _N(cuda=None, hip=None)\n"
    'cuda = _N(is_available=lambda: False)',
    'torchvision': '',
    'timm': '',
    'cv2': 'imread = None',
    'mmengine': '',
    'mmengine.registry': 'class Registry:\n'
    '    def __init__(self, *args, **kwargs): pass\n'
    'def __getattr__(name): return Registry',
    'mmcv': '',
    'mmcv.ops': 'import mmcv._ext',
    'mmcv._ext': '',
    'mmdet': '',
    'mmseg': '',
}
BLOCK = """
import os, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in os.environ['BLOCKED'].split():
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Block())
"""


def distribution(name, version, *requires):
    """What pip leaves of a distribution, as a path and a text."""
    lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}']
    lines += [f'Requires-Dist: {wish}' for wish in requires]
    return f'{name.replace("-", "_")}-{version}.dist-info/METADATA', '\n'.join(lines) + '\n'


@pytest.fixture
def run_doctor(tmp_path):
    """Run the tool over stand-ins, some of them replaced; return (status, findings by check)."""

    def run(broken=(), *options, blocked='', files=(), **env):
        folder = tmp_path / 'packages'
        modules = {**FAKES, **dict(broken)}
        packages = {name.partition('.')[0] for name in modules}
        for name, text in modules.items():
            path = name.replace('.', '/')
            write(folder / (f'{path}/__init__.py' if name in packages else f'{path}.py'), text)
        for path, text in (('sitecustomize.py', BLOCK), *files):
            write(folder / path, text)
        env = {**os.environ, 'PYTHONPATH': str(folder), 'BLOCKED': blocked, **env}
        done = subprocess.run(
            [sys.executable, TOOL, '--json', *options],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stderr == ''
        said = json.loads(done.stdout)
        found = {}
        for finding in said['findings']:
            assert '\n' not in finding['says']
            assert bool(finding['mend']) == (finding['level'] != 'ok'), finding
            # Of several the worst counts.
            order = 'ok', 'warning', 'error'
            known = found.get(finding['check'])
            if known is None or order.index(known['level']) < order.index(finding['level']):
                found[finding['check']] = finding
        return done.returncode, found

    return run


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def levels(found, level):
    return {name for name, finding in found.items() if finding['level'] == level}


def test_nothing_is_wrong(run_doctor):
    status, found = run_doctor()
    assert status == 0, found
    assert not levels(found, 'error')
    assert 'compiled' in found['operators']['says']
    for name in doctor.PACKAGES:
        assert found[name]['level'] == 'ok'


LIBGL = "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
SEGFAULT = 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)'


@pytest.mark.parametrize(
    ('name', 'code', 'says', 'mend', 'skipped'),
    [
        ('cv2', LIBGL, 'libGL.so.1', '--no-deps opencv-python-headless', 'mmcv mmdet mmseg'),
        (
            'torchvision',
            "raise RuntimeError('operator torchvision::nms does not exist')",
            'operator torchvision::nms does not exist',
            '--force-reinstall torch torchvision',
            'timm operators',
        ),
        ('timm', SEGFAULT, 'the process ends: SIGSEGV', '--no-deps timm==', ''),
        ('mmdet', 'import os; os._exit(3)', 'the process ends: status 3', 'mmdet', ''),
        ('mmseg', 'raise SystemExit("bye")', 'SystemExit: bye', 'mmseg', ''),
        ('mmseg', 'import ftfy_', 'mmseg needs ftfy_, which is not', 'pip install ftfy_', ''),
        ('torch', '1 / 0', 'ZeroDivisionError', 'torch torchvision', 'torchvision timm mmdet'),
    ],
)
def test_a_package_that_breaks_is_named_and_mended(run_doctor, name, code, says, mend, skipped):
    status, found = run_doctor({name: code})
    assert status == 1
    assert says in found[name]['says']
    assert mend in found[name]['mend']
    assert levels(found, 'error') == {name}
    for other in skipped.split():
        assert found[other]['level'] == 'warning'
        assert 'not tried' in found[other]['says']


@pytest.mark.parametrize('name', ['mmcv', 'mmengine', 'torch', 'torchvision', 'cv2', 'timm'])
def test_a_package_whose_files_are_gone(run_doctor, name):
    status, found = run_doctor(blocked=f'{name} rich packaging')
    assert status == 1
    assert levels(found, 'error') == {name}
    assert 'No module named' in found[name]['says']
    assert 'pip' in found[name]['mend']


def test_a_package_that_is_not_installed():
    results = {name: dict(facts=dict(file=__file__, version='1')) for name in doctor.PACKAGES}
    results['mmdense'] = results['numpy']
    results['mmcv'] = dict(error='ModuleNotFoundError: mmcv', missing='mmcv')
    for installed, extra in (({}, '[mm]'), ({'mmengine': '0.10.7'}, '[openmmlab]')):
        (finding,) = (f for f in doctor.check_imports(results, installed) if f.level == 'error')
        assert finding.says == 'mmcv is not installed'
        assert finding.mend.endswith(f"pip install -e '{ROOT}{extra}'")


def test_numpy_two_against_an_old_package(run_doctor):
    old = "raise ImportError('numpy.core.multiarray failed to import')"
    _, found = run_doctor({'mmdet': old})
    assert '--upgrade --force-reinstall --no-deps' in found['mmdet']['mend']


def test_what_an_uninstallation_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / 'remains').mkdir()
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    results = doctor.run_steps(['remains'])
    assert results['remains']['error'].endswith('remains is a folder without the package')


def test_an_import_that_never_ends(tmp_path, monkeypatch):
    write(tmp_path / 'timm.py', 'import time; time.sleep(600)')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(doctor, 'LIMIT', 2)
    results = doctor.run_steps(['timm'])
    assert results['timm']['error'] == 'the process ends: no answer within 2 seconds'


def test_versions_that_do_not_fit(run_doctor):
    files = (
        distribution('torchvision', '0.19.0', 'torch==2.4.0'),
        distribution('torch', '2.9.0'),
    )
    status, found = run_doctor(files=files)
    assert status == 1
    assert found['versions']['says'] == ('torchvision wants torch==2.4.0, 2.9.0 is installed')
    assert found['versions']['mend'].endswith('--force-reinstall torch torchvision')


# Of the distribution that isn't installed.
OTHERS = 'mmdet' if 'onedl-mmdetection' in doctor.versions() else 'onedl-mmdetection'


@pytest.mark.parametrize(
    ('file', 'says', 'mend'),
    [
        (distribution('timm', '0.9.0'), 'mmdense wants timm>=', "install 'timm>="),
        (distribution(OTHERS, '3.3.0'), 'several distributions are mixed', 'uninstall -y'),
        (distribution('mmcv-full', '1.7.0'), 'several distributions are mixed', 'mmcv-full'),
    ],
)
def test_distributions_that_do_not_fit(run_doctor, file, says, mend):
    status, found = run_doctor(files=[file])
    assert status == 1
    assert says in found['versions']['says']
    assert mend in found['versions']['mend']


def test_opencv_twice_in_different_versions(run_doctor):
    files = (
        distribution('opencv-python', '4.1.0'),
        distribution('opencv-python-headless', '4.2.0'),
    )
    status, found = run_doctor(files=files)
    assert status == 0
    assert 'opencv-python-headless 4.2.0 and opencv-python 4.1.0' in found['versions']['says']
    assert 'uninstall -y opencv-python-headless opencv-python &&' in found['versions']['mend']


def test_an_extension_that_does_not_load_and_a_choice_that_fails(run_doctor):
    broken = {'mmcv._ext': "raise ImportError('undefined symbol: _ZN2at')"}
    status, found = run_doctor(broken, MMDENSE_OPS='compiled')
    assert status == 1
    assert found['operators']['mend'] == 'unset MMDENSE_OPS'
    assert 'undefined symbol' in found['operators']['says']
    _, found = run_doctor(MMDENSE_OPS='tensorrt')
    assert "MMDENSE_OPS='tensorrt' is unknown" in found['operators']['says']


def test_operators_are_told_with_the_reason():
    facts = dict(backend='torchvision', choice='auto', compiled=None)
    (finding,) = doctor.check_operators(dict(facts=facts, warnings=[]))
    assert finding.says.startswith("torchvision's, as mmcv came without its compiled extension")
    facts = dict(backend='torchvision', choice='torchvision', compiled='/x/_ext.so')
    (finding,) = doctor.check_operators(dict(facts=facts, warnings=[]))
    assert finding.says == "torchvision's, as MMDENSE_OPS=torchvision leaves out /x/_ext.so"
    warning = "mmcv's compiled extension is not used: /x/_ext.so (does not load)"
    (finding,) = doctor.check_operators(dict(facts=facts, warnings=[warning]))
    assert (finding.level, finding.mend) == ('warning', 'export MMDENSE_OPS=torchvision')


def test_a_torch_for_cpus_beside_a_gpu(run_doctor, tmp_path):
    smi = tmp_path / 'bin/nvidia-smi'
    write(smi, '#!/bin/sh\necho "NVIDIA H200"\n')
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    path = f'{smi.parent}:{os.environ["PATH"]}'
    env = dict(PATH=path, CUDA_VISIBLE_DEVICES='')
    status, found = run_doctor(**env)
    assert status == 0
    assert found['gpu']['mend'] == 'unset CUDA_VISIBLE_DEVICES'
    del env['CUDA_VISIBLE_DEVICES']
    if 'CUDA_VISIBLE_DEVICES' not in os.environ:
        _, found = run_doctor(**env)
        assert found['gpu']['says'].startswith('NVIDIA H200 is not used: torch 2.9.0+cpu was built')
        assert '--index-url https://pypi.org/simple torch==' in found['gpu']['mend']


FACTS = dict(torch='2.9', built_for='12.8', hip=False, devices=[], architectures=[], hidden=None)


@pytest.mark.parametrize(
    ('capability', 'architectures', 'level'),
    [
        ((8, 6), ['sm_80', 'sm_90'], 'ok'),
        ((8, 0), ['sm_86'], 'error'),
        ((6, 1), ['sm_75', 'sm_90', 'compute_90'], 'error'),
        ((10, 0), ['sm_75', 'compute_90'], 'ok'),  # compiled by the driver
        ((12, 0), ['sm_90a'], 'error'),
        ((9, 0), ['sm_90a'], 'ok'),
    ],
)
def test_kernels_for_a_gpu(capability, architectures, level):
    facts = {**FACTS, 'devices': [('A card', capability)], 'architectures': architectures}
    (finding,) = doctor.check_gpu(dict(facts=facts), ['A card'], {})
    assert finding.level == level
    assert 'compute capability' in finding.says


def test_drivers_and_machines_without_a_gpu():
    for warning, mend in (
        ('CUDA initialization: The NVIDIA driver on your system is too old (...)', '/whl/cu126'),
        ('CUDA initialization: CUDA unknown error', 'modprobe nvidia_uvm'),
    ):
        result = dict(facts=FACTS, warnings=['other', warning])
        (finding,) = doctor.check_gpu(result, ['A card'], {})
        assert finding.says.endswith(f'built for CUDA 12.8: {warning}')
        assert mend in finding.mend
    (finding,) = doctor.check_gpu(dict(facts=FACTS), [], {})
    assert finding.level == 'ok'
    assert not [*doctor.check_gpu(dict(needs='torch'), ['A card'], {})]


def test_a_machine_that_is_too_small(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, 'SHARED_MEMORY', 1 << 60)
    monkeypatch.setattr(doctor, 'FREE', dict(work_dirs=1 << 60, cache=1 << 60))
    monkeypatch.setenv('MMDENSE_WEIGHTS', str(tmp_path / 'none'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        found = [*doctor.check_machine()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {(f.check, f.level) for f in found} == {
        ('shared memory', 'warning'),
        ('open files', 'warning'),
        ('work_dirs', 'warning'),
        ('cache', 'warning'),
        ('weights', 'error'),
        ('weights', 'warning'),
    }
    mends = ' '.join(f.mend for f in found)
    for command in (
        'mount -o remount,size=8G /dev/shm',
        f'ulimit -n {hard}',
        'mkdir -p',
        'HF_HOME',
    ):
        assert command in mends


def test_a_disk_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, 'access', lambda *args: False)  # root may write anywhere
    finding = doctor.check_disk('cache', tmp_path / 'a/b', 'mend')
    assert finding == doctor.Finding('cache', 'error', f'{tmp_path} cannot be written to', 'mend')


def test_it_needs_nothing_but_python(run_doctor, tmp_path):
    run_doctor()  # writes the stand-ins
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'packages'), 'BLOCKED': ''}
    done = subprocess.run(
        [sys.executable, '-S', TOOL], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr == ''
    assert 'error    versions: mmdense is not installed\n' in done.stdout
    assert f'mend it by: {sys.executable} -m pip install -e' in done.stdout
    assert '\x1b' not in done.stdout


# A config; these need the real packages.


@pytest.fixture
def config(tmp_path):
    def write_config(checkpoint):
        path = tmp_path / 'config.py'
        init = dict(type='Pretrained', checkpoint=checkpoint)
        text = f'_base_ = [{str(DEMOS["detection"])!r}]\n'
        path.write_text(f'{text}model = dict(backbone=dict(init_cfg={init!r}))\n')
        return str(path)

    return write_config


def of(rows, check):
    return [row for row in rows if row['check'] == check]


def test_a_config_whose_data_and_weights_are_missing(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('MMDENSE_WEIGHTS', str(tmp_path))
    path = config('timm://rdnet_tiny.nv_in1k')
    rows = doctor.look_at_config(path)
    assert of(rows, 'config')[0]['level'] == 'ok'
    assert [row['level'] for row in of(rows, 'data')] == ['error'] * 3
    assert of(rows, 'data')[0]['mend'] == 'python tools/make_demo_dataset.py --out data/digits/'
    (weights,) = of(rows, 'weights')
    assert weights['level'] == 'error'
    assert 'HF_HUB_OFFLINE is set' in weights['says']
    assert f'-o {tmp_path}/rdnet_tiny.nv_in1k.safetensors https://' in weights['mend']
    (tmp_path / 'rdnet_tiny.nv_in1k.safetensors').write_bytes(b'weights')
    (weights,) = of(doctor.look_at_config(path), 'weights')
    assert weights['level'] == 'ok'
    for name, says in (('none.pth', 'no checkpoint'), ('timm://rdnet_tini', 'did you mean')):
        (weights,) = of(doctor.look_at_config(config(name)), 'weights')
        assert says in weights['says']
    (row,) = doctor.look_at_config(f'{path}x')
    assert 'did you mean' in row['says']


def test_an_address_is_asked_for_an_answer_alone(config, tmp_path, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200 if 'here' in self.path else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        assert doctor.answers(f'{address}/here.pth') is None
        assert 'HTTP Error 404' in doctor.answers(f'{address}/gone.pth')
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ['/here.pth', '/gone.pth']
    assert 'refused' in doctor.answers(f'{address}/here.pth')


@pytest.mark.slow
def test_the_real_installation_is_healthy(project, run_tool):
    status, said = run_tool(sys.executable, TOOL, '--json', '--config', DEMOS['detection'])
    found = json.loads(said)
    assert status == 0, said
    checks = {finding['check'] for finding in found['findings']}
    assert checks >= {*doctor.PACKAGES, 'operators', 'config', 'data', 'gpu'}
    assert found['versions']['torch']
