"""Check the installation, this machine and, with --config, a config's data and weights.

Every problem comes with the command that fixes it. The exit status is 1 if there is an error;
warnings are about things that work, but not as well as they could.
"""

# Imports only the standard library, and packages in a child process: any of them may be broken.

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
PIP = f'{shlex.quote(sys.executable)} -m pip'
FIX_TORCH = f'{PIP} install --force-reinstall torch torchvision'  # pip picks a pair that fits
RERUN = f'{shlex.quote(sys.executable)} {shlex.quote(__file__)}'
TIMEOUT = 600  # seconds for all imports

# Import names, with the distributions that provide them: one of each row may be installed.
PACKAGES = dict(
    numpy=['numpy'],
    cv2=['opencv-python-headless', 'opencv-python', 'opencv-contrib-python'],
    torch=['torch'],
    torchvision=['torchvision'],
    timm=['timm'],
    mmengine=['onedl-mmengine', 'mmengine', 'mmengine-lite'],
    mmcv=['onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'],
    mmdense=['mmdense'],
    mmdet=['onedl-mmdetection', 'mmdet'],
    mmseg=['onedl-mmsegmentation', 'mmsegmentation'],
)
MM = [name for key in ('mmengine', 'mmcv', 'mmdet', 'mmseg') for name in PACKAGES[key]]
# What each check needs: only the package that fails is blamed.
NEEDS = dict(
    torchvision=['torch'],
    timm=['torchvision'],
    mmengine=['numpy', 'torch'],
    mmcv=['cv2', 'mmengine'],
    mmdense=['mmcv', 'torchvision'],
    mmdet=['mmdense'],
    mmseg=['mmdense'],
    operators=['mmdense'],
    gpu=['torch'],
    environment=['mmengine'],
    config=['mmdet', 'mmseg', 'timm'],
)


class Finding(NamedTuple):
    check: str
    level: str  # 'ok', 'warning' or 'error'
    message: str
    fix: str = ''  # shell command


def examine(config: str | None) -> tuple[list[Finding], dict[str, str]]:
    """Run all checks; return their findings, and mmengine's description of the environment."""
    checks = [*PACKAGES, 'operators', *(['config'] if config else [])]
    results = run_probes([*checks, 'gpu', 'environment'], config or '')
    findings = [*check_distributions(), *check_requirements()]
    for name in checks:
        result = results[name]
        if 'needs' in result:
            message = f'not checked, because {result["needs"]} fails'
            findings.append(Finding(name, 'warning', message, RERUN))
        elif 'error' in result:
            findings.append(explain_failure(name, **result))
        elif name == 'config':
            findings += [Finding(*row) for row in result['facts']]
        else:
            findings.append(Finding(name, 'ok', result['facts']))
    if 'facts' in results['gpu']:
        findings += check_gpu(nvidia_gpus(), **results['gpu']['facts'])
    return [*findings, *check_machine()], results['environment'].get('facts') or {}


# Distributions


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            # An interrupted installation leaves no version.
            versions[name] = metadata.version(name) or 'unknown'
    return versions


def install_mmdense() -> str:
    """Return the command that installs mmdense with the MM distribution that is there."""
    names = installed(MM)
    original = names and not any(name.startswith('onedl-') for name in names)
    extra = '[openmmlab]' if original else '[mm]'
    if not (ROOT / 'setup.py').is_file():  # installed from a wheel
        return f"{PIP} install 'mmdense{extra}'"
    return f'{PIP} install -e {shlex.quote(f"{ROOT}{extra}")}'


def install_opencv() -> str:
    """Return the command that leaves only the OpenCV that needs no desktop libraries."""
    names = ' '.join(installed(PACKAGES['cv2'])) or 'opencv-python'
    headless = PACKAGES['cv2'][0]
    return f'{PIP} uninstall -y {names} && {PIP} install --force-reinstall --no-deps {headless}'


def check_distributions() -> Iterator[Finding]:
    """Find distributions that are installed over each other."""
    names = installed(MM)
    mixed = len({name.startswith('onedl-') for name in names}) > 1
    if mixed or any(len(installed(PACKAGES[key])) > 1 for key in ('mmengine', 'mmcv')):
        message = f'installed over each other: {", ".join(names)}'
        fix = f'{PIP} uninstall -y {" ".join(names)} && {install_mmdense()}'
        yield Finding('distributions', 'error', message, fix)
    opencv = installed(PACKAGES['cv2'])
    if len(set(opencv.values())) > 1:
        versions = ', '.join(map(' '.join, opencv.items()))
        message = f'installed over each other: {versions}'
        yield Finding('distributions', 'warning', message, install_opencv())


