"""The verl release that this engine was tested with; every other is refused."""

from importlib.metadata import PackageNotFoundError, version

TESTED = "0.9"


def require_verl() -> None:
    """Refuse a verl that this engine was not tested with: it overrides methods of its trainer, which move.

    Raises:
        ImportError: verl is missing or of another minor release.
    """
    remedy = f'install it with: pip install "verl=={TESTED}.*"'
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise ImportError(f"hapo.verl needs verl {TESTED}, and verl is not installed; {remedy}") from None
    if found.split(".")[:2] != TESTED.split("."):
        raise ImportError(f"hapo.verl was tested with verl {TESTED} and refuses {found}; {remedy}")
