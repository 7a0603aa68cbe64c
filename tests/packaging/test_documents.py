"""What the documents tell a reader to type, exists."""

import importlib.metadata
import importlib.util
import re
import shlex
from pathlib import Path

from palimpsest.eval import __main__ as evaluate
from palimpsest.eval import generate
from palimpsest.train.config import parse_overrides, read_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def code(path: Path) -> list[str]:
    """Every line of code that a document shows, in a block or inside a sentence; continued lines joined."""
    spans = [block or inline for block, inline in CODE.findall(path.read_text(encoding="utf-8"))]
    return [line for span in spans for line in span.replace("\\\n", " ").splitlines()]


def said(pattern: str) -> list[tuple[str, str]]:
    """(document, match) for every place in the documents' code where the pattern's group is found."""
    return [(path.name, found) for path in DOCUMENTS for line in code(path) for found in re.findall(pattern, line)]


def test_modules_exist() -> None:
    named = said(r"-m (palimpsest[\w.]*)")
    assert named
    for document, module in named:
        found = importlib.util.find_spec(module)
        assert found is not None, f"{document}: {module}"
        if found.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), f"{document}: {module} cannot be run with -m"


def test_training_commands_are_valid() -> None:
    """Each configuration that the documents train with exists and takes the overrides that stand beside it."""
    named = [(document, shlex.split(rest)) for document, rest in said(r"-m palimpsest\.train (\S.*)")]
    assert named
    for document, (config, *overrides) in named:
        if "my_" not in config:
            read_config(ROOT / config, parse_overrides(overrides))
        assert all("=" in override for override in overrides), f"{document}: {overrides}"


def test_evaluation_commands_are_valid() -> None:
    """The options that the documents give to evaluation and generation are those that these take."""
    for room, pattern in (
        (evaluate, r"-m palimpsest\.eval (\S.*)"),
        (generate, r"-m palimpsest\.eval\.generate (\S.*)"),
    ):
        named = said(pattern)
        assert named
        for _, rest in named:
            room.parser().parse_args(shlex.split(rest))


def test_python_imports_exist() -> None:
    named = said(r"from (palimpsest[\w.]*) import ([\w, ]+)")
    assert named
    for document, (module, names) in named:
        loaded = importlib.import_module(module)
        for name in names.split(","):
            assert hasattr(loaded, name.strip()), f"{document}: {module} has no {name.strip()}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = said(r"\bmake(?: [A-Z]+=\S+)* ([a-z][\w-]*)")
    assert {target for _, target in named} >= {"quickstart", "test", "check"}
    for document, target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"


def test_files_exist() -> None:
    rooms = r"(?:configs|models|kernels|train|eval|tests|docs)"
    named = said(rf"(?<![\w/.-])({rooms}/[\w./-]*\w\.(?:py|yaml|md|json))\b")
    assert named
    for document, name in named:
        assert "my_" in name or (ROOT / name).is_file(), f"{document}: {name}"


def test_links_exist() -> None:
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_console_scripts_exist() -> None:
    """Every installed command leads to a function, and the documents name no other."""
    commands = importlib.metadata.distribution("palimpsest").entry_points.select(group="console_scripts")
    known = {
        "palimpsest-train",
        "palimpsest-data",
        "palimpsest-eval",
        "palimpsest-generate",
        "palimpsest-inspect",
        "palimpsest-profile",
    }
    assert known <= set(commands.names)
    for command in commands:
        assert callable(command.load()), command.name
    assert {name for _, name in said(r"\b(palimpsest-[a-z]+)\b")} <= set(commands.names)
