"""Which files a source of text is: paths, folders and globs, and the Python standard library's own sources."""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the processes that tokenise start without torch, which the configuration brings in
    from .data_config import DataConfig

JSONL = (".jsonl", ".ndjson", ".json")
SUFFIXES = {
    "jsonl": tuple(name + packed for name in JSONL for packed in ("", ".gz", ".zst")),
    "parquet": (".parquet",),
}
NOT_TEXT = (*SUFFIXES["jsonl"], *SUFFIXES["parquet"], ".gz", ".zst", ".zip", ".bz2", ".xz", ".tar")
STDIN = "-"
"""The path that means standard input."""


class DataError(ValueError):
    """Data that cannot be used; the message names the key or file, what it was, and what it must be."""


def is_local(config: "DataConfig") -> bool:
    """Whether a source is files on this machine: not a dataset by name, and not standard input."""
    return config.source != "hf" and config.path != STDIN


def files(config: "DataConfig") -> list[Path]:
    """The local files of a source in the order in which they are read; empty for hf and for standard input.

    Folders are walked whole, sorted, without hidden files and folders; in a folder, jsonl and parquet take the files
    with their suffixes, text takes all.

    Raises:
        DataError: for a path that is missing, matches nothing, comes twice, or has another source's suffix.
    """
    if not is_local(config):
        return []
    if config.source == "stdlib":
        return _standard_library()
    found: list[Path] = []
    for item in [config.path] if isinstance(config.path, str) else config.path or []:
        found += _expand(item, config.source)
    seen: set[str] = set()
    folders: dict[str, str] = {}
    for path in found:
        _check_suffix(path, config.source)
        real = _real_path(path, folders)
        if real in seen:
            raise DataError(f"data.path was {config.path!r}, which names {path} twice; it must name each file once")
        seen.add(real)
    return found


def _real_path(path: Path, folders: dict[str, str]) -> str:
    """A file's path without links; ``folders`` holds those of folders so far, as each takes a look at all above it."""
    folder, name = os.path.split(path)
    if os.path.islink(path):
        return os.path.realpath(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def source_digest(config: "DataConfig", found: Sequence[Path] | None = None) -> str | None:
    """A checksum of the source files' names, sizes and times of change; None for hf and standard input, which have
    no files of ours.

    Args:
        found: what :func:`files` gave, where it has been asked.

    Raises:
        DataError: as ``files``.
    """
    if not is_local(config):
        return None
    digest = hashlib.sha256(platform.python_version().encode() if config.source == "stdlib" else b"")
    for path in files(config) if found is None else found:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def kind_of(items: Iterable[str]) -> str:
    """The ``data.source`` that files, folders and globs are: jsonl or parquet by their suffixes, else text.

    Raises:
        DataError: when they are of several kinds.
    """
    kinds: dict[str, Path] = {}
    for item in items:
        for path in _expand(item, "text"):
            name = path.name.lower()
            kinds.setdefault(next((kind for kind, ends in SUFFIXES.items() if name.endswith(ends)), "text"), path)
    if len(kinds) > 1:
        found = ", ".join(f"{path} ({kind})" for kind, path in kinds.items())
        raise DataError(f"SOURCE named files of several kinds: {found}; choose one with --source, or by a glob")
    return next(iter(kinds), "text")


def _expand(item: str, source: str) -> list[Path]:
    """The files that one entry of ``data.path`` names."""
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        wanted: Callable[[Path], bool] = lambda file: source == "text" or file.name.endswith(SUFFIXES[source])  # noqa: E731
        found = [file for file in _walk(path) if wanted(file)]
        if not found:
            kind = "any file" if source == "text" else f"a file ending in {' or '.join(SUFFIXES[source])}"
            raise DataError(f"data.path was {item!r}, a folder without {kind}")
        return found
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    if not found:
        what = "which matches no file" if glob.has_magic(item) else "which does not exist"
        raise DataError(f"data.path was {item!r}, {what}; it must name existing files, folders or globs")
    return found


def _walk(root: Path, without: Iterable[str] = ()) -> list[Path]:
    """Every file below a folder, sorted; hidden ones and folders named in ``without`` are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _check_suffix(path: Path, source: str) -> None:
    name = path.name.lower()
    if source == "text":
        other = next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), None)
        if other or name.endswith(NOT_TEXT):
            advice = f"read it with data.source {other!r}" if other else "unpack it"
            raise DataError(f"data.path named {path}, which data.source 'text' cannot read; {advice}")
    elif not name.endswith(SUFFIXES[source]):
        endings = ", ".join(SUFFIXES[source])
        raise DataError(f"data.path named {path}, which data.source {source!r} cannot read; it must end in {endings}")


def _standard_library() -> list[Path]:
    """The standard library's ``.py`` files, sorted, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")
    found = [path for path in _walk(root, left_out) if path.suffix == ".py"]
    if not found:
        raise DataError(f"data.source was 'stdlib', but {root} has no .py files; use data.source 'text' and data.path")
    return found
