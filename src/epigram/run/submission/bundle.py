"""The package as one file, `train_gpt.py`, with the recipe that the runs used.

The file holds the source text of every module that training and scoring can reach, and writes them into a private
folder before it imports them. A folder, and not an importer over a dictionary, because much of what reads a package
wants files: plug-ins are found by walking folders, recipes are package data, Triton and the compilers of FlashAttention
read the source of their kernels, and a traceback shows lines. It costs a few milliseconds a process.

Two forms. `readable`: each module as it is in the repository, in a raw string. `packed`: the same without comments,
docstrings and annotations that nothing reads (3 % of the bytes), whose syntax tree is proved equal to the original's in
all else, compressed with bzip2 (4 % less than LZMA here) and written as bytes into a string, in a source file that
declares itself Latin-1: base 85 would add a quarter.
"""

import ast
import bz2
import json
import tokenize
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

import tomli_w

import epigram
from epigram.config import Config, to_tree
from epigram.errors import UserError

FORMS = ("readable", "packed")
MARK = "EPIGRAM_SINGLE_FILE"
ENTRY = "epigram.run.submission.entry"
_RAW_QUOTES = "'''"
_CODING = "latin-1"
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\x00"}
_SPARE = 2_000  # bytes by which the script may grow when settings of the recipe are changed
_MOST_BYTES = 64 << 20  # of packed files that are read from a script of unknown origin

# Never shipped: what builds data from text, and what needs libraries that a record does not declare.
_LEFT_OUT = frozenset({"epigram.data.text_cache", "epigram.run.writers.tensorboard", "epigram.run.writers.wandb"})


def single_file(config: Config, form: str) -> bytes:
    """`train_gpt.py` for a recipe, in one of FORMS."""
    if form not in FORMS:
        raise UserError(f"form = {form!r} must be one of {', '.join(FORMS)}")
    files = {**shipped_sources(), f"epigram/recipes/{config.recipe}.toml": tomli_w.dumps(to_tree(config))}
    head = _template().replace("@RECIPE@", _escaped(config.recipe)).replace("@SUMMARY@", _escaped(config.summary))
    if form == "readable":
        script = head.replace("@FILES@\n", _readable(files)).encode("utf-8")
    else:
        text = f"# coding: {_CODING}\n{head}".replace("@FILES@\n", _packed(files))
        script = text.encode(_CODING, "backslashreplace")  # the recipe's summary may have any letters
    ast.parse(script)  # 15 ms: one that does not start must not come out
    return script


def _template() -> str:
    return (resources.files("epigram.run.submission") / "single_file.txt").read_text("utf-8")


def packed_bytes(config: Config) -> int:
    """What the code of a submission takes of the cap in its packed form."""
    return len(single_file(config, "packed"))


def reserve_warning(config: Config) -> str | None:
    """That a run reserves less of its cap than its code will take, in a sentence; None where it does not, or reserves
    nothing, as runs do that are not meant to be submitted."""
    reserved = config.artifact.code_bytes
    if reserved == 0 or (needed := packed_bytes(config)) <= reserved:
        return None
    return (
        f"artifact.code_bytes = {reserved:,} is less than the {needed:,} bytes of the recipe's packed train_gpt.py: a "
        f"run that fills its cap cannot be submitted; set artifact.code_bytes={needed + _SPARE} or more"
    )


def read_script(path: Path) -> str:
    """The text of a Python file in the encoding that it declares; what cannot be decoded is replaced."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):  # an encoding that Python does not know, or that it does not keep to
        return path.read_text("utf-8", errors="replace")


def shipped_sources() -> dict[str, str]:
    """Path in the package -> source of every module that the entry can reach, plug-ins and their packages included."""
    root = Path(epigram.__file__).parent
    paths = {_module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    texts = {name: path.read_text("utf-8") for name, path in paths.items()}
    names = reachable([ENTRY], texts, {name for name, path in paths.items() if path.name == "__init__.py"})
    return {f"epigram/{paths[name].relative_to(root).as_posix()}": texts[name] for name in sorted(names)}


def reachable(entries: Iterable[str], texts: Mapping[str, str], packages: Iterable[str] = ()) -> set[str]:
    """Modules that `entries` import, directly or not, also inside functions.

    texts: dotted name -> source of all modules there are. packages: those of them that are folders. A package that is
    named in a string (as plug-in folders are) brings all its modules, since their names come from recipes.
    """
    packages, found, todo = set(packages), set(), list(entries)
    while todo:
        name = todo.pop()
        if name not in texts or name in found or name in _LEFT_OUT:
            continue
        found.add(name)
        imported, quoted = _names_in(texts[name])
        for folder in quoted & packages:
            todo += [other for other in texts if other.rpartition(".")[0] == folder]
        for target in imported | quoted | {name}:
            todo += _with_parents(target)
    return found


def _with_parents(name: str) -> list[str]:
    """a.b.c, a.b and a."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@cache
