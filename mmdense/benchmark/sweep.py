"""The same head, data and schedule with one backbone after the other: trained, tested, measured.

A sweep lives in a folder: ``configs/NAME.py`` is what is trained, ``runs/NAME`` its work dir, and
``results.json`` and the reports hold what came out. Begun again with the same settings it goes on
where it was.
"""

from __future__ import annotations

import copy
import fcntl
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement
from torch import nn

from mmdense.apis.predict import Predictor
from mmdense.benchmark.backbones import PRUNING, Named
from mmdense.benchmark.report import write_report
from mmdense.benchmark.timing import inference, machine, measure, training
from mmdense.config.channels import put_backbone
from mmdense.config.image_size import training_size
from mmdense.errors import UserError, one_line
from mmdense.files import atomic_write
from mmdense.flops import model_costs
from mmdense.models import CondenseNetV2
from mmdense.models.deploy import deploy
from mmdense.visualization.logs import METRICS, read_scalars

__all__ = ['Sweep', 'Told', 'set_length']

CHANNELS_LAST = 'mmdense.ChannelsLastHook'
# Of a line in mmengine's log: epoch, iteration in it, their number, time left.
EPOCH = re.compile(r'Epoch\(train\)\s*\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: ([\d days,:]+\d)')
ITERATION = re.compile(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\].*?eta: ([\d days,:]+\d)')
RAISED = re.compile(r'[\w.]*(Error|Exception|Interrupt)\b')
LOG_TAIL = 20_000  # characters
POLL = 0.5  # seconds
USUAL = dict(detection='box AP', segmentation='mIoU (%)')
LENGTHS = dict(max_epochs='epochs', max_iters='iterations')
SCORE = 0.3  # of a box that is drawn


@dataclass(frozen=True)
class Told:
    """What is told of a sweep while it runs.

    Attributes:
        name: The backbone's.
        state: Such as 'epoch 3 of 8, 0:01:20 left'.
        share: Of its training that is done, from 0 to 1.
    """

    name: str
    state: str
    share: float


def set_length(cfg: Config, *, epochs: int | None = None, iters: int | None = None) -> None:
    """Make a schedule longer or shorter: in an epoch-based one what is counted in epochs alone.

    Args:
        cfg: Changed in place.
        epochs: Of training, for a config that counts them.
        iters: Of training, for a config that counts iterations.

    Raises:
        UserError: A config of the other kind, or less than one.
    """
    by_epoch = 'max_epochs' in cfg.train_cfg
    new, other = (epochs, iters) if by_epoch else (iters, epochs)
    unit = 'epochs' if by_epoch else 'iters'
    if other is not None:
        raise UserError(f'{cfg.filename} counts {unit}: give --{unit}')
    if new is None:
        return
    if new < 1:
        raise UserError(f'--{unit} is {new}, must be at least 1')
    key = f'max_{unit}'
    old, cfg.train_cfg[key] = cfg.train_cfg[key], new
    cfg.train_cfg.val_interval = min(cfg.train_cfg.get('val_interval', 1), new)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    for scheduler in schedulers:
        if scheduler.get('by_epoch', True) == by_epoch:  # warm-ups in iterations stay as they are
            _stretch(scheduler, new / old)
    cfg.param_scheduler = [s for s in schedulers if s.get('begin', 0) < s.get('end', math.inf)]


def _stretch(scheduler: ConfigDict, factor: float) -> None:
    whole = 'end' in scheduler and scheduler.get('T_max') == scheduler.end - scheduler.get(
        'begin', 0
    )
    for field in ('begin', 'end', 'T_max', 'total_iters', 'step_size'):
        if scheduler.get(field):
            scheduler[field] = max(1, round(scheduler[field] * factor))
    if whole:
        scheduler.T_max = scheduler.end - scheduler.get('begin', 0)
    if scheduler.get('milestones'):
        scheduler.milestones = [max(1, round(m * factor)) for m in scheduler.milestones]


