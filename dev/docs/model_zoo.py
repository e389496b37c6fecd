"""Write docs/model_zoo.md and each family's README, or check that they are fresh.

From the metafiles, which dev/docs/fidelity.py writes (run that first), and
mmdense/benchmark/published.yml.
"""

import argparse
import os.path
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

ROOT = Path(__file__).parents[2]
ZOO, FIDELITY, README = 'docs/model_zoo.md', 'docs/fidelity.md', 'README.md'
INDEX, PUBLISHED, WEIGHTS = 'model-index.yml', 'mmdense/benchmark/published.yml', 'docs/weights.md'
SECTIONS = {  # by data
    'COCO': 'Detection and instance segmentation, COCO',
    'ADE20K': 'Semantic segmentation, ADE20K',
    'NYU Depth V2': 'Depth, NYU Depth V2',
}
FOLDERS = {
    'COCO': '`data/coco`',
    'ADE20K': '`data/ade/ADEChallengeData2016`',
    'NYU Depth V2': '`data/nyu`, as mmseg prepares it',
}
METRICS = {  # of a metafile, with their titles
    'COCO': {'box AP': 'box AP', 'mask AP': 'mask AP'},
    'ADE20K': {'mIoU': 'mIoU', 'mIoU(ms+flip)': 'mIoU, ms + flip'},
    'NYU Depth V2': {'RMSE': 'RMSE (m)'},
}
# Of the recipe in a config's name, in the order in which they are told.
RECIPES = dict(ms='multi-scale', crop='crops', condense='scheduled pruning', amp='AMP')
NOT_RUN = '`not run`'
NUMBERS = ('params (M)', 'GMACs', 'top-1')
RELEASED = 'https://github.com/jianghaojun/CondenseNetV2#results'
PAGES = dict(  # of ImageNet weights, by scheme
    timm='https://huggingface.co/timm/{}',
    torchvision='https://docs.pytorch.org/vision/stable/models.html',
    condensenetv2=RELEASED,
)
ORIGINS = dict(
    timm="The first run downloads timm's ImageNet weights from the Hugging Face hub.",
    torchvision="The first run downloads torchvision's ImageNet weights.",
    condensenetv2=f"""\
The released ImageNet weights are linked [there]({RELEASED}); they go into
`checkpoints/`, under the names in the table.""",
)
ABOUT = dict(
    RDNet="""\
A DenseNet on a patch stem: 7 to 12 dense stages, whose blocks read the concatenation of all
features made before them in the stage.""",
    DenseNet="""\
Each layer reads the concatenation of all features made before it in its block; between blocks,
transitions halve channels and resolution.""",
    ReXNet="""\
A light network of inverted bottlenecks whose channels grow linearly from block to block.""",
    CondenseNetV2="""\
A light DenseNet that learns which of the earlier features each layer reads, and which of them it
updates; the other connections are pruned.""",
    ShuffleNetV2="""\
A light network that convolves half of the channels and shuffles them with the other half.""",
    MobileNetV2="""\
A light network of inverted bottlenecks with linear outputs, as timm has it.""",
)

MEASURED = """\
None of these recipes has been run on its data here, and there are no trained models to download.
Columns called "published" hold results of **other code and weights**, linked to their source;
`not run`: none was published either. Parameters and GMACs (billions of multiply-adds) are measured,
of the whole model and an image of that size (width x height). Top-1 is the published one of the
ImageNet weights that training starts from, where we know of any.
"""
INTRODUCTION = f"""\
# Model zoo

Written by `dev/docs/model_zoo.py` from the metafiles and
[published.yml](../mmdense/benchmark/published.yml);
a test runs its `--check`.

{MEASURED}
A schedule of 1x is 12 epochs, 3x is 36; 160k counts iterations. SSDLite's 600 epochs are mmdet's
120 over five copies of the data. [Fidelity](fidelity.md) compares costs and settings with the
published ones, [Weights](weights.md) says which files load.
"""


