"""Sweeps: the same head, data and schedule with one backbone after the other.

A sweep has a folder: ``configs/NAME.py`` are the training configs, ``runs/NAME`` the work dirs;
``results.json`` and the reports hold the results. Started again with the same settings, it
continues where it stopped.
"""

import copy
import hashlib
import itertools
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import set_random_seed
from mmengine.utils import get_git_hash
from PIL import Image
from torch import nn

from mmdense.apis.export import export_onnx
from mmdense.apis.predict import Predictor
from mmdense.benchmark.backbones import PRUNING, BackboneSpec
from mmdense.benchmark.bootstrap import MATCHES, keep_predictions
from mmdense.benchmark.memory import random_batch
from mmdense.benchmark.report import GROUPS, VERSION, write_report
from mmdense.benchmark.robustness import (
    SEVERITIES,
    corrupted_tests,
    corruption_names,
    robustness,
    write_tests,
)
from mmdense.benchmark.runs import Progress, TrainingRun, train_as_jobs
from mmdense.benchmark.timing import (
    Conditions,
    deployed_copy,
    inference_run,
    machine,
    measure,
    training_run,
)
from mmdense.config.channels import put_backbone
from mmdense.config.edit import set_length
from mmdense.config.image_size import training_size
from mmdense.config.read import load_config
from mmdense.config.validate import check_options
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, one_line
from mmdense.export.onnx_model import OnnxModel
from mmdense.files import atomic_write, check_writable
from mmdense.flops import model_costs
from mmdense.models import CondenseNetV2
from mmdense.visualization import logs

MEASURED = 'measurements.json'
CHANNELS_LAST = 'mmdense.ChannelsLastHook'
TASKS = dict(mmseg='segmentation', mmpretrain='classification')  # others are of detection
DEFAULT_METRICS = dict(detection='box AP', segmentation='mIoU (%)', classification='top-1 (%)')
SCORE_THRESHOLD = 0.3  # of boxes in pictures


