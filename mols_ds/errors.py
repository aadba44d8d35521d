"""The errors and the warning of this package. A user's mistake is a `MolsConfigError` with a one-line message.

Their messages quote names from files, checkpoints and other libraries: str() of each is `printable`.
"""


def printable(text: object) -> str:
    """One line of `text` that is safe to print.

    Line breaks and tabs become spaces. Other characters that are not printable become escapes such as \\x1b: a name
    in a file must not move the cursor, change colors, write a line of its own, or turn around what stands beside it.

    Args:
        text: foreign text, or an error with such.
    """
    return _escaped(" ".join(str(text).split()))


def printable_lines(text: str) -> str:
    """Several lines, such as a table, made safe as by `printable`; their spaces stay."""
    return "\n".join(_escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in line
    )


class MolsError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return printable(super().__str__())


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

    def __str__(self) -> str:
        return printable(super().__str__())
