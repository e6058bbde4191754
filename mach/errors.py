"""Every error that mach raises on purpose: one root, one class a cause, one line a message.

A message names the place (file, row, key), the offending value, the limit and the repair. The command
line prints it alone, without a traceback, and leaves with the class's exit code.
"""


class MachError(Exception):
    """Root of all errors raised on purpose; anything else that escapes is a bug."""

    exit_code = 2


class ConfigError(MachError):
    """A configuration, option or argument that cannot work."""


class DataError(MachError):
    """Input data that is malformed, inconsistent or does not fit the model."""


class StorageError(MachError):
    """A store or run directory that is missing, damaged, locked or of another format."""


class IncompleteRunError(MachError):
    """A run that stopped before every repetition was trained; the same command resumes it."""

    exit_code = 3


class TrainingError(MachError):
    """Training that cannot end well however often it is tried."""


class TrainingStoppedError(MachError):
    """Training stopped on request; its state is on disk."""

    exit_code = 3


class DegradedWarning(UserWarning):
    """Answers by fewer repetitions than the run has: some are not there, or kept by actors that are lost or late."""
