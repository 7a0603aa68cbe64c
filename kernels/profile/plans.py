"""All that the operations launch in their plans, and its compilation on several processes.

Each operation's folder has a ``plans.py`` with ``PLANS: dict[str, Callable[[], None]]``: calls of the documented
shapes, which together reach every kernel. A plan is named ``operation/plan``.
"""

import importlib
import importlib.util
import multiprocessing
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..launch import Launch, planning, targeting
from ..op import NotCovered
from .offline import ARCHES, Facts, Job, compile_jobs, specialise_launch

PACKAGE = __package__.rpartition(".")[0]
SHARE = 8  # jobs that a process takes at a time
Key = tuple[str, str, str, str]


def discover(modules: Collection[str] = (), name: str = "PLANS") -> dict[str, Callable[[], None]]:
    """The plans of every operation, or of these modules alone, by ``operation/plan``; or other calls that a module has
    under a ``name``."""
    if not modules:
        folders = importlib.import_module(PACKAGE).__path__
        every = [f"{PACKAGE}.{found.name}.plans" for found in pkgutil.iter_modules(folders) if found.ispkg]
        modules = [module for module in every if module != __name__ and importlib.util.find_spec(module) is not None]
    found = {}
    for module in modules:
        owner = module.removesuffix(".plans").rpartition(".")[2]
        calls = getattr(importlib.import_module(module), name, {})
        found.update({f"{owner}/{plan}": call for plan, call in calls.items()})
    return found


def launches_of(plan: Callable[[], None], arch: int | None = None) -> list[Launch]:
    """What a plan launches, in order, on GPUs of an architecture where one is given; nothing runs."""
    with planning() as launches, nullcontext() if arch is None else targeting(arch):
        plan()
    return list(launches)


@dataclass(frozen=True)
class Entry:
    """One compilation of a table: a plan's kernel (``name#2`` for its second specialisation) and what is compiled."""

    plan: str
    kernel: str
    preferred: bool
    job: Job

    @property
    def key(self) -> Key:
        """Plan, kernel, configuration, architecture."""
        return self.plan, self.kernel, self.job.configuration, f"sm_{self.job.arch}"


def distinct(launches: Sequence[Launch], arch: int) -> Iterator[tuple[str, Launch]]:
    """The first launch of each specialisation of a kernel, and its name in a table: ``name#2`` is the second one's. A
    plan launches some of them once for every segment of a sequence."""
    seen: dict[str, list[Job]] = {}
    for launch in launches:
        job = specialise_launch(launch, arch)
        same = seen.setdefault(launch.kernel.name, [])
        if job not in same:
            same.append(job)
            yield launch.kernel.name + (f"#{len(same)}" if len(same) > 1 else ""), launch


def entries_of(plan: str, launches: Sequence[Launch], arches: Sequence[int] = ARCHES) -> Iterator[Entry]:
    """Every kernel of a plan with every configuration, for every architecture; a specialisation counts once."""
    of_each = list(distinct(launches, arches[0]))
    for arch in arches:
        for name, launch in of_each:
            with targeting(arch):
                configs = launch.kernel.configs(launch.constants)
            for i, config in enumerate(configs):
                yield Entry(plan, name, i == 0, specialise_launch(launch, arch, config))


@dataclass
class Collected:
    """The table of some plans; a line for each plan that an operation refuses; and by plan and architecture why a plan
    runs plain torch there, of which others have kernels."""

    entries: list[Entry]
    refused: list[str]
    elsewhere: dict[tuple[str, int], str]


def collect(plans: Mapping[str, Callable[[], None]], arches: Sequence[int] = ARCHES) -> Collected:
    """All that some plans launch, on each architecture what it would there."""
    found = Collected([], [], {})
    with torch.enable_grad():
        for name, plan in plans.items():
            without: dict[int, ValueError] = {}
            for arch in arches:
                try:
                    found.entries += entries_of(name, launches_of(plan, arch), (arch,))
                except ValueError as error:
                    without[arch] = error
            if len(without) == len(arches) or not all(isinstance(error, NotCovered) for error in without.values()):
                found.refused += dict.fromkeys(f"{name}: {error}" for error in without.values())
            else:
                found.elsewhere |= {(name, arch): str(error) for arch, error in without.items()}
    return found


def compile_all(jobs: Collection[Job], workers: int = 1) -> dict[Job, Facts]:
    """Compile each job once, on several processes; in this one for ``workers`` = 1."""
    distinct = list(dict.fromkeys(jobs))
    if workers == 1 or len(distinct) < 2:
        return compile_jobs(distinct)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        parts = pool.map(compile_jobs, [distinct[i : i + SHARE] for i in range(0, len(distinct), SHARE)])
        return {job: facts for part in parts for job, facts in part.items()}
