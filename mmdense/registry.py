"""Registries of scope ``mmdense``, children of mmengine's.

The first look-up imports the registered modules, so configs need only ``type='mmdense.RDNet'`` and
``custom_imports = dict(imports=['mmdense'])``.
"""

from importlib.util import find_spec

try:
    from mmengine import registry as parents
except ModuleNotFoundError:
    if find_spec('mmengine'):
        raise
    raise ModuleNotFoundError(
        'mmdense needs the MM packages, in one of two distributions that must not be mixed; in its '
        "folder: pip install -e '.[mm]' (maintained) or pip install -e '.[openmmlab]' (original)",
        name='mmengine',
    ) from None


def _child(parent: parents.Registry, *modules: str) -> parents.Registry:
    return parents.Registry(parent.name, parent=parent, scope='mmdense', locations=[*modules])


ENGINE = 'mmdense.engine'
MODELS = _child(
    parents.MODELS, 'mmdense.models', 'mmdense.models.necks', 'mmdense.models.heads', ENGINE
)
DATASETS = _child(parents.DATASETS, 'mmdense.datasets.label_maps')
TRANSFORMS = _child(parents.TRANSFORMS, 'mmdense.datasets.corruption')
HOOKS = _child(parents.HOOKS, ENGINE)
LOOPS = _child(parents.LOOPS, ENGINE)
OPTIM_WRAPPERS = _child(parents.OPTIM_WRAPPERS, ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = _child(parents.OPTIM_WRAPPER_CONSTRUCTORS, ENGINE)
