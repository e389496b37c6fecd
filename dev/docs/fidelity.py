"""Measure every recipe against published.yml, on the meta device: no weights, data or GPU.

Writes docs/fidelity.md, each family's metafile.yml and model-index.yml, or checks that they are
fresh.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmdense import cli as options
from mmdense import models
from mmdense.flops import backbone_macs, count_parameters, model_macs

ROOT = Path(__file__).parents[2]
DOCUMENT = 'docs/fidelity.md'
INDEX = 'model-index.yml'
GENERATED = '# Written by dev/docs/fidelity.py.'
LIMIT = 0.01  # a larger difference needs a reason
SIZES = dict(detection=[(800, 1280)], segmentation=[(512, 2048), (512, 512)])  # height, width
OWN_SIZES = {'coco-320x320': [(320, 320)], 'nyu-480x480': [(480, 640)]}  # by the end of the name
DATA = dict(CocoDataset='COCO', ADE20KDataset='ADE20K', NYUDataset='NYU Depth V2')
ALGORITHMS = {
    'mask-rcnn': 'Mask R-CNN',
    'cascade-mask-rcnn': 'Cascade Mask R-CNN',
    'faster-rcnn': 'Faster R-CNN',
    'retinanet': 'RetinaNet',
    'ssdlite': 'SSDLite',
    'upernet': 'UperNet',
    'deeplabv3plus': 'DeepLabV3+',
    'unet': 'U-Net',
}
OPTIONS = dict(  # of a classifier's network
    ReXNet=dict(taps='unet'),  # with the last 1x1 convolution
    CondenseNetV2=dict(form='condensed'),
    ShuffleNetV2=dict(out_indices=[4]),  # the last 1x1 convolution
)
HIDDEN = dict(a=828, b=1024, c=1024)  # channels between CondenseNetV2's two linear layers
METAFILE = f"""\
{GENERATED} Parameters and FLOPs (multiply-adds of an image of that height and
# width) are measured on the configs. Accuracies are the published ones, of other code:
# the configs have not been run.
"""
TEXT_COLUMNS = ('network', 'recipe', 'figure', 'why', 'part', 'data', 'at')
METRICS = {  # name in mmdense/benchmark/published.yml -> task and metrics of a metafile
    'box AP': ('Object Detection', ['box AP', 'box AP50', 'box AP75']),
    'mask AP': ('Instance Segmentation', ['mask AP', 'mask AP50', 'mask AP75']),
    'mAP': ('Object Detection', ['box AP']),
    'mIoU': ('Semantic Segmentation', ['mIoU']),
    'mIoU, multi-scale': ('Semantic Segmentation', ['mIoU(ms+flip)']),
}

INTRODUCTION = """\
# Fidelity

Written by `dev/docs/fidelity.py` from [published.yml](../mmdense/benchmark/published.yml)
and the configs; a test runs its `--check`. Parameters and multiply-adds (of convolutions and matrix
products) are counted on the networks that the configs build. None of the recipes has been run on
COCO, ADE20K or NYU here: accuracies are the published ones, of other code and weights.
"""
MEASURED = """\
Measured: the backbone, and by formula the classifier, which mmdense does not build.
"""
PROTOCOL = dict(
    detection="""\
Multiply-adds of an image of 1280 x 800 pixels, with 1000 RoIs in each stage of the box heads and
100 in each of the mask heads, as mmdet 2.x counted.
""",
    segmentation="""\
Multiply-adds of an image of 2048 x 512 pixels, as in the tables of Swin and ConvNeXt, whose recipe
this is. The published cells are those of other tables and fit no size, so 512 x 512, what training
and the sliding window see, is given beside it. Parameters include the auxiliary head.
""",
)
DECAY = """\
The optimizer's groups, as built: the rate of each depth over `lr`. Mode 'published' is the released
formula: `decay ** (8 - depth)` for the stem, which has depth 0, and for the stages, and
`decay ** -2` for norms, necks and heads, in every size.
"""


@dataclass
class Recipe:
    """One config, as built."""

    family: str
    path: Path
    cfg: Config
    params: int
    macs: list[int]  # at the sizes of its task
    scales: dict[int, float]  # rate over the optimizer's by depth, the last one the heads'; or none

    @property
    def title(self) -> str:
        algorithm, backbone = self.path.stem.split('_')[:2]
        _, size = backbone.split('-')
        return f'{ALGORITHMS[algorithm]}, {self.family}-{size.upper()}'

    @property
    def data(self) -> str:
        dataset = self.cfg.train_dataloader.dataset
        return DATA[dataset.get('dataset', dataset).type]

    @property
    def link(self) -> str:
        return f'[{self.title}](../{self.path.relative_to(ROOT)})'

    def settings(self) -> dict[str, object]:
        """Return what mmdense/benchmark/published.yml says of a recipe."""
        cfg = self.cfg
        wrapper, warm_up = cfg.optim_wrapper, cfg.param_scheduler[0]
        loss_scale = wrapper.loss_scale
        decay = wrapper.paramwise_cfg
        return {
            'lr': wrapper.optimizer.lr,
            'weight decay': wrapper.optimizer.weight_decay,
            'layer decay': decay.decay_rate,
            'stages counted': 7 if decay.get('mode') == 'published' else 'all',
            'drop path': cfg.model.backbone.drop_path_rate,
            'warm-up': warm_up.end,
            'warm-up from': warm_up.start_factor,
            'length': cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters,
            'batch': cfg.auto_scale_lr.base_batch_size,
            'loss scale': loss_scale if isinstance(loss_scale, str) else loss_scale.init_scale,
        }


def measure(path: Path, family: str, kind: str) -> Recipe:
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.type == f'mmdense.{kind}', path
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        with torch.device('meta'):
            model = MODELS.build(cfg.model).eval()
        sizes = sizes_of(path)
        return Recipe(
            family=family,
            path=path,
            cfg=cfg,
            params=count_parameters(model),
            macs=[sum(model_macs(model, size).values()) for size in sizes],
            scales=layer_scales(model, cfg),
        )


def sizes_of(path: Path) -> list[tuple[int, int]]:
    return OWN_SIZES.get(path.stem.rsplit('_', 1)[1], SIZES[path.parts[-3]])


def layer_scales(model: nn.Module, cfg: Config) -> dict[int, float]:
    if 'constructor' not in cfg.optim_wrapper:
        return {}
    # Mixed precision wants a GPU, and has no say in the groups.
    settings = {**cfg.optim_wrapper, 'type': 'OptimWrapper'}
    settings.pop('loss_scale', None)
    optimizer = build_optim_wrapper(model, settings).optimizer
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    scales: dict[int, float] = {}
    for name, parameter in model.named_parameters():
        depth = -1
        if name.startswith('backbone.'):
            depth, number = model.backbone.layer_depth(name.removeprefix('backbone.'))
            depth = -1 if depth == number - 1 else depth
        scale = rates[id(parameter)] / cfg.optim_wrapper.optimizer.lr
        assert scales.setdefault(depth, scale) == scale, name
    return scales


# ---------------------------------------------------------------------------- docs/fidelity.md


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    rule = ['---' if title in TEXT_COLUMNS else '--:' for title in titles]
    lines = [titles, rule, *rows]
    return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def compare(
    what: list[str], published: float | None, measured: float, why: str | None
) -> list[str]:
    if published is None:
        return [*what, '', f'{measured:.4g}', '', '']
    difference = measured / published - 1
    if abs(difference) > LIMIT and not why:
        sys.exit(f'{": ".join(what)}: {published} was published, {measured:.2f} measured: say why')
    return [*what, f'{published}', f'{measured:.4g}', f'{difference:+.1%}', why or '']


def network(kind: str, arch: str | dict) -> nn.Module:
    name = 'model_name' if kind == 'TimmBackbone' else 'arch'
    with torch.device('meta'):
        return getattr(models, kind)(**{name: arch}, **OPTIONS.get(kind, {})).eval()


def head(
    family: str, arch: str | dict, channels: int, classes: int, size: int | None
) -> tuple[int, int]:
    """Return parameters and multiply-adds of what reads the last map, which mmdense doesn't build.

    Args:
        family: Of the network.
        arch: Of the network.
        channels: Of its last map.
        classes: Of the classifier.
        size: Of the image, in pixels; None if multiply-adds are not asked for.
    """
    params = macs = 0
    if family == 'RDNet':  # a norm
        params += 2 * channels
    if family == 'MobileNetV2':  # a 1x1 convolution and its norm
        convolved, channels = channels, 1280
        params += convolved * channels + 2 * channels
        macs += convolved * channels * (size // 32) ** 2
    if family == 'CondenseNetV2':  # a norm, squeeze and excitation, a linear layer
        gated, channels = channels, HIDDEN[arch]
        gates = 2 * gated * (gated // 16)
        params += 2 * gated + gates + (gated + 1) * channels
        macs += gates + gated * channels
    return params + (channels + 1) * classes, macs + channels * classes


def classifiers(family: str, kind: str, part: dict) -> Iterator[str]:
    yield f'### Classifiers, {part["title"]} ([source]({part["source"]}))\n'
    yield MEASURED
    rows = []
    for row in part['rows']:
        net, classes = network(kind, row['arch']), part.get('classes', 1000)
        params, macs = head(family, row['arch'], net.out_channels[-1], classes, row.get('size'))
        measured = {'params': (count_parameters(net) + params) / 1e6}
        title = f'{family}, {row.get("name", row["arch"])}'
        if 'size' in row:
            size = (row['size'],) * 2
            measured['macs'] = (backbone_macs(net, size) + macs) / 1e9
            title += f', {size[0]} x {size[1]}'
        for key, figure in measured.items():
            name = dict(params='parameters (M)', macs='multiply-adds (G)')[key]
            why = row.get('why', {}).get(key)
            rows.append(compare([title, name], row.get(key), figure, why))
            title = ''
        for name, figure in row.items():
            if name not in ('arch', 'name', 'weights', 'size', 'why', *measured):
                rows.append(['', name, f'{figure}', 'not run', '', ''])
    yield table(['network', 'figure', 'published', 'measured', 'difference', 'why'], rows)


def costs(task: str, part: dict, recipes: dict[str, Recipe]) -> Iterator[str]:
    data = recipes[part['rows'][0]['config']].data
    yield f'### {task.capitalize()}, {data} ([source]({part["source"]}))\n'
    yield PROTOCOL[task]
    sizes = [f' at {width} x {height}' for height, width in SIZES[task]]
    rows = []
    for row in part['rows']:
        recipe, why = recipes[row['config']], row.get('why', {})
        giga = [macs / 1e9 for macs in recipe.macs]
        what = f'multiply-adds{sizes[0]} (G)'
        rows += [
            compare(
                [recipe.link, 'parameters (M)'],
                row.get('params'),
                recipe.params / 1e6,
                why.get('params'),
            ),
            compare(['', what], row.get('macs'), giga[0], why.get('macs')),
            *(
                ['', f'multiply-adds{size} (G)', '', f'{macs:.4g}', '', '']
                for size, macs in zip(sizes[1:], giga[1:], strict=True)
            ),
        ]
        for name, values in row['results'].items():
            name += ', at IoU 0.5, at 0.75' if len(values) == 3 else ''
            rows.append(['', name, ', '.join(map(str, values)), 'not run', '', ''])
    yield table(['recipe', 'figure', 'published', 'measured', 'difference', 'why'], rows)


def unpublished(recipes: Iterable[Recipe]) -> Iterator[str]:
    yield '### Recipes of our own\n'
    yield 'Nothing was published to compare them with; RoIs as in the published tables.\n'
    rows = []
    for recipe in recipes:
        sizes = ', '.join(f'{width} x {height}' for height, width in sizes_of(recipe.path))
        macs = ', '.join(f'{macs / 1e9:.4g}' for macs in recipe.macs)
        rows.append([recipe.link, recipe.data, f'{recipe.params / 1e6:.2f}', macs, sizes])
    yield table(['recipe', 'data', 'parameters (M)', 'multiply-adds (G)', 'at'], rows)


def settings(parts: list[dict], recipes: dict[str, Recipe]) -> Iterator[str]:
    yield '### Settings\n'
    yield 'Of the configs; where the released ones differ, theirs are given in brackets.\n'
    rows = []
    for part in parts:
        for row in part['rows']:
            recipe = recipes[row['config']]
            ours, theirs = recipe.settings(), {**part['recipe'], **row['recipe']}
            assert set(ours) == set(theirs), set(ours) ^ set(theirs)
            cells = [
                f'{value}' + ('' if value == theirs[name] else f' [{theirs[name]}]')
                for name, value in ours.items()
            ]
            rows.append([recipe.link, *cells])
    yield table(['recipe', *ours], rows)


def decay(recipes: Iterable[Recipe]) -> Iterator[str]:
    yield '### Layer decay\n'
    yield DECAY
    decayed = [r for r in recipes if r.scales]
    for recipe in decayed:
        check_scales(recipe)
    last = max(depth for r in decayed for depth in r.scales)
    names = ['stem', *(f'stage {i}' for i in range(last)), 'norms, necks, heads']
    rows = [
        [name, *(f'{r.scales[depth]:.4f}' if depth in r.scales else '' for r in decayed)]
        for name, depth in zip(names, [*range(last + 1), -1], strict=True)
    ]
    titles = [f'{r.title} ({r.cfg.optim_wrapper.paramwise_cfg.get("mode")})' for r in decayed]
    yield table(['part', *titles], rows)


def check_scales(recipe: Recipe) -> None:
    """Compare the optimizer's groups with the formulas, written out here once more."""
    decay = recipe.cfg.optim_wrapper.paramwise_cfg
    depths = len(recipe.scales)
    for depth, scale in recipe.scales.items():
        if decay.get('mode') == 'published':
            expected = decay.decay_rate ** (9 - (10 if depth == -1 else depth) - 1)
        else:
            expected = decay.decay_rate ** (0 if depth == -1 else depths - 1 - depth)
        if abs(scale / expected - 1) > 1e-9:
            sys.exit(f'{recipe.title}, depth {depth}: scale {scale}, expected {expected}')


def document(published: dict, recipes: dict[str, Recipe]) -> str:
    parts = [INTRODUCTION]
    for family, figures in published.items():
        own = {name: recipe for name, recipe in recipes.items() if recipe.family == family}
        tasks = {task: figures[task] for task in SIZES if task in figures}
        known = {row['config'] for part in tasks.values() for row in part['rows']}
        parts.append(f'## {family}\n')
        parts.append(f'[{figures["title"]}]({figures["paper"]}), [code]({figures["code"]}).\n')
        for part in figures['classifiers']:
            parts += classifiers(family, figures.get('type', family), part)
        for task, part in tasks.items():
            parts += costs(task, part, own)
        if ours := [r for name, r in own.items() if name not in known]:
            parts += unpublished(ours)
        if told := [part for part in tasks.values() if 'recipe' in part]:
            parts += settings(told, own)
            parts += decay(own.values())
        if tasks:
            parts.append('### Where recipes differ from the released code\n')
            parts.append(''.join(f'- {line}\n' for line in figures['deviations']))
    return '\n'.join(parts)


# ---------------------------------------------------------------------------- metafiles


def collect(family: str, figures: dict, task: str, recipes: list[Recipe]) -> dict[str, list]:
    """Return a family's part of a metafile."""
    collection = f'{family} {task}'
    rows = {row['config']: row for row in figures.get(task, {}).get('rows', [])}
    top1 = {
        row['weights']: row['top-1']
        for part in figures['classifiers']
        for row in part['rows']
        if 'weights' in row
    }
    entries = []
    for recipe in recipes:
        length = recipe.cfg.train_cfg
        entry = {
            'Name': recipe.path.stem,
            'In Collection': collection,
            'Config': str(recipe.path.relative_to(ROOT)),
            'Metadata': {
                'Architecture': recipe.title.split(', '),
                'Training Data': recipe.data,
                **(
                    {'Iterations': length.max_iters}
                    if 'max_iters' in length
                    else {'Epochs': length.max_epochs}
                ),
                'Batch Size': recipe.cfg.auto_scale_lr.base_batch_size,
                'Parameters': recipe.params,
                'FLOPs': recipe.macs[0],
                'Image Size': list(sizes_of(recipe.path)[0]),
            },
        }
        start = recipe.cfg.model.backbone.get('init_cfg')  # scheduled pruning has none
        if start:
            entry['Metadata']['ImageNet weights'] = start.checkpoint
            weights = start.checkpoint.split('://')[1]
            if weights in top1:
                entry['Metadata']['Top-1 of the ImageNet weights'] = top1[weights]
        if recipe.path.stem in rows:
            entry['Results'] = results(rows[recipe.path.stem], recipe.data)
            entry['Results Source'] = figures[task]['source']
        entries.append(entry)
    return {
        'Collections': [
            {
                'Name': collection,
                'Metadata': {'Architecture': [family]},
                'Paper': {'Title': figures['title'], 'URL': figures['paper']},
                'Code': {'URL': figures['code']},
                'README': str(recipes[0].path.with_name('README.md').relative_to(ROOT)),
            }
        ],
        'Models': entries,
    }


def results(row: dict, data: str) -> list[dict]:
    metrics: dict[str, dict[str, float]] = {}
    for name, values in row['results'].items():
        task, names = METRICS[name]
        metrics.setdefault(task, {}).update(zip(names, values, strict=True))
    return [{'Task': task, 'Dataset': data, 'Metrics': found} for task, found in metrics.items()]


def files() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every generated file."""
    published = yaml.safe_load(
        (ROOT / 'mmdense/benchmark/published.yml').read_text(encoding='utf-8')
    )
    recipes, metafiles = {}, {}
    for family, figures in published.items():
        for task in SIZES:
            folder = ROOT / 'configs' / task / figures.get('folder', family.lower())
            paths = folder.glob(f'*_{family.lower()}-*.py')
            found = [measure(path, family, figures.get('type', family)) for path in paths]
            if not found:
                continue
            found.sort(key=lambda r: (r.title.split(',')[0], r.params, r.path.stem))
            recipes |= {recipe.path.stem: recipe for recipe in found}
            path = str(folder.relative_to(ROOT) / 'metafile.yml')
            content = metafiles.setdefault(path, {'Collections': [], 'Models': []})
            for key, entries in collect(family, figures, task, found).items():
                content[key] += entries
    for path, content in metafiles.items():
        yield path, METAFILE + yaml.safe_dump(content, sort_keys=False, width=100)
    yield INDEX, f'{GENERATED}\n' + yaml.safe_dump({'Import': [*metafiles]})
    yield DOCUMENT, document(published, recipes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, **options.example('dev/docs/fidelity.py --check')
    )
    parser.add_argument('--check', action='store_true', help='write nothing; 1 if one is stale')
    args = parser.parse_args()
    MMLogger.get_instance('fidelity', log_level='ERROR')
    stale = []
    for name, text in files():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            stale.append(name)
            if not args.check:
                path.write_text(text, encoding='utf-8')
    if stale and args.check:
        sys.exit(f'stale: {", ".join(stale)}; run python dev/docs/fidelity.py')


if __name__ == '__main__':
    main()
