"""Checkpoints that are whole or not there: written beside, synced, then renamed, and checked before they are used.

    checkpoints/step-000200/
        __0_0.distcp …     weights and optimizer state, one file per process (torch.distributed.checkpoint)
        .metadata          where each tensor lies in them
        manifest.json      written last: step, config of the model, size and sha256 of every file, and of itself

A folder without a valid manifest, or with a file that differs from it, is damaged: it is named in the log and the one
before is used. The state is addressed by parameter name and whole-tensor coordinates, so that a run can go on with
another number of processes. No random state is kept: the loop seeds each step by its number.

Several processes must see the same folder. Nothing that a checkpoint holds is executed (see ``unpickle.py``).
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .events import note
from .parallel import broadcast, gather, own_group, rank_and_size
from .staging import Background, stage
from .unpickle import Planner, Reader, UnsafeCheckpoint, read_metadata

logger = logging.getLogger("palimpsest.train")

SCHEMA = 1
MANIFEST = "manifest.json"
PREFIX = "step-"
SAVING = ".saving-"
REMOVING = ".removing-"
SHORT_WRITE = ("PytorchStreamWriter", "inline_container")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or cannot be read into this model."""


class ConfigMismatch(ValueError):
    """A checkpoint or run folder that belongs to another config; the message names the differing keys."""