class Sweep:
    """Backbones to be put into a config, and the folder where what comes out is kept.

    Args:
        cfg: The config, as :func:`.load_config` returns it.
        backbones: In the order of their rows.
        folder: Where everything goes.
        command: The command line, for the report.
        pretrained: Whether the backbones start from ImageNet weights, for the report.
        gpus: How many a training runs on, which is one of the settings.
        size: Height and width of the images that multiply-adds are counted for, in pixels; by
            default the config's largest.

    Raises:
        UserError: A model for depth, learning rates that are RDNet's alone, a backbone that doesn't
            fit, two of one name, or a folder that can't be written or holds a sweep of other
            settings.
    """

    def __init__(
        self,
        cfg: Config,
        backbones: Sequence[Named],
        folder: Path,
        *,
        command: str,
        pretrained: bool,
        gpus: int = 1,
        size: tuple[int, int] | None = None,
    ) -> None:
        if cfg.model.type == 'DepthEstimator':
            raise UserError(f'{cfg.filename} predicts depth: take a detector or segmentor')
        names = [backbone.name for backbone in backbones]
        if len({*names}) < len(names):
            raise UserError(f'two backbones of one name: {", ".join(names)}')
        decay = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
        others = [backbone.name for backbone in backbones if backbone.family != 'RDNet']
        if decay.get('mode') == 'published' and others:
            raise UserError(
                f"{cfg.filename} has RDNet's published learning rates, not for {others[0]}: add "
                '--cfg-options optim_wrapper.paramwise_cfg.mode=exact'
            )
        self.cfg, self.folder, self.backbones = cfg, folder, list(backbones)
        self.command, self.pretrained, self.gpus = command, pretrained, gpus
        self.size = size or training_size(cfg)
        self.configs = {backbone.name: self._config(backbone) for backbone in backbones}
        for name, own in self.configs.items():
            self._keep(own, self._config_file(name))

    def _run_folder(self, name: str) -> Path:
        return self.folder / 'runs' / _slug(name)

    def _config_file(self, name: str) -> Path:
        # Not in the work dir, where mmengine writes the config as the runner changed it.
        return self.folder / 'configs' / f'{_slug(name)}.py'

    def _config(self, backbone: Named) -> Config:
        cfg = copy.deepcopy(self.cfg)
        put_backbone(cfg, backbone.config)
        if backbone.pixels:
            cfg.model.data_preprocessor.update(backbone.pixels)
        cfg.sweep = dict(gpus=self.gpus)
        others = [h for h in cfg.get('custom_hooks') or [] if h['type'] != PRUNING]
        cfg.custom_hooks = [*others, *backbone.hooks]
        cfg.setdefault('randomness', dict(seed=0))
        cfg.work_dir = str(self._run_folder(backbone.name))
        hooks = cfg.default_hooks
        if 'max_iters' in cfg.train_cfg:  # a killed run goes on from the last validation
            between = hooks.checkpoint.interval = cfg.train_cfg.val_interval
            hooks.logger.interval = min(hooks.logger.get('interval', 10), between)
        hooks.checkpoint.max_keep_ckpts = 1
        return cfg

    def _keep(self, cfg: Config, file: Path) -> None:
        """Write a run's config, or see that it is the one of an earlier start."""
        try:
            Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
            file.parent.mkdir(exist_ok=True)
            text = cfg.pretty_text
            if not file.exists():
                atomic_write(file, text.encode())
            elif file.read_text() != text:
                raise UserError(
                    f'{file} is of a sweep with other settings: repeat those, or name another --out'
                )
        except OSError as error:
            raise UserError(f'cannot write {file}: {error.strerror}') from error

    def checkpoint(self, name: str) -> str:
        """Return the file that a run's training wrote last."""
        return (self._run_folder(name) / 'last_checkpoint').read_text().strip()

    def state(self, name: str) -> dict[str, Any]:
        """Return the ``status`` of a run ('waiting', 'training', 'done', 'failed') and more."""
        file = self._run_folder(name) / 'state.json'
        return json.loads(file.read_text()) if file.exists() else dict(status='waiting', seconds=0)

    def train(
        self,
        train: Sequence[str],
        test: Sequence[str],
        *,
        progress: Callable[[Told], None] = lambda told: None,
    ) -> None:
        """Train each backbone that isn't done, in a process of its own.

        Args:
            train: The command that trains a config: ``CONFIG --resume`` is appended.
            test: The command that tests one: ``CONFIG CHECKPOINT --work-dir DIR`` is appended.
                Needed where a training was killed between its end and the validation.
            progress: Is told what goes on, twice a second.
        """
        for backbone in self.backbones:
            name = backbone.name
            state = self.state(name)
            if state['status'] == 'done':
                progress(Told(name, 'done', 1.0))
                continue
            state = self._train(name, train, test, state['seconds'], progress)
            progress(Told(name, state.get('error', 'done'), float(state['status'] == 'done')))
            self.report()

    def _train(
        self,
        name: str,
        train: Sequence[str],
        test: Sequence[str],
        before: float,
        progress: Callable[[Told], None],
    ) -> dict[str, Any]:
        config, folder = str(self._config_file(name)), self._run_folder(name)
        begin = time.monotonic()

        def keep(status: str, **more: Any) -> dict[str, Any]:
            state = dict(status=status, seconds=before + time.monotonic() - begin, **more)
            atomic_write(folder / 'state.json', json.dumps(state).encode())
            return state

        def run(command: Sequence[str], log: Path) -> str:
            """Return why it failed, or nothing."""
            with _locked(folder) as lock, log.open('w') as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock]
                )
                try:
                    while process.poll() is None:
                        progress(Told(name, *_read_log(log, self.cfg)))
                        keep('training')
                        time.sleep(POLL)
                except BaseException:  # Ctrl-C: what was trained stays
                    process.terminate()
                    process.wait()
                    raise
            return _error_of(log, process.returncode) if process.returncode else ''

        error = run([*train, config, '--resume'], folder / 'output.log')
        if error:
            return keep('failed', error=error)
        losses, validations = _logged(folder)
        if validations and validations[-1]['iter'] >= losses[-1]['step']:
            return keep('done')
        tests = folder / 'test'
        command = [*test, config, self.checkpoint(name), '--work-dir', str(tests)]
        error = run(command, folder / 'test.log')
        if error:
            return keep('failed', error=error)
        newest = max(tests.glob('*/*.json'))  # named after the time
        return keep('done', metrics=_named(json.loads(newest.read_text())))

    def measure(
        self,
        *,
        rounds: int = 20,
        pictures: int = 6,
        device: str = 'cpu',
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Measure what is trained, all of it in interleaved rounds, draw predictions, and report.

        Nothing is measured again where all of it was, with the same rounds.

        Args:
            rounds: Timed runs of each.
            pictures: Number of test images to draw.
            device: 'cpu' or 'cuda'.
            progress: Is told what goes on.
        """
        done = [name for name in self.configs if self.state(name)['status'] == 'done']
        file = self.folder / 'measured.json'
        wanted = dict(rounds=rounds, pictures=pictures, device=device, backbones=done)
        held = json.loads(file.read_text()) if file.exists() else dict(of=None, rows={})
        if done and (held['of'] != wanted or any('error' in row for row in held['rows'].values())):
            with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
                found = _measure(self, done, rounds, pictures, device, progress)
            atomic_write(file, json.dumps(dict(found, of=wanted), indent=1).encode())
        self.report()

    def report(self) -> None:
        """Write ``results.json`` and the reports from what there is."""
        file = self.folder / 'measured.json'
        measured = json.loads(file.read_text()) if file.exists() else {}
        known = measured.get('rows', {})
        rows = [self._row(backbone, known.get(backbone.name, {})) for backbone in self.backbones]
        task = 'segmentation' if self.cfg.default_scope == 'mmseg' else 'detection'
        found = [m for m in METRICS.values() if any(m in row['metrics'] for row in rows)]
        loop = self.cfg.train_cfg
        length = [f'{loop[k]} {n}' for k, n in LENGTHS.items() if k in loop]
        results = dict(
            task=task,
            config=_from_here(Path(self.cfg.filename)),
            command=self.command,
            schedule=length[0],
            data=str(self.cfg.get('data_root') or '').rstrip('/'),
            pretrained=self.pretrained,
            metrics=found or [USUAL[task]],
            machine=measured.get('machine') or machine(),
            measured=measured.get('measured'),
            rows=rows,
            truth=measured.get('truth', []),
        )
        atomic_write(self.folder / 'results.json', json.dumps(results, indent=1).encode())
        write_report(self.folder)

    def _row(self, backbone: Named, measured: Mapping[str, Any]) -> dict[str, Any]:
        state = self.state(backbone.name)
        losses, validations = _logged(self._run_folder(backbone.name))
        curve = [dict(iter=r['iter']) | _named(r) for r in validations]
        last = state.get('metrics') or (curve[-1] if curve else {})
        finished = state['status'] == 'done'
        row = dict(
            backbone=backbone.name,
            family=backbone.family,
            config=str(self._config_file(backbone.name).relative_to(self.folder)),
            run=str(self._run_folder(backbone.name).relative_to(self.folder)),
            status=state['status'],
            error=state.get('error'),
            seconds=state['seconds'],
            metrics={k: v for k, v in last.items() if k != 'iter'} if finished else {},
            losses=[[r['step'], r['loss']] for r in losses],
            validations=curve,
        )
        unknown = dict(parts={}, form=None, infer=None, train=None, pictures=[])
        return row | unknown | measured


def _from_here(file: Path) -> str:
    """Return a path as the working folder has it: a report is read on other machines."""
    here = Path.cwd()
    return str(file.resolve().relative_to(here) if here in file.resolve().parents else file)


def _slug(name: str) -> str:
    return re.sub(r'[^\w.-]+', '-', name)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold a run's folder, and yield what its processes inherit: it is held until all have ended.

    Raises:
        UserError: Another one holds it.
    """
    with (folder / 'lock').open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f'a training in {folder} still runs, of a sweep that was stopped or goes on: wait '
                'for it, or stop it'
            ) from error
        yield lock.fileno()


