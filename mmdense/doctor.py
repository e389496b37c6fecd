"""What is wrong with an installation, and the command that mends it.

This file imports nothing outside the standard library, and ``tools/doctor.py`` loads it without its
package: it must run where mmengine, torch or mmdense itself cannot be imported. Packages are tried
in a process of their own, since a broken one may end it or never answer.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

__all__ = ['Finding', 'examine', 'versions']

ROOT = Path(__file__).resolve().parents[1]
PIP = f'{shlex.quote(sys.executable)} -m pip'
TORCH_PAIR = f'{PIP} install --force-reinstall torch torchvision'  # pip fits them together
# PyPI's torch for Linux has CUDA; builds for other versions of it are with its makers.
PYPI, WHEELS = 'https://pypi.org/simple', 'https://download.pytorch.org/whl'
LIMIT = 600  # seconds for all imports, which a cold disk or a busy machine may need

# Import names, and the distributions that bring them: one of each row may be installed.
PACKAGES = dict(
    numpy=('numpy',),
    torch=('torch',),
    torchvision=('torchvision',),
    timm=('timm',),
    cv2=(
        'opencv-python-headless',
        'opencv-python',
        'opencv-contrib-python',
        'opencv-contrib-python-headless',
    ),
    mmengine=('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    mmcv=('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    mmdet=('onedl-mmdetection', 'mmdet'),
    mmseg=('onedl-mmsegmentation', 'mmsegmentation'),
)
MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
MAINTAINED = 'onedl-'
# What a step cannot work without: a package that fails is blamed once.
NEEDS = dict(
    torchvision=('torch',),
    timm=('torch', 'torchvision'),
    cv2=('numpy',),
    mmcv=('numpy', 'cv2', 'mmengine'),
    mmdet=('torch', 'mmcv'),
    mmseg=('torch', 'mmcv'),
    mmdense=('mmengine',),
    operators=('torch', 'torchvision', 'mmcv', 'mmdense'),
    gpu=('torch',),
    config=('operators', 'mmdet', 'mmseg', 'timm'),
)
OFFLINE = ('1', 'ON', 'YES', 'TRUE')  # as the hub's client reads it
SHARED_MEMORY = 1 << 30  # bytes; Docker's default, 64 MiB, holds no batch
OPEN_FILES = 1024
FREE = dict(work_dirs=5 << 30, cache=2 << 30)  # bytes


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was looked at.
        level: 'ok'; 'warning' for what works, though not as it could; 'error' for what will fail.
        says: One line.
        mend: The shell command that mends it; '' where there is nothing to mend.
    """

    check: str
    level: str
    says: str
    mend: str = ''


def _install(installed: Mapping[str, str]) -> str:
    """Return the command that installs mmdense, with the distribution that is there."""
    return f'{PIP} install -e {shlex.quote(f"{ROOT}[{_extra(installed)}]")}'


def _extra(installed: Mapping[str, str]) -> str:
    ours = {name for key in MM for name in PACKAGES[key]} & installed.keys()
    original = ours and not any(name.startswith(MAINTAINED) for name in ours)
    return 'openmmlab' if original else 'mm'


