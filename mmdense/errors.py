"""The error for what a user can mend."""

__all__ = ['UserError']


class UserError(RuntimeError):
    """A mistake that the user can mend: its text is one line that says how."""
