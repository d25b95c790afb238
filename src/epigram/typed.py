"""Plain values (tables, arrays, numbers, text), and typed dataclasses of them; every problem in one message."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from epigram.errors import UserError

T = TypeVar("T")

_UNKNOWN = "unknown key "
_LIMITS = {int: 2**63, float: 1e38}


def typed(tree: dict[str, Any], kind: type[T], prefix: str = "") -> T:
    """A `kind` of the values in `tree`; UserError with every unknown key, wrong type and conflict, behind `prefix`."""
    try:
        return _converter(strict=True).structure(tree, kind)
    except Exception as error:  # cattrs raises a tree of whatever the parts raised
        problems = _problems(error)
        # A section with an unknown key was not built, so its conflicts are still to be found.
        try:
            _converter(strict=False).structure(tree, kind)
        except Exception as further:
            problems += [problem for problem in _problems(further) if problem not in problems]
        problems = [_with_suggestion(problem, kind) for problem in problems]
        raise UserError(prefix + "; ".join(problems)) from error


def _converter(*, strict: bool) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=strict, detailed_validation=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook_factory(is_dataclass, lambda kind: _section(kind, converter, strict))
    converter.register_structure_hook_factory(
        lambda kind: get_origin(kind) is tuple, lambda kind: _array(kind, converter)
    )
    return converter


def _section(kind: type, converter: cattrs.Converter, strict: bool) -> Any:
    structure: Any = make_dict_structure_fn(
        kind, converter, _cattrs_forbid_extra_keys=strict, _cattrs_detailed_validation=True
    )

    def hook(value: Any, expected: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"expected a section, not {value!r}")
        return structure(value, expected)

    return hook


def _array(kind: Any, converter: cattrs.Converter) -> Any:
    item = get_args(kind)[0]

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise TypeError(f"expected an array, not {value!r}")
        return tuple(converter.structure(entry, item) for entry in value)

    return hook


def _exactly(value: Any, kind: type) -> Any:
    """No silent conversions: 3.5 is no integer, "no" is no truth value; an integer may stand for a float.

    Numbers fit into float32 or 64 bits, and none is infinite or NaN.
    """
    accepted: Any = int | float if kind is float else kind
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        if kind in _LIMITS and not abs(value) < _LIMITS[kind]:  # also of NaN
            raise ValueError(f"{value} is out of range")
        return kind(value)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    raise TypeError(f"expected {names[kind]}, not {value!r}")


def _problems(error: BaseException, path: str = "") -> list[str]:
    """One sentence for each leaf of the tree of exceptions, with the key it concerns."""
    if isinstance(error, cattrs.BaseValidationError):
        found: list[str] = []
        for inner in error.exceptions:
            found += _problems(inner, _extend(path, getattr(inner, "__notes__", [])))
        return found
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return [f"{_UNKNOWN}{_dotted(path, key)}" for key in sorted(error.extra_fields)]
    if isinstance(error, KeyError):
        return [f"{_dotted(path, str(error.args[0]))} is missing"]
    if isinstance(error, TypeError | ValueError):
        return [f"{path}: {error}" if path else str(error)]
    return [f"{path}: {format_exception(error, object)}"]


def _extend(path: str, notes: list[Any]) -> str:
    for note in notes:
        if match := re.search(r"attribute (\w+)$", str(note)):
            return _dotted(path, match.group(1))
    return path


def _dotted(path: str, key: str) -> str:
    # A missing key's own note already names it.
    return path if path.endswith(f".{key}") or path == key else f"{path}.{key}".lstrip(".")


def _with_suggestion(problem: str, kind: type) -> str:
    """The problem; one of an unknown key with the keys that were probably meant: of that name in a section, else
    beginning like it, else the most alike beside it."""
    if not problem.startswith(_UNKNOWN):
        return problem
    wrong, keys = problem.removeprefix(_UNKNOWN), list(_keys(kind))
    beside = [key for key in keys if key.count(".") == wrong.count(".")]
    meant = (
        [key for key in keys if key.endswith(f".{wrong}")]
        or [key for key in beside if key.startswith(wrong)]
        or difflib.get_close_matches(wrong, beside, n=1, cutoff=0.8)
    )
    return f"{problem} (did you mean {' or '.join(meant[:3])}?)" if meant else problem


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Every key of a dataclass, those of its sections behind the section's name and a dot; entries of arrays not."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        if is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what nested tables hold."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted names, sorted, of the leaves that two nested tables do not have alike."""
    left, right = dict(leaves(one)), dict(leaves(other))
    names = sorted(left.keys() | right.keys())
    return [name for name in names if name not in left or name not in right or left[name] != right[name]]