def _names_in(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Dotted names of this package that a module imports, and those that it has in strings."""
    imported, quoted = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("epigram."):
            quoted.add(node.value)
    return frozenset(name for name in imported if name.split(".")[0] == "epigram"), frozenset(quoted)


def _readable(files: Mapping[str, str]) -> str:
    blocks = [f"    {json.dumps(path)}: {_raw(text)},\n" for path, text in files.items()]
    return "FILES = {\n" + "".join(blocks) + "}\n"


def _raw(text: str) -> str:
    """A literal for `text`: raw, so that it reads as it was written, where that can be."""
    literal = f"r{_RAW_QUOTES}{text}{_RAW_QUOTES}"
    fits = _RAW_QUOTES not in text and not {"\r", "\0"} & set(text) and not text.endswith(("\\", "'"))
    return literal if fits and ast.literal_eval(literal) == text else repr(text)


def _packed(files: Mapping[str, str]) -> str:
    ordered = sorted(files, key=lambda path: path.rpartition("/")[2])  # files of one name beside each other: 300 bytes
    bare = {path: stripped(files[path]) if path.endswith(".py") else files[path] for path in ordered}
    text = _latin(bz2.compress(json.dumps(bare).encode()))
    return f'FILES = json.loads(bz2.decompress({text}.encode("{_CODING}")))\n'


def _latin(data: bytes) -> str:
    """A literal whose characters are the bytes of `data`."""
    return f'"{_escaped(data.decode(_CODING))}"'


def _escaped(text: str) -> str:
    """`text` for a literal in double quotes, one or three; what a source line cannot hold is escaped."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def unpacked(script: str) -> dict[str, str] | None:
    """FILES of a single file, read without running it; None when `script` is no such file of ours.

    Raises UserError for one whose files cannot be read.
    """
    tree = ast.parse(script)
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if MARK not in values or "FILES" not in values:
        return None
    try:
        if isinstance(values["FILES"], ast.Dict):
            files = ast.literal_eval(values["FILES"])
        else:
            data = bz2.BZ2Decompressor().decompress(_longest_text(values["FILES"]).encode(_CODING), _MOST_BYTES)
            files = json.loads(data)
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"the files in this script cannot be read: {error}") from error
    if not isinstance(files, dict) or not all(isinstance(part, str) for pair in files.items() for part in pair):
        raise UserError("the files in this script are no table of texts")
    return files


def foreign_statement(script: str) -> ast.stmt | None:
    """The first statement of a single file, outside its embedded files, that the script of this release does not have
    there; None where there is none. The text at its top does nothing, and is not compared.

    An empty statement stands for one that is missing at the end.
    """
    ours, theirs = ast.parse(_template().replace("@FILES@", "FILES = {}")).body, ast.parse(script).body
    for place, known in enumerate(ours):
        if place == len(theirs):
            return ast.Pass(lineno=len(script.splitlines()), col_offset=0)
        found = theirs[place]
        same = _holds_files(found) if _holds_files(known) else ast.dump(found) == ast.dump(known)
        if not same and not (place == 0 and _is_remark(found)):
            return found
    return theirs[len(ours)] if len(theirs) > len(ours) else None


def _holds_files(statement: ast.stmt) -> bool:
    """Whether it is the assignment of the embedded files in one of FORMS, which computes nothing else."""
    if not isinstance(statement, ast.Assign) or [ast.unparse(target) for target in statement.targets] != ["FILES"]:
        return False
    value = statement.value
    if isinstance(value, ast.Dict):
        return all(isinstance(part, ast.Constant) for part in [*value.keys, *value.values])
    packed = ast.parse(f'json.loads(bz2.decompress("".encode("{_CODING}")))', mode="eval").body
    (place,) = (part for part in ast.walk(packed) if isinstance(part, ast.Constant) and part.value == "")
    place.value = _longest_text(value)
    return ast.dump(value) == ast.dump(packed)


def _longest_text(tree: ast.AST) -> str:
    """Of the literals in `tree`."""
    nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return max((text for text in nodes if isinstance(text, str)), key=len, default="")


@cache
def stripped(text: str) -> str:
    """`text` without comments, docstrings, and annotations of functions that have no decorator, which might read them;
    nothing else differs, which is checked on the syntax tree."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
            node.returns = None
            for argument in (part for part in ast.walk(node.args) if isinstance(part, ast.arg)):
                argument.annotation = None
        if isinstance(body := getattr(node, "body", None), list):
            kept = [statement for statement in body if not _is_remark(statement)]
            node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])  # type: ignore[attr-defined]
    bare = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    assert ast.dump(ast.parse(bare)) == ast.dump(tree), "taking out comments and annotations changed the program"
    return bare


def _is_remark(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
