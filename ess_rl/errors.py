"""What can go wrong, said in one line. No torch here: the report reads files without it."""


class UsageError(ValueError):
    """A mistake the user can mend. Its text is one line: what is wrong, where, and the remedy."""


class NonFiniteError(RuntimeError):
    """A reward, an observation or a loss is not a finite number; the text says whose and when."""


class LostProcessError(RuntimeError):
    """Another process of the run is gone; the text says how it ended."""
