"""Published figures, from published.yml: shown beside measured ones, never compared with them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mmdense.errors import UserError, suggest_name

PUBLISHED = 'published:'
METRICS = {  # name in the file -> of its figures, which are percentages
    **{f'{kind} AP': [f'{kind} AP{part}' for part in ('', '50', '75')] for kind in ('box', 'mask')},
    'mAP': ['box AP'],
    'mIoU': ['mIoU (%)'],
}


def find_published(names: Iterable[str], task: str, like: str | None = None) -> list[dict]:
    """Return the published figures of backbones such as 'rdnet-t', or of recipes by their names.

    They are the ``name`` of the recipe, which ends in the data set, the address of the ``source``
    and ``metrics``. ``task`` is 'detection' or 'segmentation'. UserError if a name has no figures;
    but with a config ``like`` them only recipes with its detector and data set count.
    """
    known: dict[str, list[dict[str, Any]]] = {}
    words = Path(like or '').stem.split('_')
    text = Path(__file__).with_name('published.yml').read_text(encoding='utf-8')
    for part in (family.get(task, {}) for family in yaml.safe_load(text).values()):
        for row in part.get('rows', ()):
            algorithm, backbone, *_, data_set = row['config'].split('_')
            if like and [algorithm, data_set] != [words[0], words[-1]]:
                continue
            metrics = {
                metric: value if '%' in metric else round(value / 100, 4)
                for name, values in row['results'].items()
                for metric, value in zip(METRICS.get(name, ()), values, strict=False)
            }
            figures = dict(name=row['config'], source=part['source'], metrics=metrics)
            for name in (row['config'], backbone):
                known.setdefault(name, []).append(figures)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in known and not like:
            backbones = [name for name in known if '_' not in name]
            raise UserError(f'no published {task} of {name!r}{suggest_name(name, backbones)}')
        found |= {row['name']: row for row in known.get(name, ())}
    return [*found.values()]
