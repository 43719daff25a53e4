"""Errors with one-line messages. No torch here: the report reads files without it."""


class UsageError(ValueError):
    """A mistake the user can fix. Its message is one line: what is wrong, where, and the remedy."""


class NonFiniteError(RuntimeError):
    """A reward, an observation or a loss is not a finite number; the message says whose and when."""


class LostProcessError(RuntimeError):
    """Another process of the run is gone; the message says how it ended."""


def words(error: BaseException) -> list[str]:
    """The lines of an error, at least one: its kind if it says nothing."""
    return str(error).splitlines() or [type(error).__name__]
