"""Parameters, MACs and settings of every recipe and network, counted on the meta device.

Nothing is downloaded or trained: no weights, data or GPU are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmdense import models
from mmdense.flops import Cost, backbone_macs, count_parameters, model_costs
from mmdense.models import necks
from mmdense.models.backbones import FAMILIES, Backbone

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / 'mmdense/benchmark/published.yml'
# Height and width of the images; the first is the size of the published tables.
SIZES = dict(
    detection=[(800, 1280)],
    segmentation=[(512, 2048), (512, 512)],
    classification=[(224, 224)],
)
SPECIAL_SIZES = {  # by config name
    'coco-320x320': [(320, 320)],
    'nyu-480x480': [(480, 640)],
    'in1k-384x384': [(384, 384)],
    'cifar10': [(32, 32)],
    'cifar100': [(32, 32)],
}
DATA = dict(
    CocoDataset='COCO',
    ADE20KDataset='ADE20K',
    NYUDataset='NYU Depth V2',
    ImageNet='ImageNet-1k',
    CIFAR10='CIFAR-10',
    CIFAR100='CIFAR-100',
)
HEADS = {
    'mask-rcnn': 'Mask R-CNN',
    'cascade-mask-rcnn': 'Cascade Mask R-CNN',
    'faster-rcnn': 'Faster R-CNN',
    'retinanet': 'RetinaNet',
    'ssdlite': 'SSDLite',
    'upernet': 'UperNet',
    'deeplabv3plus': 'DeepLabV3+',
    'unet': 'U-Net',
}
# Fields of the recipe in a config's name.
OPTIONS = dict(
    ms='multi-scale',
    crop='crops',
    condense='scheduled pruning',
    cosine='cosine',
    finetune='fine-tuned',
    amp='AMP',
)
# Arguments that give the network of a classifier.
CLASSIFIER = dict(
    ReXNet=dict(taps='unet'),  # with the last 1x1 convolution
    CondenseNetV2=dict(form='condensed', out_indices=[-1]),
    ShuffleNetV2=dict(out_indices=[4]),  # the last 1x1 convolution
)
CONDENSENETV2_HIDDEN = dict(a=828, b=1024, c=1024)  # between its two linear layers


def read_published() -> dict[str, Any]:
    """Return the published figures by family; see the comment in the file."""
    return yaml.safe_load(PUBLISHED.read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------- recipes


@dataclass(frozen=True, eq=False)
class Recipe:
    """A config and the model that it builds.

    Attributes:
        family: Of its backbone.
        path: Of the config.
        cfg: The config.
        row: What published.yml has for it, or nothing.
        source: Where that was published.
        top1: Published accuracy of its ImageNet weights in percent, and where; or None.
    """

    family: str
    path: Path
    cfg: Config
    row: dict[str, Any]
    source: str
    top1: tuple[float, str] | None

    @property
    def file(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def task(self) -> str:
        return self.path.parts[-3]

    @property
    def classifies(self) -> bool:
        return self.task == 'classification'

    @property
    def head(self) -> str:
        return self.family if self.classifies else HEADS[self.path.stem.split('_')[0]]

    @property
    def backbone(self) -> str:
        fields = self.path.stem.split('_')
        size = fields[0].partition('-')[2] if self.classifies else fields[1].split('-')[1]
        return f'{self.family}-{size.upper()}'

    @property
    def title(self) -> str:
        return self.backbone if self.classifies else f'{self.head}, {self.backbone}'

    @property
    def results(self) -> dict[str, list[float]]:
        """What was published, by the names of metrics; a classifier's error as its accuracy."""
        if not self.classifies:
            return self.row.get('results', {})
        row = {**self.row}
        for name in ('top-1 error', 'error'):
            if name in row:
                row.setdefault('top-1', round(100 - row[name], 2))
        return {name: [row[name]] for name in ('top-1', 'top-5') if name in row}

    @property
    def data(self) -> str:
        dataset = self.cfg.train_dataloader.dataset
        return DATA[dataset.get('dataset', dataset).type]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return SPECIAL_SIZES.get(self.path.stem.rsplit('_', 1)[1], SIZES[self.task])

    @property
    def length(self) -> str:
        """Such as '3x' or '160k'."""
        return self.path.stem.split('_')[-2].split('-')[-1]

    @property
    def schedule(self) -> str:
        """Such as '3x, multi-scale, crops, AMP'."""
        *_, recipe, data = self.path.stem.split('_')
        options = sorted(recipe.split('-')[:-1], key=list(OPTIONS).index)
        crops = [f'crops of {data.partition("-")[2]}'] if self.task == 'segmentation' else []
        return ', '.join([self.length, *crops, *(OPTIONS[option] for option in options)])

    @property
    def weights(self) -> str | None:
        init_cfg = self.cfg.model.backbone.get('init_cfg')  # scheduled pruning has none
        return init_cfg.checkpoint if init_cfg else self.cfg.get('load_from')

    @cached_property
    def model(self) -> nn.Module:
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope), torch.device('meta'):
            return MODELS.build(self.cfg.model).eval()

    @cached_property
    def params(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def macs(self) -> list[int]:
        """MACs of one image, at each of :attr:`sizes`."""
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
            return [sum(model_costs(self.model, x).values(), Cost()).macs for x in self.sizes]

    def settings(self) -> dict[str, object]:
        """Return the settings that published.yml gives for a published recipe."""
        cfg = self.cfg
        wrapper, warm_up = cfg.optim_wrapper, cfg.param_scheduler[0]
        loss_scale, decay = wrapper.loss_scale, wrapper.paramwise_cfg
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

    @cached_property
    def rates(self) -> dict[str, float]:
        """The learning rate of each depth over ``lr``; nothing without layer decay."""
        if 'constructor' not in self.cfg.optim_wrapper:
            return {}
        # AmpOptimWrapper needs a GPU; the parameter groups are the same.
        settings = {**self.cfg.optim_wrapper, 'type': 'OptimWrapper'}
        settings.pop('loss_scale', None)
        optimizer = build_optim_wrapper(self.model, settings).optimizer
        rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
        _, number = self.model.backbone.layer_depth('stem.0.weight')
        parts = ['stem', *(f'stage {i}' for i in range(number - 2)), 'norms, necks, heads']
        scales = {}
        for name, parameter in self.model.named_parameters():
            depth = number - 1
            if name.startswith('backbone.'):
                depth, _ = self.model.backbone.layer_depth(name.removeprefix('backbone.'))
            scale = rates[id(parameter)] / self.cfg.optim_wrapper.optimizer.lr
            assert scales.setdefault(depth, scale) == scale, name
        return {part: scales[depth] for depth, part in enumerate(parts)}


def read_recipes(published: dict[str, Any]) -> list[Recipe]:
    """Return all recipes: by family, task, head and size."""
    top1 = {
        row['weights']: (row['top-1'], part['source'])
        for figures in published.values()
        for part in figures['classifiers']
        for row in part['rows']
        if 'weights' in row
    }
    recipes = []
    for family, figures in published.items():
        for task in SIZES:
            parts = figures['classifiers'] if task == 'classification' else [figures.get(task, {})]
            rows = {
                row['config']: (row, part['source'])
                for part in parts
                for row in part.get('rows', [])
                if 'config' in row
            }
            folder = ROOT / 'configs' / task / figures.get('folder', family.lower())
            group = []
            start = '' if task == 'classification' else '*_'
            for path in folder.glob(f'{start}{family.lower()}-*.py'):
                cfg = Config.fromfile(path)
                backbone = cfg.model.backbone
                assert backbone.type == f'mmdense.{figures.get("type", family)}', path
                weights = (backbone.get('init_cfg') or {}).get('checkpoint', '').split('://')[-1]
                row, source = rows.get(path.stem, ({}, ''))
                group.append(Recipe(family, path, cfg, row, source, top1.get(weights)))
            recipes += sorted(group, key=lambda r: (r.head, r.params, r.path.stem))
    return recipes


# ---------------------------------------------------------------------------- networks


def classifier(family: str, kind: str, row: dict[str, Any], classes: int) -> dict[str, float]:
    """Return the parameters ('params', in millions) and MACs ('macs', in billions) of a classifier.

    Args:
        family: Of the network.
        kind: Its class in :mod:`mmdense.models`.
        row: What published.yml has for it; without ``size`` no MACs are counted.
        classes: Number of classes.
    """
    argument = 'model_name' if kind == 'TimmBackbone' else 'arch'
    options = {argument: row['arch'], **CLASSIFIER.get(kind, {})}
    with torch.device('meta'):
        net = getattr(models, kind)(**options).eval()
        head = classifier_head(family, row['arch'], net.out_channels[-1], classes).eval()
    counts = {'params': (count_parameters(net) + count_parameters(head)) / 1e6}
    if 'size' in row:
        side = row['size'] // net.out_strides[-1]
        macs = backbone_macs(net, (row['size'],) * 2)
        macs += backbone_macs(head, (side, side), in_channels=net.out_channels[-1])
        counts['macs'] = macs / 1e9
    return counts


def classifier_head(family: str, arch: str | dict, channels: int, classes: int) -> nn.Module:
    """Return layers with the parameters and MACs of a classifier's head.

    Args:
        family: Of the network.
        arch: Of the network.
        channels: Of its last feature maps.
        classes: Number of classes.
    """
    layers: Iterable[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    hidden = None
    if family == 'RDNet':
        layers = necks.RDNetNeck(in_channels=channels)
    if family == 'ReXNet' and 'lite' in arch:
        hidden = 1024
        layers = necks.ReXNetNeck(in_channels=channels, hidden_channels=hidden)
    if family == 'MobileNetV2':
        conv = nn.Conv2d(channels, 1280, 1, bias=False)
        channels = 1280
        layers = [conv, nn.BatchNorm2d(channels), *layers]
    if family == 'CondenseNetV2':
        hidden = CONDENSENETV2_HIDDEN[arch] if isinstance(arch, str) else None  # of CIFAR
        layers = necks.CondenseNetV2Neck(in_channels=channels, hidden_channels=hidden)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(hidden or channels, classes))


def named_networks(family: str) -> list[tuple[dict[str, str], Backbone]]:
    """Return the named backbones of a family as (arguments, network), on the meta device.

    The list is empty for families that mmdense takes from timm.
    """
    kind = FAMILIES.get(family.lower())
    networks = []
    for arch in kind.archs if kind else ():
        options = dict(arch=arch, **kind.pretrained_recipe)
        with torch.device('meta'):
            networks.append((options, kind(**options).eval()))
    return networks