class Checkpointer:
    """The checkpoints of one run. Every method is called by all processes together.

    Args:
        folder: a run's ``checkpoints`` folder.
        keep_last: how many checkpoints stay; older ones are removed after each save.
        identity: the config that a checkpoint must agree with to be restored (a run's ``model`` section).
        complete: fills in, in the identity of a checkpoint, keys that there were not yet when it was written.
    """

    def __init__(
        self,
        folder: str | Path,
        keep_last: int = 2,
        identity: Mapping[str, Any] | None = None,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last was {keep_last}; it must be at least 1")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.identity = _plain(identity or {})
        self.complete = complete
        self.saved = -1
        """The step of the last checkpoint that this object wrote."""
        self._sound: set[Path] = set()
        self._pending: Background | None = None
        self._group: dist.ProcessGroup | None = None  # of the thread's collectives

    def clean(self) -> None:
        """Remove what killed saves left in the folder; for the run that owns it, before its first save."""
        if rank_and_size()[0] == 0 and self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.startswith((SAVING, REMOVING)):
                    logger.info("removed %s, left by a save that was cut off", entry)
                    shutil.rmtree(entry)
        broadcast(None)  # nobody saves before the cleaning is done

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any] | None = None
    ) -> Path | None:
        """Write the checkpoint of ``step`` and drop the oldest ones.

        Args:
            extra: small JSON values that :meth:`restore` gives back.

        Returns:
            Its folder; or None when the disk refused (full, over quota, file too large): that is an ERROR line in the
            log, and the checkpoints already there are untouched, so that training can go on.

        Raises:
            CheckpointError: when saving failed for any other reason.
        """
        self.wait()
        return self._write(step, _state(model, optimizer), extra or {})

    def save_later(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any] | None = None
    ) -> None:
        """As :meth:`save`, from a copy that is taken now and that a thread writes while training goes on.

        Whatever goes wrong there is an ERROR line in the log. :meth:`wait` says how it ended; every other method waits
        first, so that one checkpoint is being written at a time.
        """
        self.wait()
        if self._group is None:
            self._group = own_group()
        work = partial(self._write, step, stage(_state(model, optimizer)), _plain(extra or {}), self._group)
        self._pending = Background(work, f"checkpoint of step {step}")

    def wait(self) -> Path | None:
        """Until what :meth:`save_later` began is written. Returns its folder; None if it failed or there was none."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.wait()

    close = wait

    def _write(
        self, step: int, state: dict[str, Any], extra: Mapping[str, Any], group: dist.ProcessGroup | None = None
    ) -> Path | None:
        final = self.folder / f"{PREFIX}{step:06d}"
        temporary = self.folder / f"{SAVING}{final.name}"
        first = rank_and_size()[0] == 0
        try:
            problem = self._prepare(temporary, group) or _write_state(temporary, state, group)
            if problem is None:
                problem = self._seal(temporary, final, step, extra, group)
        finally:
            if first and temporary.exists():  # it has not got its name
                shutil.rmtree(temporary, ignore_errors=True)
        if problem is not None:
            if first:
                line = "CHECKPOINT OF STEP %d NOT SAVED: %s (%s bytes free); the ones before are whole"
                logger.error(line, step, problem, _free(self.folder))
            return None
        self.saved = step
        self._sound.add(final)
        note("checkpoint", step)
        self._prune(step)
        return final

    def _prepare(self, temporary: Path, group: dist.ProcessGroup | None) -> str | None:
        """Make the folder to write into, where the disk lets us: its refusal, in every process, or None."""
        problem = None
        if rank_and_size()[0] == 0:
            try:
                temporary.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = str(error)
        return broadcast(problem, group)

    def _seal(
        self, temporary: Path, final: Path, step: int, extra: Mapping[str, Any], group: dist.ProcessGroup | None
    ) -> str | None:
        """Hash the files, write the manifest, move the folder into place. Returns why the disk refused, or None."""
        rank, size = rank_and_size()
        problem, files = None, {}
        try:
            own = [path for path in sorted(temporary.iterdir()) if _written_by(path, rank)]
            files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in own}
        except OSError as error:
            problem = str(error)
        shares = gather((files, problem), group)
        problem = next((p for _, p in shares if p), None)
        if problem is None and rank == 0:
            body = {
                "schema": SCHEMA,
                "step": step,
                "processes": size,
                "torch": torch.__version__,
                "model": self.identity,
                "extra": dict(extra),
                "files": {name: entry for share, _ in shares for name, entry in share.items()},
            }
            try:
                _write_synced(temporary / MANIFEST, json.dumps(body | {"sha256": _digest(body)}, indent=1))
                _sync_folder(temporary)
                if final.exists():  # a damaged one that was skipped
                    _remove(final)
                temporary.rename(final)
                _sync_folder(self.folder)
            except OSError as error:
                problem = str(error)
        return broadcast(problem, group)

    def _prune(self, step: int) -> None:
        """Keep the newest ``keep_last`` up to ``step``; a later one was damaged, and will be written anew."""
        if rank_and_size()[0] == 0:
            for path in [path for path in self.list() if step_of(path) <= step][self.keep_last :]:
                _remove(path)

    def list(self) -> list[Path]:
        """The checkpoint folders, newest first, damaged ones among them."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdigit()]
        return sorted(found, key=step_of, reverse=True)

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose files are all as they were written, the same one in every process.

        Each damaged one is named in a WARNING line with what is wrong with it. None when no sound one is there.
        """
        self.wait()
        for path in broadcast(self.list()):
            problems = damages(path)
            if not problems:
                self._sound.add(path)
                return path
            if rank_and_size()[0] == 0:
                logger.warning("checkpoint %s is damaged and skipped: %s", path, "; ".join(problems))
        return None

    def restore(
        self, path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Load weights (and optimizer state, unless ``optimizer`` is None) in place; hyperparameters stay as they are.

        Returns:
            ``{"step": …}`` and what was given as ``extra``.

        Raises:
            ConfigMismatch: the checkpoint's model config differs from this run's; names the keys.
            CheckpointError: the checkpoint is damaged, or does not fit the model.
        """
        self.wait()
        path = Path(path)
        if path not in self._sound and (problems := damages(path)):
            raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        differing = differences(_plain(self.complete(manifest["model"])), self.identity)
        if differing:
            raise ConfigMismatch(f"checkpoint {path} does not fit this config: " + "; ".join(differing))
        state = _state(model, optimizer)
        try:
            _quiet()
            read_metadata(path / ".metadata")  # refused here: torch 2.11 passes over what a reader raises
            dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=rank_and_size()[1] == 1)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {_reason(error)}") from error
        except UnsafeCheckpoint as error:
            raise CheckpointError(f"checkpoint {path} does not fit the model: {error}") from error
        if optimizer is None:
            set_state_dict(model, (), model_state_dict=state["model"], optim_state_dict={})
        else:
            _, current = get_state_dict(model, optimizer)
            merged = {"state": state["optimizer"], "param_groups": current["param_groups"]}
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=merged)
        return {**manifest["extra"], "step": manifest["step"]}


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name[len(PREFIX) :])


