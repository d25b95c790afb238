"""The code as text: does it parse, is what it imports declared, is it ours, and what does it reach for.

Of a script of our form everything outside the embedded package is compared with the script of this release, and inside
it the modules that differ from this release's are read; any other script is read as a whole. Reading finds what is
written out, not what a program puts together while it runs.
"""

import ast
import tomllib
from collections.abc import Iterator, Mapping

from epigram.data.files import sha256_of
from epigram.errors import UserError
from epigram.run.submission.bundle import foreign_statement, shipped_sources, stripped, unpacked
from epigram.run.submission.findings import Finding
from epigram.run.submission.record import Record
from epigram.run.submission.requirements import UNPUBLISHED, declared, distribution, imported
from epigram.run.submission.rules.runs import unlike

_SCRIPT = "train_gpt.py"
_NETWORK = frozenset(
    {"socket", "ssl", "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "huggingface_hub", "boto3", "ftplib",
     "smtplib", "socketserver", "xmlrpc", "websocket", "websockets", "paramiko", "pycurl", "wget", "gdown"}
)  # fmt: skip
_PROCESS = frozenset({"subprocess", "pty", "ctypes", "cffi", "_posixsubprocess"})
_STARTS = ("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "asyncio.create_subprocess")
_HIDDEN = frozenset({"eval", "exec", "compile", "__import__", "importlib.import_module", "marshal.loads"})
_PICKLE = frozenset({"torch.load", "pickle.load", "pickle.loads"})
_RECIPES = "epigram/recipes/"

Dangers = dict[tuple[str, str], None]
"""(rule, what is done), in the order in which they are told."""


def code(record: Record) -> Iterator[Finding]:
    for path in record.code:
        name = path.relative_to(record.folder).as_posix()
        if name != _SCRIPT:
            yield from _other(name, path.read_text("utf-8", errors="replace") if path.suffix == ".py" else None)
    if record.script is None:
        return
    said = (record.json or {}).get("code_sha256")
    if said is not None and said != sha256_of(record.folder / _SCRIPT):
        yield Finding(rule="code.hash", message=f"code_sha256 of submission.json is not that of {_SCRIPT}")
    try:
        yield from list(_script(record, record.script))
    except (SyntaxError, ValueError, UserError, RecursionError, MemoryError) as error:
        yield Finding(rule="code.syntax", message=f"{_SCRIPT} cannot be parsed: {error or type(error).__name__}")


def _script(record: Record, script: str) -> Iterator[Finding]:
    """Raises what Python does for a text that it cannot parse, or UserError where our form holds no files."""
    files = unpacked(script)
    texts = [script, *(text for name, text in (files or {}).items() if name.endswith(".py"))]
    modules = {name for text in texts for name in imported(text)}
    yield from _findings(dangers(script), _SCRIPT)
    if files is not None:
        yield from _head(script)
        yield from _package(files)
        yield from _recipe(record, files)
    elif record.is_ours:
        message = f"the logs are of epigram's runs, and {_SCRIPT} is no script of epigram's"
        yield Finding(rule="code.foreign", message=message)
    # What is imported where it may be missing is optional: in functions of ours, behind a choice of the recipe.
    optional = {"triton", "flash-attn-4", "quack-kernels", "wandb", "tensorboard"} if files is not None else set()
    known = declared(record.requirements or "") | optional | {"epigram"}
    for name in sorted({distribution(module) for module in modules - UNPUBLISHED} - known):
        yield Finding(rule="code.requirements", message=f"{_SCRIPT} imports {name}, which is not declared")


def dangers(text: str) -> Dangers:
    """What a source text imports or calls that a record should explain, by the names that it gives things."""
    tree = ast.parse(text)
    meant: dict[str, str] = {}  # name in the text -> what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                meant[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    modules = {target.split(".")[0] for target in meant.values()}
    found = {("code.network", f"imports {name}") for name in modules & _NETWORK}
    found |= {("code.process", f"imports {name}") for name in modules & _PROCESS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, dot, rest = ast.unparse(node).partition(".")
            name = meant.get(first, first) + dot + rest
            if name.startswith(_STARTS):
                found.add(("code.process", f"uses {name}"))
            elif name in _PICKLE:
                found.add(("code.pickle", f"calls {name}"))
            elif name.removeprefix("builtins.") in _HIDDEN:
                found.add(("code.hidden", f"uses {name}"))
    return dict.fromkeys(sorted(found))


def _findings(found: Dangers, name: str) -> Iterator[Finding]:
    for rule, what in found:
        yield Finding(rule=rule, message=f"{name} {what}")


def _other(name: str, text: str | None) -> Iterator[Finding]:
    """Code beside the script. text: None where it is no Python."""
    try:
        if text is None:
            raise SyntaxError("no Python")
        yield from _findings(dangers(text), name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield Finding(rule="code.hidden", message=f"{name} is code that was not read: {error}")


def _head(script: str) -> Iterator[Finding]:
    statement = foreign_statement(script)
    if statement is not None:
        words = ast.unparse(statement).splitlines()[0][:80]
        message = (
            f"outside its embedded files {_SCRIPT} is another than this release's: line {statement.lineno}, {words!r}"
        )
        yield Finding(rule="code.head", message=message)


def _package(files: Mapping[str, str]) -> Iterator[Finding]:
    ours = shipped_sources()
    theirs = {name: text for name, text in files.items() if not name.startswith(_RECIPES)}
    unlike = sorted(ours.keys() ^ theirs.keys())
    unlike += [n for n in sorted(ours.keys() & theirs.keys()) if theirs[n] not in (ours[n], stripped(ours[n]))]
    if unlike:
        message = f"{_SCRIPT} holds another package than this one, in {len(unlike)} file(s), {unlike[0]} first"
        yield Finding(rule="code.package", message=message)
    for name in unlike:
        if name in theirs and name.endswith(".py"):
            known = dangers(ours[name]) if name in ours else {}
            new = {danger: None for danger in dangers(theirs[name]) if danger not in known}
            yield from _findings(new, f"{name} in {_SCRIPT}")


def _recipe(record: Record, files: Mapping[str, str]) -> Iterator[Finding]:
    """The one recipe in the script is that of the logs."""
    texts = [text for name, text in files.items() if name.startswith(_RECIPES)]
    try:
        (tree,) = (tomllib.loads(text) for text in texts)
    except ValueError as error:  # TOML that cannot be read is one, too
        why = str(error) if len(texts) == 1 else f"there are {len(texts)}"
        yield Finding(rule="code.recipe", message=f"{_SCRIPT} holds no single recipe: {why}")
        return
    for log in record.logs:
        if log.recipe is not None and (keys := unlike(log.recipe, tree)):
            message = f"{_SCRIPT} holds another recipe than {log.name}, in {', '.join(keys)}"
            yield Finding(rule="code.recipe", message=message)
