"""The parts of a config: dicts with a ``type``, which mmengine calls with their other keys.

They are compared with the registries and with signatures before anything is built.
"""

import difflib
import functools
import inspect
import logging
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from mmengine import registry
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import LogProcessor
from torch.utils.data import DataLoader

from mmdense.errors import UserError, one_line, suggest_name

PACKAGE = f'{Path(__file__).parents[1]}/'
LIBRARIES = ('mmcv', 'mmdense', 'mmdet', 'mmengine', 'mmseg', 'torch')
LOADERS = ('train', 'val', 'test')
MODEL = (registry.MODELS, registry.TASK_UTILS, registry.WEIGHT_INITIALIZERS)
DATA = (registry.DATASETS, registry.TRANSFORMS, registry.DATA_SAMPLERS, registry.FUNCTIONS)
# Section -> the registries of its parts.
REGISTRIES = dict(
    model=MODEL,
    optim_wrapper=(registry.OPTIM_WRAPPERS, registry.OPTIMIZERS),
    param_scheduler=(registry.PARAM_SCHEDULERS,),
    default_hooks=(registry.HOOKS,),
    custom_hooks=(registry.HOOKS, registry.TRANSFORMS),
    visualizer=(registry.VISUALIZERS, registry.VISBACKENDS),
    log_processor=(registry.LOG_PROCESSORS,),
    **{f'{loader}_dataloader': DATA for loader in LOADERS},
    **{f'{loader}_cfg': (registry.LOOPS,) for loader in LOADERS},
    **{f'{loader}_evaluator': (registry.METRICS, registry.EVALUATOR) for loader in LOADERS},
)
# Section -> what is built without a type.
DEFAULTS = dict(
    optim_wrapper=OptimWrapper,
    log_processor=LogProcessor,
    **{f'{loader}_dataloader': DataLoader for loader in LOADERS},
)
# The parts that must have a type.
TYPED = re.compile(
    r'model(\.(backbone|neck|\w+_head))?|default_hooks\.\w+|(custom_hooks|param_scheduler)\.\d+|'
    r'optim_wrapper\.optimizer|\w+_dataloader\.(dataset|sampler)|.+\.pipeline\.\d+'
)
# Unknown names this close to a known one are refused. No correct name in the configs of mmdet 3.3
# and mmseg 1.2 is that close to another, but for `deformable_groups`.
CUTOFF = 0.85
NO_ARGUMENTS = ('type', '_scope_', 'deformable_groups')
ADVICE = yaml.safe_load(Path(__file__).with_name('advice.yml').read_text(encoding='utf-8'))


