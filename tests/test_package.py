"""The package as it is installed and imported, and the documents beside it."""

import os
import re
import subprocess
import sys

import pytest

from support import ROOT


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
        'import sys, mmdense; from mmengine.registry import MODELS; '
        "print([m for m in ('torch', 'mmcv', 'mmdet', 'mmseg') if m in sys.modules]); "
        "print(MODELS.get('mmdense.RDNet').__name__); "
        "print([m for m in ('mmdet', 'mmseg') if m in sys.modules])"
    )
    assert status == 0, err
    assert out == '[]\nRDNet\n[]'  # a detector does without mmseg, and the other way round


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
