"""The TRL release that this engine was tested with; every other is refused."""

from importlib.metadata import PackageNotFoundError, version

TESTED = "1.16"


def require_trl() -> None:
    """Refuse a TRL that this engine was not tested with: it overrides private methods, which move.

    Raises:
        ImportError: TRL is missing or of another minor release.
    """
    remedy = f'install it with: pip install "trl=={TESTED}.*"'
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"hapo.trl needs TRL {TESTED}, and TRL is not installed; {remedy}") from None
    if found.split(".")[:2] != TESTED.split("."):
        raise ImportError(f"hapo.trl was tested with TRL {TESTED} and refuses {found}; {remedy}")