def versions() -> dict[str, str]:
    """Return the versions of Python and of the distributions that matter here, if installed."""
    found = {'python': '.'.join(map(str, sys.version_info[:3]))}
    for name in ('mmdense', *(name for row in PACKAGES.values() for name in row)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version:  # an interrupted installation leaves none
            found[name] = version
    return found


def examine(config: str | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        config: A config file to look at too: whether it can be read, and its data and weights had.
    """
    installed = versions()
    results = run_steps([*PACKAGES, 'mmdense', 'operators', 'gpu'], config)
    return [
        *check_versions(installed),
        *check_imports(results, installed),
        *check_operators(results['operators']),
        *check_gpu(results['gpu'], _nvidia_smi(), installed),
        *check_machine(),
        *check_config(results.get('config')),
    ]


# Versions, which need no import.


def check_versions(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Compare what is installed with what each distribution says that it wants.

    Args:
        installed: As :func:`versions` returns them.
    """
    if 'mmdense' not in installed:
        yield Finding('versions', 'error', 'mmdense is not installed', _install(installed))
    yield from _check_owners(installed)
    parse = _requirement_parser()
    if parse is None:
        says = 'without the package packaging versions are not compared'
        yield Finding('versions', 'warning', says, f'{PIP} install packaging')
        return
    extra = _extra(installed)
    rows = {name: row for row in (*PACKAGES.values(), ('python',)) for name in row}
    complaints = []
    for name in [name for name in installed if name != 'python']:
        for wanted in _wishes(name, parse):
            row = rows.get(wanted.name.lower().replace('_', '-'))
            if row is None or (wanted.marker and not wanted.marker.evaluate({'extra': extra})):
                continue
            got = next((installed[other] for other in row if other in installed), None)
            if got is None or not wanted.specifier.contains(got, prereleases=True):
                complaints.append(_complain(name, wanted, got))
    if not complaints:
        known = ', '.join(f'{name} {version}' for name, version in installed.items())
        complaints = [Finding('versions', 'ok', known)]
    yield from complaints


def _wishes(name: str, parse: Callable[[str], Any]) -> Iterator[Any]:
    python = metadata.metadata(name)['Requires-Python']
    for text in [*([f'python {python}'] if python else []), *(metadata.requires(name) or ())]:
        try:
            yield parse(text)
        except ValueError:  # in a form that pip doesn't take any more
            continue


def _complain(name: str, wanted: Any, got: str | None) -> Finding:
    # Others' wishes are often narrower than what works: whether it does, the imports tell.
    strict = name == 'mmdense' or (name, wanted.name) == ('torchvision', 'torch')
    has = f'{got} is installed' if got else 'it is not installed'
    mend = f'{PIP} install {shlex.quote(f"{wanted.name}{wanted.specifier}")}'
    if wanted.name == 'python':
        least = next((s.version for s in wanted.specifier if s.operator == '>='), '3')
        mend = f'make setup PYTHON=python{least}'
    elif (name, wanted.name) == ('torchvision', 'torch'):
        mend = TORCH_PAIR
    says = f'{name} wants {wanted.name}{wanted.specifier}, {has}'
    return Finding('versions', 'error' if strict else 'warning', says, mend)


def _check_owners(installed: Mapping[str, str]) -> Iterator[Finding]:
    """Find distributions that were installed over each other."""
    present = {key: [n for n in row if n in installed] for key, row in PACKAGES.items()}
    ours = [name for key in MM for name in present[key]]
    families = {name.startswith(MAINTAINED) for name in ours}
    if len(families) > 1 or any(len(present[key]) > 1 for key in MM):
        says = f'files of several distributions are mixed: {", ".join(ours)}'
        mend = f'{PIP} uninstall -y {" ".join(ours)} && {_install(installed)}'
        yield Finding('versions', 'error', says, mend)
    opencv = present['cv2']
    if len({installed[name] for name in opencv}) > 1:
        told = ' and '.join(f'{name} {installed[name]}' for name in opencv)
        says = f'{told} write to the same folder cv2, and are of different versions'
        yield Finding('versions', 'warning', says, _reinstall_opencv(opencv))


def _reinstall_opencv(names: Sequence[str]) -> str:
    """Return what leaves the one that needs no libraries of a desktop."""
    drop = ' '.join(names or ('opencv-python',))
    headless = PACKAGES['cv2'][0]
    return f'{PIP} uninstall -y {drop} && {PIP} install --force-reinstall --no-deps {headless}'


def _requirement_parser() -> Callable[[str], Any] | None:
    for name in ('packaging', 'pip._vendor.packaging'):
        try:
            return importlib.import_module(f'{name}.requirements').Requirement
        except ImportError:
            continue
    return None


# Steps, each in a process that may end.

PROBE = """
import importlib.util, sys
if sys.path[0] == '':  # the working folder, which a script wouldn't see either
    del sys.path[0]
spec = importlib.util.spec_from_file_location('mmdense_doctor', sys.argv[1])
doctor = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(doctor)
doctor.answer(*sys.argv[2:])
"""


def run_steps(steps: Sequence[str], config: str | None = None) -> dict[str, dict[str, Any]]:
    """Run steps one after the other in a process; in a further one, if it ended with one of them.

    Args:
        steps: Import names, or names in ``STEPS``.
        config: The argument of a last step, 'config'; None leaves it out.

    Returns:
        For each step a dict that has 'facts' after a success, 'needs' (a step that failed) where it
        was not tried, or 'error' (one line), and then 'missing', a module that wasn't found, or
        None.
    """
    left = [*steps, *(['config'] if config else [])]
    results: dict[str, dict[str, Any]] = {}
    while left:
        failed = [step for step, result in results.items() if 'facts' not in result]
        arguments = json.dumps(left), json.dumps(failed), config or ''
        command = [sys.executable, '-c', PROBE, __file__, *arguments]
        done = _run(command, LIMIT)
        for line in done.stdout.splitlines():
            step, result = json.loads(line)
            results[step] = result
        left = left[sum(step in results for step in left) :]
        if left:  # it ended in the first of these
            results[left.pop(0)] = dict(error=f'the process ends: {_how(done)}', missing=None)
    return results


@dataclass(frozen=True)
class _Done:
    stdout: str
    status: int | None  # None: it took too long


def _run(command: Sequence[str], limit: int) -> _Done:
    options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        done = subprocess.run(command, timeout=limit, **options)
    except subprocess.TimeoutExpired as error:
        return _Done((error.stdout or b'').decode(errors='replace'), None)
    return _Done(done.stdout.decode(errors='replace'), done.returncode)


def _how(done: _Done) -> str:
    if done.status is None:
        return f'no answer within {LIMIT} seconds'
    if done.status < 0:
        return signal.Signals(-done.status).name
    return f'status {done.status}'


def answer(steps: str, failed: str, config: str) -> None:
    """Run the steps in this process, and write a line of JSON after each: the child's side."""
    out = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # packages may print what they like
    bad = set(json.loads(failed))
    for step in json.loads(steps):
        culprit = next((need for need in NEEDS.get(step, ()) if need in bad), None)
        if culprit:
            result = dict(needs=culprit)
        else:
            result = _attempt(step, config)
        if 'facts' not in result:
            bad.add(step)
        out.write(json.dumps([step, result]) + '\n')
        out.flush()


def _attempt(step: str, config: str) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            if step == 'config':
                facts = look_at_config(config)
            else:
                facts = STEPS[step]() if step in STEPS else _import(step)
        except BaseException as error:  # a package may even call sys.exit()
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            return dict(error=one_line(error), missing=missing)
    return dict(facts=facts, warnings=[str(warning.message) for warning in caught])


def one_line(error: BaseException) -> str:
    """Return the first line of an error that says something, after its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ': '.join([type(error).__name__, *lines[:1]])


def _import(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    if getattr(module, '__file__', None) is None:
        raise ImportError(f'{list(module.__path__)[0]} is a folder without the package')
    return dict(file=module.__file__, version=str(getattr(module, '__version__', '')))


def _import_cv2() -> dict[str, Any]:
    facts = _import('cv2')
    importlib.import_module('cv2').imread  # noqa: B018  (leftovers of an uninstallation have none)
    return facts


def _operators() -> dict[str, Any]:
    ops = importlib.import_module('mmdense.ops')
    importlib.import_module('mmcv.ops')
    mmcv = importlib.import_module('mmcv')
    compiled = importlib.machinery.PathFinder.find_spec('mmcv._ext', mmcv.__path__)
    return dict(
        backend=ops.backend(),
        choice=os.environ.get(ops.VARIABLE, 'auto'),
        compiled=compiled and compiled.origin,
    )


def _gpu() -> dict[str, Any]:
    torch = importlib.import_module('torch')
    usable = torch.cuda.is_available()
    count = torch.cuda.device_count() if usable else 0
    return dict(
        torch=torch.__version__,
        built_for=torch.version.cuda or torch.version.hip,
        hip=torch.version.hip is not None,
        devices=[
            (torch.cuda.get_device_name(i), list(torch.cuda.get_device_capability(i)))
            for i in range(count)
        ],
        architectures=torch.cuda.get_arch_list() if usable else [],
        hidden=os.environ.get('CUDA_VISIBLE_DEVICES'),
    )


STEPS: dict[str, Callable[[], dict[str, Any]]] = dict(
    cv2=_import_cv2, operators=_operators, gpu=_gpu
)


# What the steps' answers mean.


def check_imports(
    results: Mapping[str, dict[str, Any]], installed: Mapping[str, str]
) -> Iterator[Finding]:
    """Say which packages can be imported.

    Args:
        results: As :func:`run_steps` returns them.
        installed: As :func:`versions` returns them.
    """
    for name in (*PACKAGES, 'mmdense'):
        result = results[name]
        if 'facts' in result:
            file = Path(result['facts']['file'])
            if name == 'mmdense' and file.resolve().parent != ROOT / 'mmdense':
                says = f'mmdense comes from {file.parent}, not from {ROOT}'
                yield Finding(name, 'warning', says, _install(installed))
            else:
                told = ' '.join(filter(None, (name, result['facts']['version'])))
                yield Finding(name, 'ok', f'{told} can be imported')
        elif 'needs' in result:
            says = f'not tried: {result["needs"]} comes first'
            yield Finding(name, 'warning', says, _rerun())
        else:
            yield _explain_import(name, result, installed)


def _rerun() -> str:
    """Return the command that looks again, once what is in the way has gone."""
    return f'{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "tools/doctor.py"))}'


def _explain_import(name: str, result: Mapping[str, Any], installed: Mapping[str, str]) -> Finding:
    error, missing = result['error'], result['missing']
    owners = [other for other in PACKAGES.get(name, (name,)) if other in installed]
    says = f'{name} cannot be imported: {error}'
    if name == 'mmdense':
        mend = _install(installed)
    elif missing == name and not owners:
        says, mend = f'{name} is not installed', _install(installed)
    elif missing and missing.partition('.')[0] != name:
        says = f'{name} needs {missing}, which is not installed'
        top = missing.partition('.')[0]
        mend = _install(installed) if top in PACKAGES else f'{PIP} install {top}'
    elif name == 'cv2':
        mend = _reinstall_opencv(owners)
    elif name == 'torchvision' or (name == 'torch' and 'torchvision' in installed):
        mend = TORCH_PAIR
    elif re.search(r'numpy\.core|_ARRAY_API|numpy\.dtype size|compiled using NumPy 1', error):
        mend = f'{PIP} install --upgrade --force-reinstall --no-deps {owners[0]}'
    elif owners:
        pinned = f'{owners[0]}=={installed[owners[0]]}'
        mend = f'{PIP} install --force-reinstall --no-deps {pinned}'
    else:
        mend = _install(installed)
    return Finding(name, 'error', says, mend)


def check_operators(result: Mapping[str, Any]) -> Iterator[Finding]:
    """Say whose operators ``mmcv.ops`` has, and why.

    Args:
        result: Of the step 'operators'.
    """
    if 'needs' in result:
        says = f'not tried: {result["needs"]} comes first'
        yield Finding('operators', 'warning', says, _rerun())
        return
    if 'error' in result:
        chosen = 'MMDENSE_OPS' in result['error']
        mend = 'unset MMDENSE_OPS' if chosen else TORCH_PAIR
        yield Finding('operators', 'error', f'mmcv.ops cannot be imported: {result["error"]}', mend)
        return
    facts = result['facts']
    choice, compiled = f'MMDENSE_OPS={facts["choice"]}', facts['compiled']
    failed = [text for text in result['warnings'] if 'does not load' in text]
    if failed:
        yield Finding('operators', 'warning', failed[0], 'export MMDENSE_OPS=torchvision')
    elif facts['backend'] == 'compiled':
        yield Finding('operators', 'ok', f"mmcv's compiled {compiled} ({choice})")
    elif compiled:
        yield Finding('operators', 'ok', f"torchvision's, as {choice} leaves out {compiled}")
    else:
        says = f"torchvision's, as mmcv came without its compiled extension ({choice})"
        yield Finding('operators', 'ok', says)


def check_gpu(
    result: Mapping[str, Any], cards: Sequence[str], installed: Mapping[str, str]
) -> Iterator[Finding]:
    """Say whether torch can use the machine's GPUs.

    Args:
        result: Of the step 'gpu'; without facts where torch cannot be imported.
        cards: NVIDIA's GPUs as their driver lists them, which needs no torch.
        installed: As :func:`versions` returns them.
    """
    if 'facts' not in result:
        return
    facts = result['facts']
    built, card = facts['built_for'], ', '.join(cards)
    if not facts['devices']:
        if not cards:
            yield Finding('gpu', 'ok', 'no NVIDIA GPU: everything runs on the CPU')
        elif facts['hidden'] is not None:
            says = f'{card} is hidden by CUDA_VISIBLE_DEVICES={facts["hidden"]}'
            yield Finding('gpu', 'warning', says, 'unset CUDA_VISIBLE_DEVICES')
        elif built is None:
            says = f'{card} is not used: torch {facts["torch"]} was built for CPUs alone'
            both = [n for n in ('torch', 'torchvision') if n in installed]
            pins = ' '.join(f'{n}=={installed[n].partition("+")[0]}' for n in both)
            mend = f'{PIP} install --force-reinstall --index-url {PYPI} {pins}'
            yield Finding('gpu', 'warning', says, mend)
        else:
            told = [text for text in result['warnings'] if 'driver' in text or 'CUDA' in text]
            why = ' '.join(told[0].partition('(Triggered')[0].split()) if told else 'no reason told'
            says = f'{card} is not used, though torch was built for CUDA {built}: {why}'
            mend = 'sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm'
            if 'too old' in why:
                pair = 'torch torchvision'
                mend = f'{PIP} install --force-reinstall --index-url {WHEELS}/cu126 {pair}'
            yield Finding('gpu', 'warning', says, mend)
        return
    for name, (major, minor) in facts['devices']:
        capability = f'{name}, compute capability {major}.{minor}'
        if facts['hip'] or has_kernels(facts['architectures'], (major, minor)):
            yield Finding('gpu', 'ok', f'{capability}, CUDA {built}')
        else:
            known = ' '.join(facts['architectures'])
            says = f'{capability}: torch {facts["torch"]} has kernels for {known} alone'
            index = f'{WHEELS}/{"cu126" if (major, minor) < (7, 5) else "cu130"}'
            mend = f'{PIP} install --force-reinstall --index-url {index} torch torchvision'
            yield Finding('gpu', 'error', says, mend)


def has_kernels(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for these runs on a GPU: of its own generation, or to be compiled by its driver.

    Args:
        architectures: As ``torch.cuda.get_arch_list()``, such as 'sm_86' and 'compute_90'.
        capability: Of the GPU.
    """
    for text in architectures:
        match = re.fullmatch(r'(sm|compute)_(\d+)(\d)([af]?)', text)
        if not match:
            continue
        own = int(match[2]), int(match[3])
        if match[4] == 'a':
            fits = own == capability
        elif match[1] == 'sm' or match[4] == 'f':
            fits = own[0] == capability[0] and own <= capability
        else:
            fits = own <= capability
        if fits:
            return True
    return False


def _nvidia_smi() -> list[str]:
    """Return the names of NVIDIA's GPUs, asked without torch."""
    if not shutil.which('nvidia-smi'):
        return []
    done = _run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], 30)
    return done.stdout.splitlines() if done.status == 0 else []


