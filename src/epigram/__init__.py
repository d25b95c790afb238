"""epigram: the best language model that fits in a byte budget, trained in a time budget, with a proven score."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epigram.run.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # `import epigram` stays instant; torch comes with the first use.
    if name in ("load", "Model"):
        from epigram.run import api

        return getattr(api, name)
    raise AttributeError(f"module 'epigram' has no attribute {name!r}")
