"""What the command lines under tools/ do, as functions."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.apis.errors import UserError, report_errors

__all__ = ['UserError', 'report_errors']