@dataclass
class Entry:
    """One recipe, as its metafile and mmdense/benchmark/published.yml have it."""

    family: str
    path: PurePosixPath  # of the config, from the repository's root
    head: str
    backbone: str
    data: str
    size: tuple[int, int]  # height, width
    params: int
    macs: int
    weights: str | None  # as the config names them
    top1: tuple[float, str] | None  # and its source
    results: dict[str, float]
    source: str
    wrong: list[str]  # costs that the source states otherwise than they are measured

    @property
    def fields(self) -> list[str]:
        return self.path.stem.split('_')

    @property
    def length(self) -> str:
        return self.fields[-2].split('-')[-1]

    @property
    def schedule(self) -> str:
        """Return the length of training, and what is peculiar to the recipe."""
        options = sorted(self.fields[-2].split('-')[:-1], key=list(RECIPES).index)
        _, _, crop = self.fields[-1].partition('-')
        crops = [f'crops of {crop}'] if self.data != 'COCO' else []
        return ', '.join([self.length, *crops, *(RECIPES[option] for option in options)])

    def cells(self, page: str) -> dict[str, str]:
        """Return the cells of a table in ``page`` by their titles."""
        height, width = self.size
        giga = self.macs / 1e9
        return {
            'backbone': link(self.backbone, self.path, page),
            'head': self.head,
            'schedule': self.schedule,
            'image': f'{width}x{height}',
            'params (M)': f'{self.params / 1e6:.2f}',
            'GMACs': f'{giga:.{1 if giga >= 10 else 2}f}',
            'ImageNet weights': weights_link(self.weights),
            'top-1': f'[{self.top1[0]}]({self.top1[1]})' if self.top1 else '',
            **{f'published {title}': self.result(k) for k, title in METRICS[self.data].items()},
        }

    def result(self, name: str) -> str:
        if name in self.results:
            return f'[{self.results[name]}]({self.source})'
        return NOT_RUN if name != 'mask AP' or 'Mask' in self.head else ''


def link(text: str, target: str | PurePosixPath, page: str, part: str = '') -> str:
    return f'[{text}]({os.path.relpath(target, Path(page).parent)}{part})'


def weights_link(weights: str | None) -> str:
    if weights is None:
        return 'none'
    scheme, name = weights.split('://')
    return f'[{PurePosixPath(name).name}]({PAGES[scheme].format(name)})'


def table(entries: Iterable[Entry], page: str, *, without: str | None = None) -> str:
    """Return a table of recipes, without a column and those in which nothing stands."""
    rows = [entry.cells(page) for entry in entries]
    titles = [title for title in rows[0] if title != without and any(row[title] for row in rows)]
    rule = ['--:' if t in NUMBERS or t.startswith('published') else '---' for t in titles]
    lines = [titles, rule, *([row[title] for title in titles] for row in rows)]
    return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def left_out(entries: Iterable[Entry], page: str) -> Iterator[str]:
    """Yield what is said of costs that the source has and the table has not."""
    families: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.wrong:
            families.setdefault(entry.family, []).append(entry)
    for family, wrong in families.items():
        what = ' and '.join(dict.fromkeys(cost for entry in wrong for cost in entry.wrong))
        names = ', '.join(f'{entry.head} {entry.backbone}' for entry in wrong)
        why = link('fidelity', FIDELITY, page, f'#{family.lower()}')
        yield f'The source has other {what} of {names}, left out here: {why} says why.\n'


def by_cost(entry: Entry) -> tuple[str, int, int, str]:
    return entry.length[-1], int(entry.length[:-1]), entry.macs, entry.schedule


def zoo(published: dict, entries: list[Entry]) -> str:
    """Return docs/model_zoo.md."""
    parts = [INTRODUCTION, families(published, entries)]
    for data, title in SECTIONS.items():
        parts.append(f'## {title}\n')
        own = [entry for entry in entries if entry.data == data]
        for head in sorted({entry.head for entry in own}):
            group = sorted((entry for entry in own if entry.head == head), key=by_cost)
            parts += [f'### {head}\n', table(group, ZOO, without='head'), *left_out(group, ZOO)]
    return '\n'.join(parts)


def families(published: dict, entries: list[Entry]) -> str:
    lines = ['| family | paper | recipes |', '| --- | --- | --- |']
    for family, figures in published.items():
        folders = dict.fromkeys(entry.path.parent for entry in entries if entry.family == family)
        recipes = ', '.join(link(path.parts[1], path / README, ZOO) for path in folders)
        lines.append(f'| {family} | [{figures["title"]}]({figures["paper"]}) | {recipes} |')
    return '\n'.join(lines) + '\n'