def dicts(node: Any) -> Iterator[dict]:
    """Yield every dict of a config or a part of it, each before those inside it."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from dicts(child)


def check_parts(cfg: Config) -> None:
    """Call :func:`check_part` for all that a runner builds from a config."""
    for section, registries in REGISTRIES.items():
        check_part(cfg.get(section), registries, cfg.get('default_scope'), section)


def check_part(
    node: Any,
    registries: Sequence[Registry] = MODEL,
    scope: str | None = None,
    place: str = 'model',
) -> None:
    """Check the types and arguments of a part and of those inside it.

    Names that are close to a known one are refused. All others are left to Python, because the
    code that builds a part may remove keys first, as mmcv does with ``norm_cfg.requires_grad``. So
    may the classes of other packages, so the parts inside those are not checked.

    ``node`` is the part, or a list of parts; ``place`` is for messages, such as 'model.neck'. A
    misspelt type or argument, or a part without a type, raises UserError.
    """
    if isinstance(node, list | tuple):
        for i, child in enumerate(node):
            check_part(child, registries, scope, f'{place}.{i}')
    if not isinstance(node, dict):
        return
    scope = node.get('_scope_', scope)
    built = DEFAULTS.get(place)
    if 'type' in node:
        built = find(node['type'], registries, scope)
        if built is None:
            _refuse_misspelt_type(node['type'], registries, scope, place)
            return
    elif TYPED.fullmatch(place):
        raise UserError(f'{place} has no type, but only {[*node]}; is its name misspelt?')
    if built is not None:
        if str(getattr(built, '__module__', '')).partition('.')[0] not in LIBRARIES:
            return
        known = arguments(built)
        for key in [key for key in node if key not in (*known, *NO_ARGUMENTS)]:
            if difflib.get_close_matches(key, known, n=1, cutoff=CUTOFF):
                name = getattr(built, '__name__', built)
                hint = suggest_name(key, known)
                raise UserError(f'{place}: {name} has no argument {key!r}{hint}')
    for key, child in node.items():
        check_part(child, registries, scope, f'{place}.{key}')


def arguments(built: Callable) -> list[str]:
    """Return the arguments of a class or function, and those that it passes on to base classes."""
    bases = getattr(built, '__mro__', ())
    functions = [base.__init__ for base in bases if '__init__' in vars(base)] or [built]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: dict[str, None] = {}
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        names |= {p.name: None for p in parameters if p.kind in named and p.name != 'self'}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def find(kind: Any, registries: Sequence[Registry], scope: str | None) -> Callable | None:
    """Return what is registered under a name, in ``scope`` first, or None.

    A class or function is returned as it is.
    """
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    if scope:
        with suppress(ImportError):
            import_module(f'{scope}.registry')
    for root in registries:
        with suppress(RuntimeError):  # nothing is registered
            if callable(built := root.children.get(scope, root).get(kind)):
                return built
    return None


def _refuse_misspelt_type(
    kind: str, registries: Sequence[Registry], scope: str | None, place: str
) -> None:
    names = set()
    for root in registries:
        for child in (root, *root.children.values()):
            child.import_from_location()
            names |= {f'{child.scope}.{name}' for name in child.module_dict}
            if '.' not in kind and child.scope in (root.scope, scope):
                names |= child.module_dict.keys()
    elsewhere = [name for name in sorted(names) if name.endswith(f'.{kind}')]
    if close := elsewhere or difflib.get_close_matches(kind, names, n=1, cutoff=CUTOFF):
        raise UserError(
            f'{place}.type: nothing is registered as {kind!r}; did you mean {close[0]!r}?'
        )


def build_error(error: Exception) -> str | None:
    """Return in one line why a config cannot be built or run, or None for a bug.

    The config is at fault if, below mmengine, nothing but libraries is on the stack. Errors in the
    user's own modules, and those of mmdense that are no refusals, are bugs. Where no constructor
    refuses its arguments, the traceback goes to the run's log file, which the line names.
    """
    stack = traceback.extract_tb(error.__traceback__)
    runs = [i for i, frame in enumerate(stack) if '/mmengine/' in frame.filename]
    if not runs or isinstance(error, UserError):
        return None
    everything = ''.join(traceback.format_exception(error))  # with causes, and a worker's stack
    files = {*re.findall(r'File "(.+?)", line', everything)}
    command, below = ({f.filename for f in part} for part in (stack[: runs[0]], stack[runs[0] :]))
    if not all(map(_in_library, below | (files - command))):
        return None
    last = stack[-1]
    inside = last.filename.startswith(PACKAGE) and error.__cause__ is None
    building = '/mmengine/registry/' in stack[runs[-1]].filename
    refused = building and all(f.name.startswith(('__init__', 'build')) for f in stack[runs[-1] :])
    refused |= inside and type(error) is ValueError
    text = str(error).strip()
    matches = ((re.search(sign, text), way) for sign, way in ADVICE.items())
    ways = (way.format(*filter(None, match.groups())) for match, way in matches if match)
    advice = next((f': {way}' for way in ways), '')
    log = '' if refused or inside else _log(everything)
    if not (refused or advice or log) and is_main_process():
        return None
    reason = text.splitlines()[-1] if 'Traceback' in text else one_line(error)
    reason = reason if text else last.line  # a bare assertion
    start = 'cannot build from the config' if building else 'the run stops'
    return f'{start}: {reason} ({Path(last.filename).name}, line {last.lineno}){advice}{log}'


@functools.cache
def _in_library(file: str) -> bool:
    """Return whether a file of Python code belongs to Python, mmdense or an installed package."""
    folders = [f'{sysconfig.get_path(name)}/' for name in ('stdlib', 'purelib', 'platlib')]
    return file.startswith(('<', PACKAGE, *folders))


def _log(text: str) -> str:
    """Append a text to mmengine's log file, and return the end of a message that names it."""
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).exists():
            with Path(handler.baseFilename).open('a') as file:
                file.write(text)
            return f'; the traceback is in {handler.baseFilename}'
    return ''
