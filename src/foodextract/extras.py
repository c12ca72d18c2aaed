"""Optional dependencies: an import that fails names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Raise MissingExtraError for a third-party import that fails inside the block, which needs the extra `name`."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module == "foodextract":
            raise
        raise MissingExtraError(
            f"{module} is not installed: pip install 'foodextract[{name}]'", name=error.name
        ) from error
