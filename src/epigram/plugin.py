"""The folder is the registry: a part is chosen by the name of its file.

`attention = "sdpa"` loads `epigram.attention.sdpa`. Adding a backend, codec, quantizer or data source means adding
one file; nothing is registered, and a library is imported only when the part that needs it is chosen.
"""

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from epigram.errors import UserError

_SHARED = {"base"}  # files in a plugin folder that hold what the plugins share


def names(package: str) -> list[str]:
    """Names that can be chosen in `package` (for example "epigram.attention"), sorted; imports no plugin."""
    folder = importlib.import_module(package)
    found = (module.name for module in pkgutil.iter_modules(folder.__path__))
    return sorted(name for name in found if name not in _SHARED and not name.startswith("_"))


def why_unknown(package: str, name: str, *others: str) -> str | None:
    """That there is no plugin `name` in `package`, nor is it one of `others`, in a sentence; None where there is."""
    choices = [*others, *names(package)]
    if name in choices:
        return None
    return f"there is no {name!r} in {package.rsplit('.', 1)[-1]}: choose one of {', '.join(choices)}"


def load(package: str, name: str) -> ModuleType:
    """Import plugin `name` of `package`.

    Raises UserError when there is no such plugin, or when a library that it needs is not installed or does not load.
    """
    if reason := why_unknown(package, name):
        raise UserError(reason)
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "epigram":
            raise
        raise UserError(
            f"{name!r} needs the library {error.name!r}, which is not installed: pip install {error.name}, "
            f"or choose another of {_others(package, name)}"
        ) from error
    # Installed, but broken: built for another torch, say, or a part is missing.
    except (ImportError, OSError, RuntimeError) as error:
        if (getattr(error, "name", None) or "").split(".")[0] == "epigram":
            raise
        raise UserError(
            f"{name!r} needs a library that is installed and does not load ({error}): install it again, "
            f"or choose another of {_others(package, name)}"
        ) from error


def _others(package: str, name: str) -> str:
    return ", ".join(other for other in names(package) if other != name)