def _logged(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return what a run has logged of losses and of metrics."""
    try:
        return read_scalars(folder)
    except UserError:  # nothing yet
        return [], []


def _named(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: record[key] for key, name in METRICS.items() if key in record}


def _read_log(log: Path, cfg: Config) -> tuple[str, float]:
    """Return how far a training is, in words and as a share."""
    text = log.read_text(errors='replace')[-LOG_TAIL:]
    if found := [*EPOCH.finditer(text)]:
        epoch, step, steps, left = found[-1].groups()
        total = cfg.train_cfg.max_epochs
        share = (int(epoch) - 1 + int(step) / int(steps)) / total
        return f'epoch {epoch} of {total}, {left} left', share
    if found := [*ITERATION.finditer(text)]:
        step, steps, left = found[-1].groups()
        return f'iteration {step} of {steps}, {left} left', int(step) / int(steps)
    return 'starting', 0.0


def _error_of(log: Path, status: int) -> str:
    """Return the line of a log that says why its process ended."""
    text = re.sub(r'^\[rank\d+\]: ', '', log.read_text(errors='replace'), flags=re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if status < 0:
        return f'killed by signal {-status}'
    own = [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]
    # torchrun's own comes behind that of its processes.
    raised = [line for line in lines if RAISED.match(line) and 'ChildFailedError' not in line]
    return [*lines[-1:], f'ended with status {status}', *raised[-1:], *own[-1:]][-1][:300]


def _measure(
    sweep: Sweep,
    names: Sequence[str],
    rounds: int,
    pictures: int,
    device: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return what is measured of trained backbones: ``rows`` by name, and how it was done."""
    cfg = sweep.cfg
    tests = DATASETS.build(cfg.test_dataloader.dataset)
    items = [tests[i] for i in range(min(max(pictures, 1), len(tests)))]
    images = [pseudo_collate([item]) for item in items]
    set_random_seed(0)  # the same augmentations in every sweep
    trains = DATASETS.build(cfg.train_dataloader.dataset)
    count = cfg.train_dataloader.batch_size
    batch = pseudo_collate([trains[i % len(trains)] for i in range(count)])
    channels_last = any(h['type'] == CHANNELS_LAST for h in cfg.get('custom_hooks') or [])
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    infers, steps, truth = {}, {}, []
    for name in names:
        progress(f'loading {name}')
        own, row = sweep.configs[name], rows[name]
        try:
            predictor = Predictor(own, sweep.checkpoint(name), device='cpu')
            row.update(parts=_parts(predictor.model, sweep.size), form='trained')
            if hasattr(predictor.model.backbone, 'switch_to_deploy'):
                deploy(predictor.model)
                row['form'] = 'deployed'
            step = training(own, lambda model: batch, count)
            row['pictures'] = _draw(sweep.folder, name, predictor, items[:pictures])
        except Exception as error:  # of whatever library: it costs the others nothing
            row['error'] = f'not measured: {one_line(error)}'
            continue
        # A copy: what a deployed network keeps between images would count as being there before.
        model = copy.deepcopy(predictor.model)
        for each in (model, step.model) if channels_last else ():
            each.to(memory_format=torch.channels_last)
        infers[name] = inference(model, lambda i: images[i % len(images)])
        steps[name] = step
        if not truth and _has_truth(items[0]['data_samples']):
            truth = _draw_truth(sweep.folder, predictor, items[:pictures])
    for kind, title, runs in (('infer', 'inference', infers), ('train', 'training', steps)):
        told = partial(_prefixed, progress, title)
        for name, found in measure(runs, rounds=rounds, device=device, progress=told).items():
            if 'error' in found:
                rows[name]['error'] = f'{title} not measured: {found["error"]}'
            else:
                rows[name][kind] = found
    return dict(
        rows=rows,
        truth=truth,
        machine=machine(device),
        measured=dict(
            size=sweep.size,
            infer_batch=1,
            train_batch=count,
            rounds=rounds,
            device=device,
            channels_last=channels_last,
        ),
    )


def _prefixed(progress: Callable[[str], None], title: str, text: str) -> None:
    progress(f'{title}: {text}')


def _parts(model: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return what each part costs; of a CondenseNetV2 the connections that it has learned."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, CondenseNetV2) and module.form == 'learned':
            module.condense()
    costs = model_costs(model.to('meta').eval(), size)
    return {name: asdict(cost) for name, cost in costs.items()}


def _draw(
    folder: Path, name: str, predictor: Predictor, images: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Draw predictions on test images; return the files, relative to the folder."""
    files = []
    for i, item in enumerate(images):
        path = item['data_samples'].img_path
        picture = predictor.draw(path, predictor(path)[0], SCORE)
        files.append(_write(folder, f'pictures/{_slug(name)}_{i}.jpg', picture))
    return files


def _has_truth(sample: BaseDataElement) -> bool:
    """Return whether the test pipeline loads annotations."""
    return 'gt_sem_seg' in sample or 'gt_instances' in sample


def _draw_truth(
    folder: Path, predictor: Predictor, images: Sequence[Mapping[str, Any]]
) -> list[str]:
    files = []
    for i, item in enumerate(images):
        sample = item['data_samples']
        picture = predictor.draw_truth(sample.img_path, sample)
        files.append(_write(folder, f'pictures/truth_{i}.jpg', picture))
    return files


def _write(folder: Path, name: str, picture: np.ndarray) -> str:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(file), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return name