def check_requirements() -> Iterator[Finding]:
    """Run ``pip check``."""
    status, output = run([sys.executable, '-m', 'pip', 'check'], 120)
    if not output:
        fix = f'{shlex.quote(sys.executable)} -m ensurepip'
        yield Finding('requirements', 'warning', 'pip check cannot run', fix)
    elif status == 0:
        yield Finding('requirements', 'ok', 'pip check finds no broken requirement')
    for line in output.splitlines():
        match = re.match(r'(\S+) \S+ (?:has requirement (.+), but|requires ([^ ,]+), which)', line)
        if match:
            owner, requirement = match[1], match[2] or match[3]
            pair = owner == 'torchvision' and requirement.startswith('torch')
            fix = FIX_TORCH if pair else f'{PIP} install {shlex.quote(requirement)}'
            # Other packages often accept less than what works: their import decides.
            level = 'error' if pair or owner == 'mmdense' else 'warning'
            yield Finding('requirements', level, line, fix)
    # pip check leaves out extras.
    pattern = r'(torch|timm)>=([\d.]+); extra == "mm"'
    lines = metadata.requires('mmdense') if installed(['mmdense']) else None
    for name, least in re.findall(pattern, '\n'.join(lines or ())):
        version = installed([name]).get(name, least)
        have, need = ([*map(int, re.findall(r'\d+', v)[:3])] for v in (version, least))
        if have < need:
            message = f'mmdense requires {name}>={least}, but {version} is installed'
            fix = f'{PIP} install {shlex.quote(f"{name}>={least}")}'
            yield Finding('requirements', 'error', message, fix)


# Probes: steps in a child process, which may crash


def run(command: Sequence[str], timeout: int) -> tuple[int | None, str]:
    """Return a command's exit status, or None after a timeout, and its standard output."""
    options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        done = subprocess.run(command, timeout=timeout, **options)
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b'').decode(errors='replace')
    return done.returncode, done.stdout.decode(errors='replace')


def run_probes(steps: Sequence[str], config: str = '') -> dict[str, dict[str, Any]]:
    """Run steps in a child process, and in a new one after each that ends it.

    Returns:
        By step: 'facts' after a success; 'needs', the failed step that it depends on; or 'error',
        one line, with 'missing', the name of a module that was not found, or None.
    """
    results: dict[str, dict[str, Any]] = {}
    while left := [step for step in steps if step not in results]:
        failed = [step for step, result in results.items() if 'facts' not in result]
        request = json.dumps([left, failed, config])
        status, output = run([sys.executable, __file__, '--probe', request], TIMEOUT)
        results.update(json.loads(line) for line in output.splitlines())
        culprit = next((step for step in left if step not in results), None)
        if culprit:
            reason = f'the process exits with status {status}'
            if status is None:
                reason = f'no result within {TIMEOUT} seconds'
            elif status < 0:
                reason = f'the process is killed by {signal.Signals(-status).name}'
            results[culprit] = dict(error=reason, missing=None)
    return results


def probe(steps: list[str], failed: list[str], config: str) -> None:
    """Run steps in this process, and write a line of JSON after each: the child's side."""
    output = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # packages may print
    # As for an installed command: tools/ would hide modules such as `test`.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
    for step in steps:
        blocker = next((need for need in NEEDS.get(step, ()) if need in failed), None)
        try:
            if blocker:
                result = dict(needs=blocker)
            elif step == 'config':
                result = dict(facts=probe_config(config))
            else:
                result = dict(facts=PROBES[step]() if step in PROBES else probe_import(step))
        except BaseException as error:  # a package may even call sys.exit()
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            result = dict(error=one_line(error), missing=missing)
        if 'facts' not in result:
            failed.append(step)
        output.write(json.dumps([step, result]) + '\n')
        output.flush()


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ': '.join([type(error).__name__, *lines[:1]])


def probe_import(name: str) -> str:
    module = importlib.import_module(name)
    if getattr(module, '__file__', None) is None:
        raise ImportError(f'{list(module.__path__)[0]} is a folder without the package')
    if name == 'cv2':
        module.imread  # noqa: B018  (an incomplete uninstallation leaves a module without it)
    version = getattr(module, '__version__', '')
    return ' '.join(filter(None, [name, version, f'({Path(module.__file__).parent})']))


def probe_operators() -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        importlib.import_module('mmcv.ops')
    ops = importlib.import_module('mmdense.ops')
    text = f'mmcv.ops: {ops.backend()} (MMDENSE_OPS={os.environ.get(ops.VARIABLE, "auto")})'
    reasons = [str(w.message) for w in caught if 'compiled extension' in str(w.message)]
    return '; '.join([text, *reasons])


