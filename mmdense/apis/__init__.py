"""What the command lines under tools/ do, as functions."""

from mmdense.apis.errors import UserError, report_errors

__all__ = ['UserError', 'report_errors']
