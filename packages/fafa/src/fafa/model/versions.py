"""The one requirement on transformers that package metadata cannot state (LAVIS needs an old one)."""

from importlib.metadata import PackageNotFoundError, version

from tbps_common.errors import InputError

OLDEST = (5, 17)


def require_transformers() -> None:
    """Check that the installed transformers has the BLIP-2 classes this package builds on.

    Raises:
        InputError: it is absent or older than 5.17.
    """
    wanted = ".".join(map(str, OLDEST))
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise InputError(
            f"The model needs transformers {wanted} or later: pip install 'transformers>={wanted}'."
        ) from None
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:2])
    if numbers < OLDEST:
        raise InputError(
            f"The model needs transformers {wanted} or later, but {found} is installed: "
            f"pip install 'transformers>={wanted}' (LAVIS's belongs in an environment of its own)."
        )
