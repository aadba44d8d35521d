"""The errors and the warning of this package. A user's mistake is a `MolsConfigError` with a one-line message."""


class MolsError(Exception):
    """Base of every error that this package raises on purpose."""


class MolsConfigError(MolsError, ValueError):
    """The user's configuration, rules, files or arguments are wrong; the message names the key and the way out."""


class MolsUnsupportedError(MolsError, RuntimeError):
    """An engine, optimizer or setting that cannot be supported; the message names it and the way out."""


class MolsCheckpointError(MolsError, RuntimeError):
    """A checkpoint's MoLS state is missing, corrupt or does not fit this run."""


class MolsTrainingError(MolsError, RuntimeError):
    """A run cannot go on through no mistake in its settings: its weights are not finite any more."""


class MolsWarning(UserWarning):
    """Something that the user asked for is not done, or done differently; the message names it."""
