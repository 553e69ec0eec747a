"""The two errors that a user sees as one line: a mistake in the input (exit code 2) and a fault outside (1)."""


class UserError(ValueError):
    """A user's mistake, described in one line. The command line exits with code 2."""


class Fault(RuntimeError):
    """A failure outside of this program that is not the user's mistake, described in one line: exit code 1."""
