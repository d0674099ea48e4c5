"""Errors that users can correct, and their base class."""

from __future__ import annotations


class UserError(Exception):
    """An input, a setting or the environment breaks a rule; the message names the rule, the values and a remedy.

    The command line prints the message without a traceback and exits with code 2. Any other exception is a bug in
    orpo_ray and shows its traceback.
    """


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class DamagedFileError(UserError, ValueError):
    """A file that orpo_ray wrote cannot be read; the message names it."""


class NoSuchRunError(UserError, FileNotFoundError):
    """No sweep, trial or run has the name that was given; the message lists similar names."""