def readme(published: dict, folder: PurePosixPath, entries: list[Entry]) -> str:
    """Return the README of a folder of configs."""
    page = str(folder / README)
    names = list(dict.fromkeys(entry.family for entry in entries))
    parts = [f'# {" and ".join(names)} for {folder.parts[1]}\n']
    for name in names:
        figures = published[name]
        paper = f'[{figures["title"]}]({figures["paper"]}) ([code]({figures["code"]}))'
        parts.append(f'{paper}.\n{ABOUT[name]}\n')
    parts += ['## Recipes\n', MEASURED]
    for data, title in SECTIONS.items():
        own = sorted((e for e in entries if e.data == data), key=lambda e: (e.head, *by_cost(e)))
        if own:
            parts += [f'### {title}\n', table(own, page), *left_out(own, page)]
    compared = ', '.join(link(name, FIDELITY, page, f'#{name.lower()}') for name in names)
    parts.append(f"""\
{link('Model zoo', ZOO, page)}: the same heads on other backbones. Fidelity of {compared}:
costs and settings beside the published ones. Written by `dev/docs/model_zoo.py`.
""")
    parts += ['## Train\n', training(entries, page), '## Weights\n', origins(entries, page)]
    return '\n'.join(parts)


def training(entries: list[Entry], page: str) -> str:
    example = min(entries, key=lambda e: (not e.results, list(SECTIONS).index(e.data), e.macs))
    how = link('README', README, page, '#train-on-coco-and-ade20k')
    return f"""\
From the repository's root, with the data in {FOLDERS[example.data]} (see the {how}):

```
CONFIG={example.path}
python tools/train.py $CONFIG --auto-scale-lr    # one GPU
tools/dist_train.sh $CONFIG 8 --auto-scale-lr    # eight
```
"""


def origins(entries: list[Entry], page: str) -> str:
    schemes = dict.fromkeys(e.weights.split('://')[0] for e in entries if e.weights)
    lines = [ORIGINS[scheme] for scheme in schemes]
    lines.append(f'{link("Weights", WEIGHTS, page)} tells of other files, and of machines offline.')
    return '\n'.join(lines) + '\n'


# ---------------------------------------------------------------------------- input and output


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding='utf-8'))


def load(published: dict) -> Iterator[Entry]:
    """Yield all recipes, family by family."""
    metafiles = [read(name) for name in read(INDEX)['Import']]
    family_of = {
        c['Name']: c['Metadata']['Architecture'][0] for m in metafiles for c in m['Collections']
    }
    models = [model for metafile in metafiles for model in metafile['Models']]
    for family, figures in published.items():
        sources = {
            row['weights']: part['source']
            for part in figures['classifiers']
            for row in part['rows']
            if 'weights' in row
        }
        stated = {
            row['config']: row
            for task in ('detection', 'segmentation')
            for row in figures.get(task, {}).get('rows', [])
        }
        for model in models:
            if family_of[model['In Collection']] == family:
                yield read_entry(family, model, sources, stated.get(model['Name'], {}))


def read_entry(family: str, model: dict, sources: dict[str, str], stated: dict) -> Entry:
    """Return a recipe.

    Args:
        family: Of its backbone.
        model: Its part of the metafile.
        sources: Where top-1 of ImageNet weights was published, by the weights' name.
        stated: Its part of mmdense/benchmark/published.yml.
    """
    metadata = model['Metadata']
    head, backbone = metadata['Architecture']
    weights, top1 = metadata.get('ImageNet weights'), metadata.get('Top-1 of the ImageNet weights')
    names = dict(params='parameters', macs='multiply-adds')
    return Entry(
        family=family,
        path=PurePosixPath(model['Config']),
        head=head,
        backbone=backbone,
        data=metadata['Training Data'],
        size=tuple(metadata['Image Size']),
        params=metadata['Parameters'],
        macs=metadata['FLOPs'],
        weights=weights,
        top1=None if top1 is None else (top1, sources[weights.split('://')[1]]),
        results={k: v for part in model.get('Results', []) for k, v in part['Metrics'].items()},
        source=model.get('Results Source', ''),
        wrong=[names[key] for key in stated.get('why', {})],
    )


def files() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every generated file."""
    published = read(PUBLISHED)
    entries = list(load(published))
    yield ZOO, zoo(published, entries)
    for folder in dict.fromkeys(entry.path.parent for entry in entries):
        own = [entry for entry in entries if entry.path.parent == folder]
        yield str(folder / README), readme(published, folder, own)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example:\n  python dev/docs/fidelity.py && python dev/docs/model_zoo.py',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--check', action='store_true', help='write nothing; 1 if one is stale')
    args = parser.parse_args()
    stale = []
    for name, text in files():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            stale.append(name)
            if not args.check:
                path.write_text(text, encoding='utf-8')
    if stale and args.check:
        sys.exit(f'stale: {", ".join(stale)}; run python dev/docs/model_zoo.py')


if __name__ == '__main__':
    main()