@dataclass(eq=False)
class Sweep:
    """A config, the backbones to put into it, and the folder of the results.

    A backbone that doesn't fit the config is a row with its error. UserError if the model predicts
    depth, two backbones have the same name, or the folder cannot be written or belongs to a sweep
    with other settings.
    """

    cfg: Config  # as load_config() returns it
    backbones: Sequence[BackboneSpec]  # in the order of their rows
    folder: Path
    _: KW_ONLY
    command: str  # the command line, for the report
    pretrained: bool  # whether the backbones start from ImageNet weights, for the report
    gpus: int = 1  # of a training, which is one of its settings
    size: tuple[int, int] | None = None  # H, W in pixels for counting MACs; None is the largest
    seeds: int = 1  # trainings of each backbone, with the config's seed and the next ones
    columns: Sequence[
        str
    ] = ()  # to show, as in the CSV file; () is those of usual metrics and costs
    published: Sequence[Mapping[str, Any]] = ()  # figures to show, as find_published() returns them
    frozen: bool = False  # train necks and heads only, see put_backbone()
    corruptions: Sequence[str] = ()  # to test under, see corruption_names()
    severities: Sequence[int] = SEVERITIES  # of the corruptions, from 1 to 5

    def __post_init__(self) -> None:
        cfg, folder = self.cfg, self.folder
        if cfg.model.type == 'DepthEstimator':
            raise UserError(f'{cfg.filename} predicts depth: take a detector or segmentor')
        names = [backbone.name for backbone in self.backbones]
        if len({*names}) < len(names):
            raise UserError(f'two backbones have the same name: {", ".join(names)}')
        kinds = corruption_names(self.corruptions) if self.corruptions else []
        self.all_corruptions = [*itertools.product(kinds, self.severities)]
        self.size = self.size or training_size(cfg)
        cfg.setdefault('randomness', dict(seed=0))
        first = cfg.randomness.get('seed') or 0
        self.all_seeds = [*range(first, first + self.seeds)]
        self.errors: dict[str, str] = {}  # of backbones that cannot be trained
        self.configs: dict[str, Config] = {}  # of the first seed
        self.runs: dict[str, list[TrainingRun]] = {}  # of each backbone, by its name
        for backbone in self.backbones:
            name, runs = backbone.name, self.runs.setdefault(backbone.name, [])
            try:
                self.configs[name] = self._make_config(backbone)
            except (UserError, KeyError, TypeError) as error:  # the latter of options
                self.errors[name] = str(error.args[0])
            config = self.configs.get(name, cfg)
            epochs = config.train_cfg.get('max_epochs')
            several = self.seeds > 1 and not backbone.checkpoint
            for seed in self.all_seeds if several else [first]:
                file = _slug(name) + (f'.seed{seed}' if seed > first else '')
                title = f'{name}, seed {seed}' if several else name
                # Not in the work dir, where mmengine writes the config as the runner changed it.
                paths = folder / 'configs' / f'{file}.py', folder / 'runs' / file
                runs.append(TrainingRun(title, seed, *paths, epochs, backbone.checkpoint))
                if name in self.configs:
                    _write_config(runs[-1], config)

    def _make_config(self, backbone: BackboneSpec) -> Config:
        cfg, settings = copy.deepcopy(self.cfg), backbone.settings
        options = dict(settings.get('options') or {})
        check_options(cfg, options)
        cfg.merge_from_dict(options)
        set_length(cfg, epochs=settings.get('epochs'), iters=settings.get('iters'))
        decay = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
        if decay.get('mode') == 'published' and backbone.family != 'RDNet':
            raise UserError(
                f"{cfg.filename} has RDNet's published learning rates, not for {backbone.name}: "
                'add --cfg-options optim_wrapper.paramwise_cfg.mode=exact'
            )
        if self.frozen and not (backbone.config.get('init_cfg') or backbone.checkpoint):
            raise UserError(f'{backbone.name} starts from random weights: it cannot be --frozen')
        put_backbone(cfg, backbone.config, frozen=self.frozen)
        if backbone.preprocessor:
            cfg.model.data_preprocessor.update(backbone.preprocessor)
        cfg.sweep = dict(gpus=self.gpus)
        if checkpoint := backbone.checkpoint:
            if '://' not in checkpoint:
                if not Path(checkpoint).is_file():
                    raise UserError(f'no checkpoint {checkpoint}')
                cfg.sweep.modified = Path(checkpoint).stat().st_mtime
            cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
        others = [hook for hook in cfg.get('custom_hooks') or [] if hook['type'] != PRUNING]
        cfg.custom_hooks = [*others, *backbone.hooks]
        hooks = cfg.default_hooks
        if 'max_iters' in cfg.train_cfg:  # a killed run continues from the last validation
            hooks.checkpoint.interval = cfg.train_cfg.val_interval
            hooks.logger.interval = min(hooks.logger.get('interval', 10), hooks.checkpoint.interval)
        hooks.checkpoint.max_keep_ckpts = 1
        return cfg

    def state(self, name: str) -> dict[str, Any]:
        """Return the ``status`` of a backbone's trainings, mean ``seconds``, and ``error``.

        It is 'done' if all are, 'failed' if one failed and the others ended, 'waiting' if none has
        begun, or 'training'.
        """
        if name in self.errors:
            return dict(status='failed', seconds=0.0, error=self.errors[name])
        runs = self.runs[name]
        states = [run.state for run in runs]
        kinds = {state['status'] for state in states}
        ended = len(kinds) == 1 or kinds == {'done', 'failed'}
        state = dict(
            status=max(kinds) if ended else 'training',  # 'failed' comes after 'done'
            seconds=statistics.fmean(state['seconds'] for state in states),
        )
        if state['status'] == 'failed':
            run, failed = next(
                pair for pair in zip(runs, states, strict=True) if 'error' in pair[1]
            )
            seed = f'seed {run.seed}: ' if len(runs) > 1 else ''
            state['error'] = f'{seed}{failed["error"]}'
        return state

    def try_out(
        self, device: str = 'cpu', progress: Callable[[str], None] = lambda text: None
    ) -> None:
        """Run a training step of all that isn't trained, before it is: what fails is a row's error.

        The images, one or two, are random and have the training's size.
        """
        for name, cfg in self.configs.items():
            if self.runs[name][0].weights or self.state(name)['status'] in ('done', 'training'):
                continue
            progress(name)
            size = self.size
            with suppress(UserError):  # the config does not state it
                size = training_size(cfg)
            number = min(cfg.train_dataloader.batch_size, 2)  # some norms need two
            batch = random_batch(number, size, scope=cfg.default_scope)
            try:
                step = training_run(cfg, batch)
                step.model.init_weights()
                step.model.to(device)
                step(0)()
            except Exception as error:  # from any library; the others are trained
                self.errors[name] = f'cannot be trained: {one_line(error)}'

    def train(
        self,
        command: Sequence[str],
        progress: Progress = lambda name, state, share: None,
        jobs: Mapping[str, Any] | None = None,
    ) -> None:
        """Train what isn't done, or test its checkpoint, each in a process of its own.

        ``command``, with ``CONFIG --resume`` appended, trains a config and validates at the end;
        with ``test.py`` in place of ``train.py`` and ``CONFIG CHECKPOINT`` it tests a checkpoint.
        ``progress`` is called twice a second with a training's name, its state, such as 'epoch 3 of
        8, 0:01:20 left', and the share of the training that is done, from 0 to 1. ``jobs`` are
        ``cluster``, ``parallel`` and ``options`` of :func:`.train_as_jobs`; None trains one after
        the other in this process's terminal.
        """

        todo = []
        pairs = [(name, run) for name, runs in self.runs.items() for run in runs]
        for name, run in sorted(pairs, key=lambda pair: pair[1].seed):
            if name in self.errors:
                progress(run.name, self.errors[name], 0.0)
            elif run.state['status'] == 'done':
                progress(run.name, 'done', 1.0)
            else:
                todo.append(run)
        self._run(todo, command, progress, jobs)

    def test_corrupted(
        self, command: Sequence[str], progress: Progress, jobs: Mapping[str, Any] | None = None
    ) -> None:
        """Test what is trained on corrupted images; see :meth:`train`."""
        todo = [
            test
            for name, runs in self.runs.items()
            for run in runs
            for test in write_tests(run, self.configs.get(name), self.all_corruptions)
        ]
        self._run(todo, command, progress, jobs)

    def _run(
        self,
        todo: Sequence[TrainingRun],
        command: Sequence[str],
        progress: Progress,
        jobs: Mapping[str, Any] | None,
    ) -> None:
        def finish(run: TrainingRun) -> None:
            state = run.state
            self.report()
            progress(run.name, state.get('error', 'done'), float(state['status'] == 'done'))

        if jobs is not None and todo:
            places = dict(folder=self.folder / 'jobs', gpus=self.gpus)
            train_as_jobs(todo, command, progress=progress, finished=finish, **places, **jobs)
            return
        for run in todo:
            run(command, progress=progress)
            finish(run)

    def measure(
        self,
        conditions: Conditions,
        *,
        pictures: int = 6,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Measure all trained models (see :func:`.timing.measure`), draw predictions, and report.

        Nothing is measured again if all of it was, with the same arguments. ``pictures`` is the
        number of test images to draw; ``progress`` gets a description of each step.
        """
        done = [name for name in self.configs if self.state(name)['status'] == 'done']
        of = dict(asdict(conditions), pictures=pictures, backbones=done)
        file = self.folder / MEASURED
        old = json.loads(file.read_text()) if file.exists() else dict(of=None, rows={})
        if done and (old['of'] != of or any('error' in row for row in old['rows'].values())):
            with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
                measured = self._measure(done, conditions, pictures, progress)
            atomic_write(file, json.dumps(dict(measured, of=of), indent=1).encode())
        self.report()

    def _measure(
        self,
        names: Sequence[str],
        conditions: Conditions,
        count: int,
        progress: Callable[[str], None],
    ) -> dict[str, Any]:
        """Return the ``rows`` of the measured models, by name, and how they were measured."""
        cfg = self.cfg
        test_set = DATASETS.build(cfg.test_dataloader.dataset)
        number = min(max(count, conditions.batch), len(test_set))
        items = [test_set[i] for i in range(number)]
        samples = [item['data_samples'] for item in items[:count]]
        set_random_seed(0)  # the same augmentations in every sweep
        train_set = DATASETS.build(cfg.train_dataloader.dataset)
        train_batch = cfg.train_dataloader.batch_size
        batch = pseudo_collate([train_set[i % len(train_set)] for i in range(train_batch)])
        rows: dict[str, dict[str, Any]] = {name: {} for name in names}
        channels_last = any(h['type'] == CHANNELS_LAST for h in cfg.get('custom_hooks') or [])
        if conditions.channels_last is None:
            conditions = replace(conditions, channels_last=channels_last)
        runs, truth, legend = defaultdict(dict), [], {}
        for name in names:
            progress(f'loading {name}')
            row = rows[name]
            try:
                checkpoint = (self.runs[name][0].folder / 'last_checkpoint').read_text().strip()
                predictor = Predictor(self.configs[name], checkpoint, device='cpu')
                row.update(parts=_parts(predictor.model, self.size), infer={})
                make = dict(trained=lambda model, _: model, deployed=deployed_copy)
                models = {form: make[form](predictor.model, self.size) for form in conditions.forms}
                if conditions.onnx:
                    progress(f'exporting {name}')
                    file = self.folder / f'onnx/{_slug(name)}.onnx'
                    export_onnx(predictor.model, file, config=self.configs[name])
                    models['onnx'] = OnnxModel(file, provider=conditions.device)
                step = training_run(self.configs[name], batch)
                paths = [sample.img_path for sample in samples]
                predictions = [predictor(path)[0] for path in paths]
                legend |= predictor.legend([*predictions, *samples])
                pictures = [
                    predictor.draw(path, prediction, SCORE_THRESHOLD)
                    for path, prediction in zip(paths, predictions, strict=True)
                ]
                row['pictures'] = self._save(pictures, _slug(name))
            except Exception as error:  # from any library; the other models are still measured
                row['error'] = f'not measured: {one_line(error)}'
                continue
            for form, model in models.items():
                conditions.prepare(model, form)
                for number in (1, conditions.batch):
                    batch_of = partial(_batch, items, number)
                    run = inference_run(model, batch_of, number, conditions.precision)
                    runs['deployed' if form == 'onnx' else form, number][f'{form} {name}'] = run
            if channels_last:
                step.model.to(memory_format=torch.channels_last)
            runs['train', 1][f'train {name}'] = step
            if not truth and any(key.startswith('gt_') for key in samples[0].keys()):  # noqa: SIM118
                pictures = [predictor.draw(s.img_path, s, truth=True) for s in samples]
                truth = self._save(pictures, 'truth')
        for (kind, number), group in runs.items():
            title = GROUPS[kind].lower()
            figures = measure(
                group,
                rounds=-(-conditions.rounds // number),  # about as many images
                device=conditions.device,
                progress=lambda text, title=title: progress(f'{title}: {text}'),
            )
            for key, values in figures.items():
                form, _, name = key.partition(' ')
                row = rows[name]
                if 'error' in values:
                    row['error'] = f'{title} not measured: {values["error"]}'
                elif form == 'train':
                    row['train'] = values
                elif number == 1:
                    row['infer'][form] = values | conditions.record(form)
                elif form in row['infer']:
                    row['infer'][form]['throughput'] = values.get('throughput')
        measured = dict(asdict(conditions), size=self.size, train_batch=train_batch)
        measured['test_size'] = [*items[0]['inputs'].shape[-2:]]
        data_sets = dict(train=_describe(train_set), test=_describe(test_set))
        parts = dict(rows=rows, truth=truth, legend=legend, data_sets=data_sets)
        return dict(parts, machine=machine(conditions.device), measured=measured)

    def _save(self, pictures: Sequence[np.ndarray], name: str) -> list[str]:
        """Write RGB pictures and return their files, relative to the folder."""
        (self.folder / 'pictures').mkdir(exist_ok=True)
        files = [f'pictures/{name}_{i}.jpg' for i in range(len(pictures))]
        for file, picture in zip(files, pictures, strict=True):
            Image.fromarray(picture).save(self.folder / file, quality=90)
        return files

    def report(self) -> None:
        """Write ``results.json`` and the reports from all results so far."""
        file = self.folder / MEASURED
        measured = json.loads(file.read_text()) if file.exists() else {}
        rows = [self._row(spec, measured.get('rows', {})) for spec in self.backbones]
        task = TASKS.get(self.cfg.default_scope, 'detection')
        data = (node for _, node in iter_dataset_configs(self.cfg.train_dataloader, ''))
        data = [str(node.get('data_root') or node.get('ann_file') or '') for node in data]
        # Reports are read on other machines.
        here, file = Path.cwd(), Path(self.cfg.filename).resolve()
        loop = self.cfg.train_cfg
        unit = 'epoch' if 'max_epochs' in loop else 'iteration'
        length = loop.get('max_epochs', loop.get('max_iters'))
        results = dict(
            version=VERSION,
            task=task,
            config=str(file.relative_to(here) if file.is_relative_to(here) else file),
            command=self.command,
            commit=get_git_hash(),
            changes=_changes(self.cfg),
            schedule=f'{length} {unit}{"s" * (length != 1)}',
            data=', '.join(dict.fromkeys(root.rstrip('/') for root in data)),
            data_sets=measured.get('data_sets', {}),
            pretrained=self.pretrained,
            frozen=self.frozen,
            seeds=self.all_seeds,
            corruptions=self.all_corruptions,
            columns=self.columns,
            **self._metrics(rows, task),
            machine=measured.get('machine') or machine(),
            measured=measured.get('measured'),
            rows=rows,
            published=self.published,
            truth=measured.get('truth', []),
            legend=measured.get('legend', {}),  # of segmentations: class -> RGB
        )
        atomic_write(self.folder / 'results.json', json.dumps(results, indent=1).encode())
        write_report(self.folder)

    def _metrics(self, rows: Sequence[Mapping[str, Any]], task: str) -> dict[str, Any]:
        """Return the logged metrics, the one of the best checkpoint first, and its rule."""
        hook = self.cfg.default_hooks.get('checkpoint') or {}
        logged = list(dict.fromkeys(name for row in rows for name in row['metrics']))
        best = hook.get('save_best') or ()
        names = [*([best] if isinstance(best, str) else best), *logs.main_metrics(logged)]
        names += [name for name in logs.METRIC_NAMES.values() if name in logged] + logged
        names = dict.fromkeys(logs.METRIC_NAMES.get(name, name) for name in names)
        names = [name for name in names if name in logged] or [DEFAULT_METRICS[task]]
        return dict(metrics=names, rule=hook.get('rule'))

    def _row(self, backbone: BackboneSpec, measured: Mapping[str, Any]) -> dict[str, Any]:
        name, runs, state = backbone.name, self.runs[backbone.name], self.state(backbone.name)
        outcomes = [run.read_log() for run in runs]
        losses, validations = outcomes[0]
        seeds = []
        for run, (_, records) in zip(runs, outcomes, strict=True):
            seed = dict(seed=run.seed, **run.state)
            if (matches := run.folder / MATCHES).exists():
                seed['matches'] = str(matches.relative_to(self.folder))
            final = records[-1] if records and seed['status'] == 'done' else {}
            final = {k: v for k, v in final.items() if k != 'iter'}
            seeds.append(dict(seed, metrics=final | robustness(run, final, self.all_corruptions)))
        metrics, deviations = {}, {}
        for metric in seeds[0]['metrics'] if state['status'] == 'done' else ():
            values = [seed['metrics'].get(metric, math.nan) for seed in seeds]
            metrics[metric] = statistics.fmean(values)
            if len(values) > 1:
                deviations[metric] = statistics.stdev(values)
        error = state.get('error')
        for run in runs if metrics else ():
            for test in corrupted_tests(run, self.all_corruptions):
                if test.state['status'] == 'failed':
                    error = f'{test.name.removeprefix(f"{name}, ")}: {test.state["error"]}'
        row = dict(
            backbone=name,
            family=backbone.family,
            settings=backbone.settings,
            source=backbone.checkpoint,
            config=str(runs[0].config.relative_to(self.folder)),
            run=str(runs[0].folder.relative_to(self.folder)),
            status=state['status'],
            error=error,
            seconds=None if backbone.checkpoint else state['seconds'],
            metrics=metrics,
            deviations=deviations,
            seeds=seeds,
            losses=losses,
            validations=validations if losses else [],
        )
        unmeasured = dict(parts={}, infer={}, train=None, pictures=[])
        return row | unmeasured | measured.get(name, {})


def _write_config(run: TrainingRun, cfg: Config) -> None:
    """Write a training's config. After a training it must be the same, unless that failed."""
    cfg = copy.deepcopy(cfg)
    cfg.randomness.seed, cfg.work_dir = run.seed, str(run.folder)
    list(keep_predictions(cfg))
    file, folder, text = run.config, run.folder, cfg.pretty_text
    check_writable(file)
    if (folder / 'last_checkpoint').exists() and file.exists() and file.read_text() != text:
        if run.state['status'] != 'failed':
            raise UserError(
                f'{file} belongs to a sweep with other settings: repeat those, or name another '
                '--out'
            )
        free = (folder.with_name(f'{folder.name}.failed{n}') for n in itertools.count(1))
        folder.rename(next(path for path in free if not path.exists()))
    folder.mkdir(parents=True, exist_ok=True)
    if run.weights:
        (folder / 'last_checkpoint').write_text(run.weights)
    atomic_write(file, text.encode())


def _changes(cfg: Config) -> dict[str, str]:
    """Return the settings that differ from the config file's, by their places."""
    before, now = (_flat(c.to_dict(), '') for c in (load_config(cfg.filename), cfg))
    return {
        key: now.get(key, 'removed')
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def _flat(node: Any, place: str) -> dict[str, str]:
    if isinstance(node, dict | list | tuple) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in _flat(value, f'{place}.{key}').items()}
    return {place.lstrip('.'): str(node)}


def _describe(data_set: Any) -> dict[str, Any]:
    """Return the type and size of a data set, and its annotation file with a checksum."""
    file = Path(getattr(data_set, 'ann_file', None) or '')
    checksum = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    kind, name = type(data_set).__name__, str(file) if checksum else None
    return dict(type=kind, images=len(data_set), annotations=name, sha256=checksum)


def _batch(items: Sequence[dict], size: int, number: int) -> dict[str, list]:
    """Return the batch of that number; after the last item comes the first one again."""
    return pseudo_collate([items[(number * size + i) % len(items)] for i in range(size)])


def _slug(name: str) -> str:
    return re.sub(r'[^\w.-]+', '-', name)


def _parts(model: nn.Module, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return the costs of each part; of a CondenseNetV2 with the connections that it learned."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, CondenseNetV2) and module.form == 'learned':
            module.condense()
    costs = model_costs(model.to('meta').eval(), size)
    return {name: asdict(cost) for name, cost in costs.items()}
