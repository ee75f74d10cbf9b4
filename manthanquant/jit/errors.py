"""The one exception that a build or a load raises on purpose."""


class JitError(RuntimeError):
    """A kernel could not be built or loaded. The text is one line: what failed, and the remedy."""
