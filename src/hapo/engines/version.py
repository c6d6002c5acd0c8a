"""The release that an engine was tested with; every other is refused. Which it is: `hapo.versions`."""

from importlib.metadata import PackageNotFoundError, version

from ..versions import ACCEPTED, PAGE


def require(package: str) -> None:
    """Refuse a package of another minor release than those tested: engines override its methods, which move.

    Raises:
        ImportError: the package is missing, or of another minor release.
    """
    tested = ACCEPTED[package]
    remedy = f'install it with: pip install "{package}{tested.pip}" (what goes with it: {PAGE})'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"hapo.{package} needs {package} {tested}, which is not installed; {remedy}") from None
    if found not in tested:
        raise ImportError(f"hapo.{package} was tested with {package} {tested} and refuses {found}; {remedy}")
