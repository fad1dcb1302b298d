"""What an export may fail with."""


class UnsupportedError(ValueError):
    """A target cannot hold an operator or format of the model; nothing was written."""


class VerificationError(RuntimeError):
    """A written file computes something else than the model; nothing was left at its path."""


class MissingPackageError(ImportError):
    """A package that a target needs is not installed; the message gives the command."""
