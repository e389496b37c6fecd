"""What the command lines under tools/ do, as functions."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.apis.errors import report_errors
from mmdense.errors import UserError

__all__ = ['UserError', 'report_errors']