# The machine.


def check_machine() -> Iterator[Finding]:
    """Look at shared memory, open files, disks, and the variables that say where weights are."""
    yield from _check_shared_memory(Path('/dev/shm'))
    yield from _check_open_files()
    cache = Path(os.environ.get('HF_HOME') or Path.home() / '.cache/huggingface')
    for name, folder, mend in (
        ('work_dirs', Path('work_dirs'), 'python tools/train.py CONFIG --work-dir FOLDER'),
        ('cache', cache.expanduser(), 'export HF_HOME=FOLDER TORCH_HOME=FOLDER'),
    ):
        yield check_disk(name, folder, mend)
    weights = os.environ.get('MMDENSE_WEIGHTS')
    if weights and not Path(weights).expanduser().is_dir():
        says = f'MMDENSE_WEIGHTS names no folder: {weights}'
        yield Finding('weights', 'error', says, f'mkdir -p {shlex.quote(weights)}')
    elif weights:
        yield Finding('weights', 'ok', f'from {weights} (MMDENSE_WEIGHTS) first')
    if os.environ.get('HF_HUB_OFFLINE', '').upper() in OFFLINE:
        says = 'HF_HUB_OFFLINE is set: of the hub, only what is in the cache can be had'
        yield Finding('weights', 'warning', says, 'unset HF_HUB_OFFLINE')


