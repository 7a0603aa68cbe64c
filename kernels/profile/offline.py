"""Compiles a planned launch for a GPU that is not there, and reads off what the machine code says.

    from palimpsest.kernels.launch import planning
    from palimpsest.kernels.profile.offline import compile_launch

    with planning() as launches:
        rms_norm(torch.empty(8192, 1024, dtype=torch.bfloat16), backend="triton")
    print(compile_launch(launches[0], arch=90))

A launch compiles to what it would be on that GPU: Triton's own rules turn its arguments into types, constants (an
integer that is 1) and attributes (a multiple of 16), and ``do_not_specialize`` is respected. It needs a process without
``TRITON_INTERPRET``. What was read is kept under ``PALIMPSEST_CACHE``, by a digest of the kernel's source and all else
that decides the result.
"""

import hashlib
import importlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..launch import ARCHITECTURES, VARIABLE, Config, Kernel, Launch, interpreted
from . import sass
from .gpus import MULTIPROCESSORS, occupancy

ARCHES = ARCHITECTURES
BATCH = 32  # kernels whose machine code is read at a time


@dataclass(frozen=True)
class Job:
    """One specialisation of a kernel for one architecture, in plain values that another process can take.

    ``module`` and ``function`` say where the kernel is found. ``signature`` maps its parameters to Triton's types;
    ``constants`` and ``attributes`` are by position. ``configuration`` is the text of the :class:`Config`.
    """

    kernel: str
    module: str
    function: str
    arch: int
    configuration: str
    num_warps: int
    num_stages: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    attributes: tuple[tuple[int, str], ...]


@dataclass
class Facts:
    """What a compilation gave.

    Registers per thread; ``stack`` bytes per thread and the loads and stores to it (spills); shared memory in bytes
    and tensor memory in columns of a program; programs that a multiprocessor holds and what limits them; static counts
    of instructions; seconds from source to machine code. ``error``: why there is none.
    """

    registers: int = 0
    stack: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    shared: int = 0
    tensor_memory: int = 0
    programs: int = 0
    limit: str = ""
    occupancy: float = 0.0
    instructions: int = 0
    ffma: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    mix: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def spills(self) -> int:
        """Instructions that move a register to or from memory."""
        return self.spill_loads + self.spill_stores

    @property
    def load_bits(self) -> float:
        """Mean bits per thread of a global load, those of the copy engine left out; 0 when there is none."""
        plain = {int(bits): n for bits, n in self.loads.items() if bits != "bulk"}
        return sum(bits * n for bits, n in plain.items()) / max(1, sum(plain.values()))


