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

ENGINE = ['mmdense.engine']
MODELS = parents.Registry(
    'model',
    parent=parents.MODELS,
    scope='mmdense',
    locations=['mmdense.models', 'mmdense.models.necks', 'mmdense.models.heads', *ENGINE],
)
DATASETS = parents.Registry(
    'dataset', parent=parents.DATASETS, scope='mmdense', locations=['mmdense.datasets.label_maps']
)
HOOKS = parents.Registry('hook', parent=parents.HOOKS, scope='mmdense', locations=ENGINE)
LOOPS = parents.Registry('loop', parent=parents.LOOPS, scope='mmdense', locations=ENGINE)
OPTIM_WRAPPERS = parents.Registry(
    'optimizer wrapper', parent=parents.OPTIM_WRAPPERS, scope='mmdense', locations=ENGINE
)
OPTIM_WRAPPER_CONSTRUCTORS = parents.Registry(
    'optimizer wrapper constructor',
    parent=parents.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmdense',
    locations=ENGINE,
)
