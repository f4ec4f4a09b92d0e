"""What a user can mend: one family of errors, each with one message that names what, where and the remedy.

Everything that can go wrong outside the program (a flag, a file, a disk, a cluster, a model) is raised as one of these
where it is noticed; jobs show the message alone. Any other exception is a fault of the program, and jobs say so.
Each is also the built-in error that its kind suggests, so that callers need not know this module.
"""

from __future__ import annotations


class RellaError(Exception):
    """Something that the user can mend; shown as one message, without a traceback."""


class InputError(RellaError, ValueError):
    """A flag, a configuration, a data file or a model that does not do."""


class MissingError(RellaError, FileNotFoundError):
    """A file or folder that should be there."""


class StorageError(RellaError, OSError):
    """A storage that cannot be read or written: full, read-only, not to be reached."""


class ArtifactError(RellaError, RuntimeError):
    """An artifact that is missing, unfinished or damaged."""


class BusyError(RellaError, RuntimeError):
    """Another driver works on the same artifact."""


class ClusterError(RellaError, ValueError):
    """A cluster that lacks what was asked for, or whose nodes do not see the same storage."""


class TrainingError(RellaError, ArithmeticError):
    """A training that came to nothing, such as a loss that is not finite."""


class WorkerError(RellaError, RuntimeError):
    """What a worker raised, when the worker itself could say so; `trace` is its traceback as text.

    Args:
        message: type and message of the worker's error, or the message alone where it is one of ours.
        trace: for `RELLA_DEBUG=1`.
        ours: whether it was a `RellaError`; else it is a fault of the program.
    """

    def __init__(self, message: str, trace: str = "", ours: bool = True) -> None:
        super().__init__(message)
        self.trace, self.ours = trace, ours


STOPPED = "stopped early"


class StoppedError(RellaError):
    """Training ended at a validation because its sweep wants no more of it."""
