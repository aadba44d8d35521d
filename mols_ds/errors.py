"""Errors and the warning of this package. A user's mistake is a `MolsConfigError` with a one-line message.

Messages quote names from files, checkpoints and other libraries, so str() of each error is `printable`.
"""


def printable(text: object) -> str:
    """Return `text` as one line that is safe to print.

    Line breaks and tabs become spaces. Other non-printable characters become escapes such as \\x1b: a name in a file
    must not move the cursor, change colors, add lines, or reverse the text beside it.

    Args:
        text: foreign text, or an error that contains some.
    """
    return _escaped(" ".join(str(text).split()))


def printable_lines(text: str) -> str:
    """Escape several lines, such as a table, like `printable`. Keeps their spaces."""
    return "\n".join(_escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in line
    )


class MolsError(Exception):
    """Base class of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


class MolsConfigError(MolsError, ValueError):
    """A wrong config, rule, file or argument of the user; the message names the key and what to do."""


class MolsUnsupportedError(MolsError, RuntimeError):
    """An unsupported engine, optimizer or setting; the message names it and what to do."""


class MolsCheckpointError(MolsError, RuntimeError):
    """A checkpoint's MoLS state is missing, corrupt or does not fit this run."""


class MolsTrainingError(MolsError, RuntimeError):
    """A run cannot continue although its settings are valid: its weights are no longer finite."""


class MolsWarning(UserWarning):
    """A request of the user is not done, or done differently; the message names it."""

    def __str__(self) -> str:
        return printable(super().__str__())