def specialise(
    kernel: Kernel, config: Config, arguments: Mapping[str, Any], constants: Mapping[str, Any], arch: int
) -> Job:
    """What Triton makes of the arguments of a launch, by its own binder.

    Raises:
        RuntimeError: in a process whose kernels are interpreted.
        ValueError: for an architecture that is not in ``gpus.MULTIPROCESSORS``.
    """
    if interpreted():
        raise RuntimeError(f"kernels are interpreted here; compile in a process without {VARIABLE}")
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch was {arch!r}; it must be one of {sorted(MULTIPROCESSORS)}")
    function = kernel.function
    bound, found, _ = _binder(kernel, arch)(**arguments, **constants, **dict(config.blocks))
    values = list(bound.values())
    return Job(
        kernel=kernel.name,
        module=function.fn.__module__,
        function=function.fn.__name__,
        arch=arch,
        configuration=str(config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        signature=tuple((p.name, kind) for p, (kind, _) in zip(function.params, found, strict=True)),
        constants=tuple((i, values[i]) for i, (kind, _) in enumerate(found) if kind == "constexpr"),
        attributes=tuple(
            (i, what) for i, (kind, what) in enumerate(found) if kind != "constexpr" and isinstance(what, str)
        ),
    )


@cache
def _binder(kernel: Kernel, arch: int) -> Callable[..., Any]:
    """What Triton binds a kernel's arguments with; it is made by compiling Python, which takes longer than its use."""
    from triton.runtime.jit import create_function_from_signature

    function = kernel.function
    return create_function_from_signature(function.signature, function.params, _backend(arch))


def specialise_launch(launch: Launch, arch: int, config: Config | None = None) -> Job:
    """The job of a planned launch, with its own configuration or another one of its kernel."""
    return specialise(launch.kernel, config or launch.config, launch.arguments, launch.constants, arch)


def compile_launch(launch: Launch, arch: int, config: Config | None = None) -> Facts:
    """Compile a planned launch in this process."""
    return compile_job(specialise_launch(launch, arch, config))


def compile_job(job: Job) -> Facts:
    """Compile one job; see :func:`compile_jobs`."""
    return compile_jobs([job])[job]


def compile_jobs(jobs: Sequence[Job]) -> dict[Job, Facts]:
    """Compile jobs one after another, or find what their last compilation gave.

    An error of the compiler is in ``Facts.error``. The machine code is read ``BATCH`` kernels at a time: to start the
    disassembler takes as long as to compile a small kernel.
    """
    found = {}
    for start in range(0, len(jobs), BATCH):
        made = {}
        for job in jobs[start : start + BATCH]:
            facts = _compile(job)
            if isinstance(facts, Facts):
                found[job] = facts
            else:
                made[job] = facts
        for arch in dict.fromkeys(job.arch for job in made):
            found.update(_read({job: binary for job, binary in made.items() if job.arch == arch}, arch))
    return {job: found[job] for job in jobs}


@dataclass
class _Binary:
    """A compiled kernel: its cubin and Triton's metadata, the seconds it took, and where its facts are kept."""

    cubin: bytes
    metadata: Any
    seconds: float
    cached: Path


def _compile(job: Job) -> "Facts | _Binary":
    """The facts of a job where they are kept or there is an error, or else its machine code."""
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.errors import TritonError

    function = getattr(importlib.import_module(job.module), job.function)
    backend = _backend(job.arch)
    attributes = {(i,): backend.parse_attr(what) for i, what in job.attributes}
    source = ASTSource(function, dict(job.signature), {(i,): value for i, value in job.constants}, attributes)
    options = backend.parse_options({"num_warps": job.num_warps, "num_stages": job.num_stages})
    cached = _cache_file(source.hash(), options.hash(), str(job.arch), triton.__version__)
    if cached.exists():
        return Facts(**json.loads(cached.read_text()))
    start = time.perf_counter()
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            made = triton.compile(source, target=_target(job.arch), options=options.__dict__)
    except (TritonError, RuntimeError, ValueError, AssertionError) as error:  # all that its passes and ptxas raise
        return Facts(error=f"{type(error).__name__}: {error}"[:2000], seconds=time.perf_counter() - start)
    return _Binary(made.asm["cubin"], made.metadata, time.perf_counter() - start, cached)


def _target(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


def _backend(arch: int) -> Any:
    from triton.compiler import make_backend

    return make_backend(_target(arch))


def _cache_file(*parts: str) -> Path:
    """Where a result is kept; what reads the machine code is part of the key."""
    readers = (Path(__file__), Path(sass.__file__), Path(occupancy.__code__.co_filename))
    every = [*parts, *(path.read_text() for path in readers)]
    digest = hashlib.sha256("\0".join(every).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("PALIMPSEST_CACHE", Path.home() / ".cache" / "palimpsest"))
    return folder / "offline" / f"{digest}.json"


def _read(made: Mapping[Job, _Binary], arch: int) -> dict[Job, Facts]:
    """Read the machine code of kernels for one architecture, and keep what it says."""
    from triton import knobs

    found = {}
    codes = [sass.kernel(binary.cubin)[1] for binary in made.values()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        text = _run(knobs.nvidia.nvdisasm.path, "-b", f"SM{arch}{'a' if arch >= 90 else ''}", path)
        for (job, binary), code in zip(made.items(), sass.read(text, [len(code) for code in codes]), strict=True):
            found[job] = _facts(job, binary, code)
    for job, facts in found.items():
        cached = made[job].cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cached.parent, delete=False) as file:
            json.dump(asdict(facts), file)
        os.replace(file.name, cached)
    return found


def _facts(job: Job, binary: _Binary, code: sass.Code) -> Facts:
    """What a kernel's resources and its instructions come to."""
    metadata = binary.metadata
    registers, stack = sass.resources(binary.cubin)
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    programs, limit = occupancy(
        job.arch,
        warps=metadata.num_warps,
        registers=registers,
        shared=metadata.shared,
        tensor_memory=tensor_memory,
    )
    return Facts(
        registers=registers,
        stack=stack,
        spill_loads=code.spill_loads,
        spill_stores=code.spill_stores,
        shared=metadata.shared,
        tensor_memory=tensor_memory,
        programs=programs,
        limit=limit,
        occupancy=programs * metadata.num_warps / MULTIPROCESSORS[job.arch].warps,
        instructions=code.instructions,
        ffma=code.ffma,
        matrix=dict(code.matrix),
        loads=dict(code.loads),
        stores=dict(code.stores),
        mix=dict(code.mix),
        seconds=binary.seconds,
    )


def _run(*words: Any) -> str:
    """What a command prints.

    Raises:
        RuntimeError: with its error output, when it fails.
    """
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()[:500]}")
    return done.stdout