def _check_shared_memory(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():  # other systems share memory otherwise
        return
    size = shutil.disk_usage(folder).total
    told = f'{folder} has {size >> 20} MiB, through which workers hand over images'
    if size < SHARED_MEMORY:
        says = f'{told}; a container gets more by --shm-size=8g'
        yield Finding('shared memory', 'warning', says, f'mount -o remount,size=8G {folder}')
    else:
        yield Finding('shared memory', 'ok', told)


def _check_open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        says = f'{soft} open files a process: data loaders with workers may run out of them'
        most = hard if hard != resource.RLIM_INFINITY else 65536
        yield Finding('open files', 'warning', says, f'ulimit -n {most}')
    else:
        yield Finding('open files', 'ok', f'{soft} a process')


def check_disk(name: str, folder: Path, mend: str) -> Finding:
    """Look whether a folder, or where it would be made, has room.

    Args:
        name: Of the check, a key of ``FREE``.
        folder: It need not exist.
        mend: What to do about it.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding(name, 'error', f'{place} cannot be written to', mend)
    free = shutil.disk_usage(place).free
    told = f'{free / (1 << 30):.1f} GiB free for {folder}'
    return Finding(name, 'ok', told) if free >= FREE[name] else Finding(name, 'warning', told, mend)


# A config.


def check_config(result: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Say what the step 'config' found; nothing without one."""
    if result is None:
        return
    if 'needs' in result:
        says = f'not tried: {result["needs"]} comes first'
        yield Finding('config', 'error', says, _rerun())
    elif 'error' in result:
        yield Finding('config', 'error', result['error'], _rerun())
    else:
        for row in result['facts']:
            yield Finding(**row)


def look_at_config(path: str) -> list[dict[str, str]]:
    """Return findings on a config, as dicts: can it be read, and its data and weights be had?

    Runs in the process of the step 'config', and needs all packages.
    """
    from mmdense.config.read import load_config
    from mmdense.config.validate import check_data
    from mmdense.errors import UserError
    from mmdense.weights.sources import locate

    shown = shlex.quote(path)
    try:
        cfg = load_config(path)
    except UserError as error:
        return [dict(check='config', level='error', says=str(error), mend='ls configs/*/*/*.py')]
    rows = [dict(check='config', level='ok', says=f'{path} can be read')]
    for name in ('train', 'val', 'test'):
        try:
            check_data(cfg, (name,))
        except UserError as error:
            mend = f'python tools/train.py {shown} --cfg-options data_root=FOLDER'
            if 'digits' in str(cfg.get('data_root')):
                mend = f'python tools/make_demo_dataset.py --out {cfg.data_root}'
            rows.append(dict(check='data', level='error', says=str(error), mend=mend))
        else:
            rows.append(dict(check='data', level='ok', says=f'files of {name} are there'))
    for name in dict.fromkeys(named_weights(cfg.model, cfg.get('load_from'))):
        try:
            where = locate(name)
        except UserError as error:
            mend = f'python tools/train.py {shown} --cfg-options model.backbone.init_cfg=None'
            rows.append(dict(check='weights', level='error', says=str(error), mend=mend))
            continue
        rows.append(_reach(name, where))
    return rows


def named_weights(*nodes: Any) -> Iterator[str]:
    """Yield what a model's parts are initialised from, and files that are named themselves."""
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            init = node.get('init_cfg')
            for one in init if isinstance(init, list) else [init]:
                if isinstance(one, dict) and one.get('checkpoint'):
                    yield one['checkpoint']
            yield from named_weights(*(v for v in node.values() if isinstance(v, dict | list)))
        elif isinstance(node, list):
            yield from named_weights(*(v for v in node if isinstance(v, dict | list)))


def _reach(name: str, where: Path | str) -> dict[str, str]:
    """Say whether weights are here, or their address answers: nothing is downloaded."""
    if isinstance(where, Path):
        return dict(check='weights', level='ok', says=f'{name} is here: {where}')
    reason = answers(where)
    if reason is None:
        return dict(check='weights', level='ok', says=f'{name} can be downloaded from {where}')
    folder = shlex.quote(os.environ.get('MMDENSE_WEIGHTS') or 'FOLDER')
    own = f'{name.partition("://")[2]}.safetensors' if name.startswith('timm://') else ''
    target = f'-o {folder}/{shlex.quote(own or where.rpartition("/")[2])}'
    says = f'{name} is not on this machine, and {where} does not answer ({reason})'
    mend = f'curl -L {target} {where} && export MMDENSE_WEIGHTS={folder}'
    return dict(check='weights', level='error', says=says, mend=mend)


def answers(address: str, timeout: float = 5) -> str | None:
    """Return why an address does not answer, or None if it does; its content is not asked for.

    Args:
        address: Of a file.
        timeout: Seconds.
    """
    if os.environ.get('HF_HUB_OFFLINE', '').upper() in OFFLINE and 'huggingface' in address:
        return 'HF_HUB_OFFLINE is set'
    try:
        with urlopen(Request(address, method='HEAD'), timeout=timeout):
            return None
    except (OSError, ValueError) as error:  # HTTP errors, timeouts and refused connections alike
        return one_line(error)