def probe_gpu() -> dict[str, Any]:
    torch = importlib.import_module('torch')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        usable = torch.cuda.is_available()
    reasons = [str(w.message) for w in caught if re.search('driver|CUDA', str(w.message))]
    devices = []
    for i in range(torch.cuda.device_count() if usable else 0):
        try:
            (torch.zeros(1, device=f'cuda:{i}') + 1).item()
            error = None
        except Exception as raised:  # such as: no kernel image is available
            error = one_line(raised)
        devices.append((torch.cuda.get_device_name(i), error))
    built_for = torch.version.cuda or torch.version.hip
    reason = ' '.join(reasons[0].partition('(Triggered')[0].split()) if reasons else 'unknown'
    return dict(torch=torch.__version__, built_for=built_for, devices=devices, reason=reason)


def probe_environment() -> dict[str, str]:
    collect_env = importlib.import_module('mmengine.utils.dl_utils').collect_env
    details = 'PyTorch compiling details', 'numpy_random_seed'
    return {key: str(value) for key, value in collect_env().items() if key not in details}


def probe_config(path: str) -> list[Finding]:
    """Check whether a config can be read, its data exist and its weights are here or online."""
    from mmdense.config.evaluators import check_metric_files
    from mmdense.config.read import load_config
    from mmdense.config.validate import check_data_files
    from mmdense.errors import UserError
    from mmdense.weights.sources import locate

    cfg = load_config(path)
    rows = [Finding('config', 'ok', f'{path} can be read')]
    train = f'python tools/train.py {shlex.quote(path)} --cfg-options'
    for loader in ('train', 'val', 'test'):
        try:
            check_data_files(cfg, (loader,))
            check_metric_files(cfg, (loader,))
        except UserError as error:
            fix = f'{train} data_root=FOLDER'
            if 'digits' in str(cfg.get('data_root')):
                fix = f'python tools/make_demo_dataset.py --out {cfg.data_root}'
            if 'digit_crops' in str(cfg.get('data_root')):
                fix = f'python tools/make_demo_dataset.py --out data/digits --crops {cfg.data_root}'
            if match := re.match(r'\w+_evaluator[\w.]*', str(error)):
                fix = f'{train} {match[0]}=FILE'
            rows.append(Finding('data', 'error', str(error), fix))
        else:
            rows.append(Finding('data', 'ok', f'the files of {loader} exist'))
    for name in dict.fromkeys(find_weights(dict(model=cfg.model, load_from=cfg.get('load_from')))):
        try:
            rows.append(check_weights(name, locate(name)))
        except UserError as error:
            fix = f'{train} model.backbone.init_cfg=None'
            rows.append(Finding('weights', 'error', str(error), fix))
    return rows


def find_weights(node: Any) -> Iterator[str]:
    """Yield the checkpoints that a config names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('checkpoint', 'load_from') and isinstance(value, str):
                yield value
            else:
                yield from find_weights(value)
    elif isinstance(node, list | tuple):
        for child in node:
            yield from find_weights(child)


def check_weights(name: str, place: Path | str) -> Finding:
    """Check that weights are on this machine, or that their URL answers; download nothing."""
    if isinstance(place, Path):
        return Finding('weights', 'ok', f'{name} is here: {place}')
    offline = os.environ.get('HF_HUB_OFFLINE', '').upper() in ('1', 'ON', 'YES', 'TRUE')
    try:
        if offline and 'huggingface' in place:
            raise OSError('HF_HUB_OFFLINE is set')
        with urlopen(Request(place, method='HEAD'), timeout=5):
            return Finding('weights', 'ok', f'{name} can be downloaded from {place}')
    except (OSError, ValueError) as error:
        folder = shlex.quote(os.environ.get('MMDENSE_WEIGHTS') or 'FOLDER')
        scheme, _, short = name.partition('://')
        file = f'{short}.safetensors' if scheme == 'timm' else place.rpartition('/')[2]
        message = f'{name} is not on this machine, and {place} does not answer ({one_line(error)})'
        fix = f'curl -L -o {folder}/{shlex.quote(file)} {place} && export MMDENSE_WEIGHTS={folder}'
        return Finding('weights', 'error', message, fix)


PROBES = dict(operators=probe_operators, gpu=probe_gpu, environment=probe_environment)


# What the results mean


def explain_failure(name: str, error: str, missing: str | None) -> Finding:
    message, fix = f'{name} fails: {error}', install_mmdense()
    owner, version = next(iter(installed(PACKAGES.get(name, ())).items()), (None, None))
    top = (missing or name).partition('.')[0]
    if name == 'config':
        fix = RERUN
    elif name == 'operators':
        fix = 'unset MMDENSE_OPS' if 'MMDENSE_OPS' in error else FIX_TORCH
    elif top != name:
        message = f'{name} needs {missing}, which is not installed'
        fix = fix if top in PACKAGES else f'{PIP} install {top}'
    elif name == 'cv2':
        fix = install_opencv()
    elif name in ('torch', 'torchvision'):
        fix = FIX_TORCH
    elif re.search(r'numpy\.core|_ARRAY_API|numpy\.dtype size|compiled using NumPy 1', error):
        fix = f'{PIP} install --upgrade --force-reinstall --no-deps {owner}'
    elif owner and name != 'mmdense':
        fix = f'{PIP} install --force-reinstall --no-deps {owner}=={version}'
    return Finding(name, 'error', message, fix)


def nvidia_gpus() -> str:
    """Return the names of NVIDIA's GPUs, from the driver."""
    if not shutil.which('nvidia-smi'):
        return ''
    status, output = run(['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'], 30)
    return ', '.join(output.splitlines()) if status == 0 else ''


