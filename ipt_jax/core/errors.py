"""The two errors that reach a user as one line: a mistake in the input (exit code 2) and a fault outside (1)."""


class UserError(ValueError):
    """A user's mistake, told in one line. The command line turns it into exit code 2."""


class Fault(RuntimeError):
    """What went wrong outside of this program and is no mistake of its user's, told in one line: exit code 1."""
