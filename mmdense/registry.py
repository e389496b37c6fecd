"""Registries of scope ``mmdense``, children of mmengine's.

The first look-up imports the registered modules, so configs need only ``type='mmdense.RDNet'`` and
``custom_imports = dict(imports=['mmdense'])``.
"""

from importlib.util import find_spec

try:
    from mmengine.registry import HOOKS as _HOOKS
    from mmengine.registry import LOOPS as _LOOPS
    from mmengine.registry import MODELS as _MODELS
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as _OPTIM_WRAPPER_CONSTRUCTORS
    from mmengine.registry import OPTIM_WRAPPERS as _OPTIM_WRAPPERS
    from mmengine.registry import Registry
except ModuleNotFoundError:
    if find_spec('mmengine'):
        raise
    raise ModuleNotFoundError(
        'mmdense needs the MM packages, in one of two distributions that must not be mixed; in its '
        "folder: pip install -e '.[mm]' (maintained) or pip install -e '.[openmmlab]' (original)",
        name='mmengine',
    ) from None

__all__ = ['HOOKS', 'LOOPS', 'MODELS', 'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS']

MODELS = Registry(
    'model',
    parent=_MODELS,
    scope='mmdense',
    locations=['mmdense.models', 'mmdense.models.heads', 'mmdense.engine'],
)
HOOKS = Registry('hook', parent=_HOOKS, scope='mmdense', locations=['mmdense.engine'])
LOOPS = Registry('loop', parent=_LOOPS, scope='mmdense', locations=['mmdense.engine'])
OPTIM_WRAPPERS = Registry(
    'optimizer wrapper', parent=_OPTIM_WRAPPERS, scope='mmdense', locations=['mmdense.engine']
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmdense',
    locations=['mmdense.engine'],
)
