"""Inference forms of the backbones, which ``switch_to_deploy()`` builds from trained weights."""

from torch import nn

from mmdense.errors import UserError
from mmdense.registry import MODELS

__all__ = ['deploy', 'deployable']


def deploy(model: nn.Module) -> None:
    """Switch the backbone of a trained model, or a backbone, to its inference form, in place.

    UserError if no backbone has an inference form, or one isn't ready for it.
    """
    for backbone in deployable(model):
        backbone.switch_to_deploy()


def deployable(model: nn.Module) -> list[nn.Module]:
    """Return the backbones of a model that have an inference form; UserError if none has."""
    backbones = [module for module in model.modules() if hasattr(module, 'switch_to_deploy')]
    if not backbones:
        registered = MODELS.module_dict.items()
        families = sorted(name for name, cls in registered if hasattr(cls, 'switch_to_deploy'))
        raise UserError(
            f'{type(getattr(model, "backbone", model)).__name__} has no inference form: '
            f'{", ".join(families[:-1])} and {families[-1]} have one'
        )
    return backbones
