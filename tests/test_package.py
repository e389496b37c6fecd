"""The package as it is installed and imported, and the documents beside it."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmdense import __main__
from support import DEMOS, ROOT, TWO_ITERATIONS


def python(code):
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    """The README's imports work in the parent folder of a checkout named mmdense.

    It needs the installation that `make setup` makes.
    """
    (tmp_path / 'mmdense').symlink_to(ROOT)
    imports = re.findall(r'^(?:from|import) mmdense.*$', (ROOT / 'README.md').read_text(), re.M)
    code = '\n'.join(['import mmdense', *imports, 'print(mmdense.__version__)'])
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r'\d+\.\d+\.\d+', done.stdout.split()[-1])


def test_import_is_cheap():
    status, out, err = python(
        'import sys, mmdense, mmdense.runtime; '
        "print([m for m in ('torch', 'mmengine', 'mmcv', 'cv2') if m in sys.modules]); "
        'from mmengine.registry import MODELS; '
        "print([m for m in ('torch', 'mmcv', 'mmdet', 'mmseg') if m in sys.modules]); "
        "print(MODELS.get('mmdense.RDNet').__name__); "
        "print([m for m in ('mmdet', 'mmseg') if m in sys.modules])"
    )
    assert status == 0, err
    assert out == '[]\n[]\nRDNet\n[]'  # a detector does without mmseg, and the other way round


REGISTERED = (
    'from mmengine.config import Config; from mmengine.registry import HOOKS; '
    'print(*HOOKS.children, Config._get_cfg_path.__module__)'
)


@pytest.mark.parametrize(
    'imports',
    [
        'import mmengine, mmdense',
        'import mmdense, importlib.util; importlib.util.find_spec("mmengine")',  # is it installed?
        'import mmdense.registry',
        'import mmdense.patches',
        'from mmengine.utils import import_modules_from_strings as load; load(["mmdense"])',
    ],
)
def test_registries_are_announced_in_any_order_of_imports(imports):
    status, out, err = python(f'{imports}; {REGISTERED}')
    assert (status, out) == (0, 'mmdense mmdense.patches'), err


@pytest.mark.slow
def test_a_started_process_finds_what_it_gets(run_tool, tmp_path):
    code = """
import multiprocessing, mmdense
if __name__ == '__main__':
    from mmengine.registry import HOOKS
    hook = HOOKS.build(dict(type='mmdense.NaNGuardHook'))
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(type, [hook])[0].__name__)
"""
    (tmp_path / 'x.py').write_text(code)
    status, output = run_tool(sys.executable, tmp_path / 'x.py')
    assert (status, output.strip().splitlines()[-1]) == (0, 'NaNGuardHook'), output


@pytest.mark.parametrize('module', ['mmdense.models', 'mmdense.engine', 'mmdense.apis'])
def test_without_mm_packages_one_line_says_what_helps(module):
    hide = "import sys; sys.modules['mmengine'] = None; "
    status, out, err = python(hide + 'import mmdense; print(mmdense.__version__)')
    assert status == 0, err
    assert re.fullmatch(r'\d+\.\d+\.\d+', out)
    status, _, err = python(f'{hide}import {module}')
    assert status == 1
    assert err.splitlines()[-1] == (
        'ModuleNotFoundError: mmdense needs the MM packages, in one of two distributions that must '
        "not be mixed; in its folder: pip install -e '.[mm]' (maintained) or "
        "pip install -e '.[openmmlab]' (original)"
    )


def test_tested_versions_are_exact_and_without_addresses():
    lines = (ROOT / 'requirements/tested.txt').read_text().splitlines()
    pins = [line for line in lines if not line.startswith('#')]
    assert len(pins) > 50
    assert not [pin for pin in pins if not re.fullmatch(r'[\w.-]+==[\w.+!-]+', pin)]


@pytest.mark.slow
def test_a_wheel_trains_without_the_checkout(project, run_tool, tmp_path):
    source, site = tmp_path / 'source', tmp_path / 'site'
    listing = run_tool('git', '-C', ROOT, 'ls-files', '-co', '--exclude-standard')[1]
    files = listing.splitlines()
    for file in files:  # pip builds in the folder of the source
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, source / file, follow_symlinks=False)
    pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
    for command in (
        ['wheel', '--no-build-isolation', '--wheel-dir', tmp_path, source],
        ['install', '--find-links', tmp_path, '--target', site, 'mmdense'],
    ):
        status, output = run_tool(*pip, *command, '--no-deps', '--no-index')
        assert status == 0, output
    installed = {str(f.relative_to(site)) for f in site.rglob('*') if f.suffix != '.pyc'}
    mim = {
        f'mmdense/.mim/{f}' for f in files if f.startswith(('configs/', 'tools/', 'model-index'))
    }
    package = {f for f in files if f.startswith('mmdense/') and '/.mim/' not in f}
    assert mim | package <= installed
    assert {f.partition('/')[0] for f in installed} == {'mmdense', 'mmdense-0.1.0.dist-info'}
    assert not [f for f in installed if {'tests', 'dev'} & {*f.split('/')}]
    shutil.rmtree(source)
    config = DEMOS['detection'].name
    done = subprocess.run(
        [sys.executable, '-m', 'mmdense', 'train', f'mmdense::detection/demo/{config}', '--verbose']
        + ['--work-dir', tmp_path / 'run', '--cfg-options', *TWO_ITERATIONS['detection']],
        cwd=project,
        env={**os.environ, 'PYTHONPATH': str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/epoch_1.pth').is_file()
    assert 'Hooks will be executed' in done.stdout


@pytest.mark.parametrize(
    ('word', 'script'), [('train', ROOT / 'tools/train.py'), ('test.py', ROOT / 'test.py')]
)
def test_a_word_names_a_tool_and_anything_else_a_script(word, script, monkeypatch):
    scripts = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'path', ['', *sys.path[1:]])
    monkeypatch.setattr(sys, 'argv', ['mmdense', word, 'CONFIG'])
    monkeypatch.setattr(runpy, 'run_path', lambda path, run_name: scripts.append(path))
    __main__.main()
    assert Path(scripts[0]).resolve() == script
    assert sys.argv == [*scripts, 'CONFIG']
    assert sys.path[0] == str(script.parent)
    monkeypatch.setattr(sys, 'argv', ['mmdense'])
    with pytest.raises(SystemExit, match='tools: .* publish_model, test, train, visualize'):
        __main__.main()
