"""The base class of every error that its user can correct."""

from __future__ import annotations


class UserError(Exception):
    """An input, a setting or the surroundings break a rule; the message names the rule, the values and what to do.

    The command line prints the message alone and exits with code 2. Any other exception is a defect of orpo_ray and
    shows its traceback.
    """


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class DamagedFileError(UserError, ValueError):
    """A file that orpo_ray wrote cannot be read; the message names it."""


class NoSuchRunError(UserError, FileNotFoundError):
    """No sweep, trial or run has the name that was given; the message lists similar names."""
