"""The release that an engine was tested with; every other is refused."""

from importlib.metadata import PackageNotFoundError, version


def require(package: str, tested: str) -> None:
    """Refuse a package of another minor release than the one tested: engines override its methods, which move.

    Raises:
        ImportError: the package is missing, or of another minor release.
    """
    remedy = f'install it with: pip install "{package}=={tested}.*"'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"hapo.{package} needs {package} {tested}, which is not installed; {remedy}") from None
    if found.split(".")[:2] != tested.split("."):
        raise ImportError(f"hapo.{package} was tested with {package} {tested} and refuses {found}; {remedy}")