def damages(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, the same answer in every process: each reads its share of the files."""
    rank, size = rank_and_size()
    return sorted({problem for share in gather(_damages(path, rank, size)) for problem in share})


def _damages(path: Path, rank: int, size: int) -> list[str]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        if claimed != _digest(manifest):
            return [f"{MANIFEST} differs from its own checksum"]
        if manifest["schema"] != SCHEMA:
            return [f"{MANIFEST} has schema {manifest['schema']}, this version reads {SCHEMA}"]
        _check_manifest(manifest)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    problems = []
    for name, entry in sorted(manifest["files"].items())[rank::size]:
        try:
            length = (path / name).stat().st_size
            if length != entry["bytes"]:
                problems.append(f"{name} has {length} bytes, not {entry['bytes']}")
            elif _sha256(path / name) != entry["sha256"]:
                problems.append(f"{name} differs from its checksum")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def _check_manifest(manifest: Mapping[str, Any]) -> None:
    """ValueError for one that this program cannot have written: its checksum is anybody's to make."""
    for key, kind in (("step", int), ("processes", int), ("model", dict), ("extra", dict), ("files", dict)):
        if not isinstance(manifest[key], kind):
            raise ValueError(f"{key} is a {type(manifest[key]).__name__}")
    for name, entry in manifest["files"].items():
        if Path(name).name != name or name == "..":
            raise ValueError(f"{name!r} is no file of this folder")
        if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"{name} has no size or checksum")
    if ".metadata" not in manifest["files"]:
        raise ValueError(".metadata is not among the files")


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two JSON-like values differ, as lines ``a.b: old -> new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted({*old, *new}, key=str):
            there = f"{place}.{key}" if place else str(key)
            lines += differences(old.get(key, "absent"), new.get(key, "absent"), there)
        return lines
    return [] if old == new else [f"{place}: {old!r} -> {new!r}"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Tensors by parameter name; they share memory with the model's and optimizer's own."""
    weights, moments = get_state_dict(model, () if optimizer is None else optimizer)
    return {"model": weights} if optimizer is None else {"model": weights, "optimizer": moments["state"]}


def _write_state(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> str | None:
    """Write this process's share, synced. Returns why the disk refused (the same in every process), or None."""
    try:
        _quiet()
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=rank_and_size()[1] == 1)
    except dcp.CheckpointException as error:
        if _is_disk(error):
            return _reason(error)
        raise CheckpointError(f"saving {folder} failed: {_reason(error)}") from error
    return None


def _free(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free)
    except OSError:  # not even that
        return "unknown"


def _is_disk(error: BaseException) -> bool:
    """Whether the operating system refused to write. A short write inside torch's zip writer is a RuntimeError."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, dcp.CheckpointException) else [error]
    return all(isinstance(cause, OSError) or any(mark in str(cause) for mark in SHORT_WRITE) for cause in causes)


def _reason(error: Any) -> str:
    return "; ".join(f"process {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items())


def _written_by(path: Path, rank: int) -> bool:
    """A process's own files start with ``__rank_``; the first also answers for the rest."""
    if path.name.startswith("__"):
        return path.name.startswith(f"__{rank}_")
    return rank == 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable, where the system can open one (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint in two moves, so that a kill half-way leaves no damaged one under its name."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _quiet() -> None:
    """torch warns that saving without a process group is meant for one process, which it is.

    For good, and not around the call alone: the filters are the whole process's, threads and all.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
