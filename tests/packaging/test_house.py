"""The rules of the house, read off the source itself: layout, sizes, direction of imports, docstrings, documents."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"configs", "docs", "eval", "kernels", "models", "tests", "train", ".ci"}
FILES = {".gitignore", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
LIBRARY = ("kernels", "models", "train", "eval")  # each may import itself and what stands before it
REQUIRED = {"torch", "triton", "einops", "numpy", "pydantic", "yaml", "safetensors", "tensorboard"}
CARRIED = {"pydantic_core", "typing_extensions"}  # pydantic's own parts
OPTIONAL = {"flash_attn", "matplotlib", "tokenizers", "transformers", "datasets", "pyarrow", "zstandard", "lm_eval"}
OPTIONAL |= {"torchao"}
WHOLE = {"models/hub.py": {"transformers"}, "eval/lm_eval_model.py": {"lm_eval"}}  # modules that an extra is for
MACHINE_PATH = re.compile(r"(?<![\w.~*])/(?:home|root|work|farm|mnt|opt|Users)/")
MOST_LINES = 500
IGNORED = {".git", ".venv", "runs", "build", "dist", "shared", "__pycache__"}


@cache
def house_files() -> tuple[Path, ...]:
    """Every file that belongs to the repository: what git tracks, or, in an unpacked copy, what is not ignored."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
        return tuple(path for path in found if path.is_file())
    return tuple(
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and not any(part in IGNORED or part.endswith(("_cache", ".egg-info")) for part in path.relative_to(ROOT).parts)
    )


def python_files(*rooms: str) -> list[Path]:
    """The Python files of these top-level folders, or of the whole house."""
    files = [path for path in house_files() if path.suffix == ".py"]
    return [path for path in files if not rooms or path.relative_to(ROOT).parts[0] in rooms]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file, read with Python 3.10's grammar."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def label(path: Path) -> str:
    """A file's name for a message."""
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, node: ast.AST) -> list[str]:
    """Absolute dotted names that one import statement names; relative ones resolved under ``palimpsest``.

    A relative import that climbs out of the package gives names under ``(above)``.
    """
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level == 0:
        base = node.module or ""
    else:
        package = ["palimpsest", *path.relative_to(ROOT).parent.parts]
        kept = package[: len(package) - (node.level - 1)] if node.level <= len(package) else ["(above)"]
        base = ".".join([*kept, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: everything outside of functions and of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import_time(child)


def test_top_level_holds_only_the_rooms() -> None:
    tops = {path.relative_to(ROOT).parts for path in house_files()}
    folders = {parts[0] for parts in tops if len(parts) > 1}
    files = {parts[0] for parts in tops if len(parts) == 1}
    assert folders - FOLDERS == set(), "a folder that the layout does not have"
    assert files == FILES


def test_no_file_is_too_long() -> None:
    long = {}
    for path in house_files():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ""} and path.name != "LICENSE":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > MOST_LINES and path.suffix != ".md":
                long[label(path)] = lines
    assert long == {}, f"over {MOST_LINES} lines"


def test_no_machine_path() -> None:
    found = []
    for path in house_files():
        if path == Path(__file__).resolve() or path.suffix in {".png", ".gz"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{label(path)}:{number}: {line.strip()}")
    assert found == []


def test_source_is_python_3_10() -> None:
    broken = []
    for path in python_files():
        try:
            tree(path)
        except SyntaxError as error:
            broken.append(f"{label(path)}: {error}")
    assert python_files() and broken == []


def test_imports_go_one_way() -> None:
    """kernels <- models <- train <- eval; nobody imports a bare room or a name above the package."""
    wrong = []
    for path in python_files(*LIBRARY, "configs"):
        room = path.relative_to(ROOT).parts[0]
        allowed = {*LIBRARY[: LIBRARY.index(room) + 1], "configs"} if room in LIBRARY else {"configs"}
        for node in ast.walk(tree(path)):
            for name in imports(path, node):
                parts = name.split(".")
                bare = parts[0] in (*LIBRARY, "configs", "(above)")
                if bare or (parts[0] == "palimpsest" and (len(parts) < 2 or parts[1] not in allowed)):
                    wrong.append(f"{label(path)}: {room} imports {name}")
    assert wrong == []


def test_imports_inside_the_package_are_relative() -> None:
    wrong = [
        f"{label(path)}:{node.lineno}"
        for path in python_files(*LIBRARY)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "level", 0) == 0
        if any(name.split(".")[0] == "palimpsest" for name in imports(path, node))
    ]
    assert wrong == []


def test_every_import_is_declared() -> None:
    """Outside of functions: the standard library and the requirements. Inside of functions the extras as well, and
    there alone the modules that import an extra at once."""
    wrong = []
    late = {"palimpsest." + name.removesuffix(".py").replace("/", ".") for name in WHOLE}
    for path in python_files(*LIBRARY, "configs"):
        eager = set(map(id, at_import_time(tree(path))))
        for node in ast.walk(tree(path)):
            known = (
                sys.stdlib_module_names
                | REQUIRED
                | CARRIED
                | {"palimpsest"}
                | (WHOLE.get(label(path), set()) if id(node) in eager else OPTIONAL)
            )
            peers = "peers" in path.parts  # scripts that run a peer beside us import the peer
            for name in imports(path, node):
                early = id(node) in eager and any(f"{name}.".startswith(f"{module}.") for module in late)
                if (name.split(".")[0] not in known and not peers) or early:
                    wrong.append(f"{label(path)}: {name}")
    assert wrong == []


def undocumented(path: Path) -> Iterator[str]:
    """Public functions, classes and methods without a docstring, apart from overrides of a documented method."""
    classes = {node.name: node for node in tree(path).body if isinstance(node, ast.ClassDef)}
    for node in tree(path).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield f"{label(path)}:{node.lineno} {node.name}"
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        said = {"forward", "extra_repr"} | {m.name for base in bases for m in methods(base) if ast.get_docstring(m)}
        for method in methods(node):
            if not method.name.startswith("_") and method.name not in said and ast.get_docstring(method) is None:
                yield f"{label(path)}:{method.lineno} {node.name}.{method.name}"


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The functions in a class's body."""
    return [method for method in node.body if isinstance(method, ast.FunctionDef)]


def test_everything_public_is_documented() -> None:
    missing = [label(path) for path in python_files() if tree(path).body and ast.get_docstring(tree(path)) is None]
    missing += [name for path in python_files(*LIBRARY, "configs") for name in undocumented(path)]
    assert missing == []


def test_constraints_are_plain_pins() -> None:
    pin = re.compile(r'[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*(; python_version (<|>=) "3\.\d+")?')
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not pin.fullmatch(line)] == [], "neither hosts, paths nor local builds"
    names = {re.split("[=]", line)[0].lower().replace("_", "-") for line in pins}
    required = {"pyyaml" if name == "yaml" else name for name in REQUIRED}
    assert required <= names


@pytest.mark.parametrize("target", ["quickstart", "test", "check"])
def test_make_has_the_promised_targets(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_ci_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert {"make check", "make test"} <= {line.split(" ||")[0] for line in script.read_text().splitlines()}