def check_gpu(
    gpus: str, *, torch: str, built_for: str | None, devices: list[list[str]], reason: str
) -> Iterator[Finding]:
    for name, error in devices:
        if error is None:
            yield Finding('gpu', 'ok', f'{name}, CUDA {built_for}')
        else:
            message = f'{name} does not work with torch {torch}: {error}'
            yield Finding('gpu', 'error', message, FIX_TORCH)
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES')
    if devices:
        return
    if not gpus:
        yield Finding('gpu', 'ok', 'no NVIDIA GPU: everything runs on the CPU')
    elif hidden is not None:
        message = f'{gpus} is hidden by CUDA_VISIBLE_DEVICES={hidden}'
        yield Finding('gpu', 'warning', message, 'unset CUDA_VISIBLE_DEVICES')
    elif built_for is None:
        message = f'{gpus} is not used: torch {torch} is a CPU build'
        yield Finding('gpu', 'warning', message, f'{FIX_TORCH} --index-url https://pypi.org/simple')
    else:
        message = f'{gpus} is not used by torch for CUDA {built_for}: {reason}'
        fix = 'sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm'
        if 'too old' in reason:
            fix = f'{FIX_TORCH} --index-url https://download.pytorch.org/whl/cu126'
        yield Finding('gpu', 'warning', message, fix)


def check_machine() -> Iterator[Finding]:
    """Check the shared memory that data loaders use, and the space for runs and weights."""
    cache = Path(os.environ.get('HF_HOME') or '~/.cache/huggingface').expanduser()
    for check, folder, least, fix in (
        # In a container also: docker run --shm-size=8g
        ('shared memory', Path('/dev/shm'), 1, 'mount -o remount,size=8G /dev/shm'),
        ('disk', Path('work_dirs'), 5, 'python tools/train.py CONFIG --work-dir FOLDER'),
        ('disk', cache, 5, 'export HF_HOME=FOLDER TORCH_HOME=FOLDER'),
    ):
        folder = folder.absolute()
        place = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(place).free / (1 << 30)
        if not os.access(place, os.W_OK):
            yield Finding(check, 'error', f'{place} cannot be written', fix)
        elif free < least:
            message = f'{free:.1f} GiB free for {folder}, less than {least}'
            yield Finding(check, 'warning', message, fix)
        else:
            yield Finding(check, 'ok', f'{free:.1f} GiB free for {folder}')


# The command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example:\n  python tools/doctor.py --config CONFIG',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--config', help='config file whose data and weights to check')
    parser.add_argument('--json', action='store_true', help='print a JSON document')
    parser.add_argument('--probe', help=argparse.SUPPRESS)  # for the child process
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.probe:
        return probe(*json.loads(args.probe))
    findings, environment = examine(args.config)
    if args.json:
        rows = [finding._asdict() for finding in findings]
        versions = installed(name for row in PACKAGES.values() for name in row)
        document = dict(versions=versions, environment=environment, findings=rows)
        sys.stdout.write(json.dumps(document, indent=2) + '\n')
    else:
        for key, value in environment.items():
            sys.stdout.write(f'{key}: {value}\n')
        for check, level, message, fix in findings:
            sys.stdout.write(f'{level:8} {check}: {message}\n')
            if fix:
                sys.stdout.write(f'{"":8} fix: {fix}\n')
    sys.exit(any(finding.level == 'error' for finding in findings))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(128 + signal.SIGINT)
