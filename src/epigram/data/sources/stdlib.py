"""Text that every CPython carries, so that a first run needs no download.

The language reference topics in `pydoc_data`, one document a topic, and the docstrings of the standard
library, one document a module, read from source with `ast` (nothing is imported or run). Without tests and
site-packages. The order is fixed, the text depends on the Python version alone.
"""

import ast
import functools
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from epigram.data.sources.base import check_surrogates
from epigram.errors import DataError

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "_bundled",
    "lib-dynload",
}


def claims(path: Path) -> bool:
    """The word `stdlib`; a folder of that name is meant by ./stdlib."""
    return str(path) == "stdlib"


def documents(path: Path = Path("stdlib"), field: str = "text") -> Iterator[str]:
    """Topics in alphabetical order, then modules in that of their paths. The arguments mean nothing here."""
    yield from _texts()


@functools.cache  # 2 MB of text, some seconds to parse, and a build reads it several times
def _texts() -> tuple[str, ...]:
    topics = [text for _, text in sorted(_topics().items())]
    return (*topics, *filter(None, map(docstrings, module_files())))


def content_hash(path: Path = Path("stdlib")) -> str:
    """SHA-256 of the files that the text is read from: cheaper than the text, and changes with it."""
    digest = hashlib.sha256()
    for file in [_topics_file(), *module_files()]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def module_files() -> list[Path]:
    """Source files of the standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [file for file in root.rglob("*.py") if not _SKIPPED & set(file.relative_to(root).parts[:-1])]
    if not found:
        raise DataError(
            f"this Python has no standard library in source under {root}: give a text file instead of stdlib"
        )
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def docstrings(file: Path) -> str:
    """All docstrings of a module in source order, blank lines between them; empty when it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stale escapes in old modules are no concern of ours
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file} cannot be parsed ({error}): give a text file instead of stdlib") from error
    texts = [ast.get_docstring(node) for node in _in_source_order(tree)]
    return check_surrogates("\n\n".join(text for text in texts if text), file, "docstrings")


def _in_source_order(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # expressions hold no docstrings
            yield from _in_source_order(child)


def _topics_file() -> Path:
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise DataError("this Python has no pydoc_data.topics: install its documentation, or give a text file")
    return Path(spec.origin)


def _topics() -> dict[str, str]:
    """The dict literal `topics` of the module, read without running it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(_topics_file().read_bytes())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            return ast.literal_eval(node.value)
    raise DataError(
        "pydoc_data.topics of this Python has another form than expected: give a text file instead of stdlib"
    )
