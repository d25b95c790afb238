"""A file imports from layers below it and from its own folder only; the command line imports nothing heavy."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "epigram"
LAYERS = (
    (
        "attention",
        "kernels",
        "capability",
        "compiling",
        "dist",
        "errors",
        "plugin",
        "progress",
        "loss",
        "byte_tables",
        "quantized",
        "roles",
        "typed",
        "user_cache",
        "wire_format",
    ),
    ("model", "optim", "data", "quant", "artifact", "evaluation"),
    ("config", "recipes"),
    ("run",),
    ("cli",),
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(path: Path, text: str) -> list[str]:
    """Imports of `text`, as the file `path`, that the layers forbid."""
    part = part_of(path)
    wrong = []
    for name in imports(ast.parse(text)):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if package == "epigram" and target in HEIGHT and target != part and HEIGHT[target] >= HEIGHT[part]:
            # Leaf files of the lowest layer may use each other; its folders may use leaf files.
            leaf = HEIGHT[target] == 0 and (SOURCE / f"{target}.py").is_file()
            if not leaf:
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_upward_import(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    assert part in HEIGHT, f"{part} has no layer: put it into LAYERS"
    assert upward(path, path.read_text("utf-8")) == []


def test_the_rule_catches_what_it_forbids() -> None:
    model = SOURCE / "model" / "gpt.py"
    assert upward(model, "from epigram.run import train") == ["epigram.run.train"]
    assert upward(model, "def f():\n    import epigram.optim.muon") == ["epigram.optim.muon"]
    assert upward(model, "from epigram import config") == ["epigram.config"]
    assert upward(model, "from epigram.attention.base import Attend\nimport torch") == []
    assert upward(SOURCE / "attention" / "sdpa.py", "from epigram.dist import context") == ["epigram.dist.context"]


def test_every_library_is_declared() -> None:
    """What the sources import is the standard library, the package itself, or declared in pyproject.toml."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    declared = {re.split(r"[^a-z0-9-]", name.replace("_", "-"))[0] for name in [*project["dependencies"], *extras]}
    # modules that are not called like their distribution
    known = {
        "tomli_w": "tomli-w",
        "flash_attn": "flash-attn-4",
        "quack": "quack-kernels",
        "huggingface_hub": "huggingface-hub",
    }
    unpublished = {"flash_attn_interface", "flash_attn_config"}  # FlashAttention 3 is built by users, from source
    used = {name.split(".")[0] for path in FILES for name in imports(ast.parse(path.read_text("utf-8")))} - unpublished
    foreign = {known.get(name, name) for name in used} - set(sys.stdlib_module_names) - {"epigram"}
    assert foreign == declared & foreign
    assert {"torch", "click", "pyarrow", "flash-attn-4"} <= foreign


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "sentencepiece", "matplotlib", "pyarrow", "cattrs", "rich"]
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom epigram.cli.main import command\n"
        "result = CliRunner().invoke(command, ['--help'])\nassert result.exit_code == 0 and 'train' in result.output\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert run_python(code).strip() == "[]"


def test_a_report_imports_no_torch() -> None:
    """It only reads what runs have left."""
    assert run_python("import sys, epigram.run.report.build\nprint('torch' in sys.modules)").strip() == "False"


def test_importing_the_package_needs_no_gpu_library() -> None:
    """Every module imports with the GPU-only libraries made impossible to import."""
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('triton', 'flash_attn', 'flash_attn_interface', 'cutlass', 'quack', 'wandb', 'tensorboard', "
        "'pyarrow'):\n"
        "    sys.modules[name] = None\n"
        "import epigram\n"
        "plugins = ('epigram.run.writers.', 'epigram.data.sources.', 'epigram.attention.')\n"
        "plugins += ('epigram.kernels._triton.', 'epigram.kernels.products.',)\n"
        "for module in pkgutil.walk_packages(epigram.__path__, 'epigram.'):\n"
        "    if module.name.startswith(plugins) or module.name.endswith('__main__'):\n"
        "        continue\n"
        "    importlib.import_module(module.name)\n"
        "print('imported')"
    )
    assert run_python(code).strip() == "imported"
