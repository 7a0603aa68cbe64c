"""Compilation for a GPU that is not there: types, constants and attributes of a launch, and what the code shows."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from palimpsest.kernels.op import Cost
from palimpsest.kernels.profile import sass
from palimpsest.kernels.profile.gpus import GPUS, MULTIPROCESSORS, find_gpu, occupancy

HERE = Path(__file__).parent

SCRIPT = """
import json, os, sample, subprocess, sys
from dataclasses import asdict
from pathlib import Path
from triton import knobs
from palimpsest.kernels.launch import planning
from palimpsest.kernels.profile import sass
from palimpsest.kernels.profile.offline import compile_job, compile_jobs, specialise_launch

jobs, told, where = {}, [], Path(os.environ["PALIMPSEST_CACHE"])
for name, plan in sample.PLANS.items():
    with planning() as launches:
        plan()
    for arch in (80, 90, 100) if name == "product_bf16" else (90,):
        jobs[f"{name}/{arch}"] = specialise_launch(launches[0], arch)

def resources(cubin, read=sass.resources):
    (where / "cubin").write_bytes(cubin)
    usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", where / "cubin"], capture_output=True, text=True)
    told.append((usage.stdout, read(cubin)))
    return told[-1][1]

sass.resources = resources
found = {name: (asdict(job), asdict(compile_job(job))) for name, job in jobs.items()}
together = {}
if sys.argv[1:] == ["together"]:
    os.environ["PALIMPSEST_CACHE"] = str(where / "empty")
    facts = compile_jobs([*jobs.values()])
    together = {name: asdict(facts[job]) for name, job in jobs.items()}
print(json.dumps([found, together, told]))
"""


def outside(cache: Path, *words: str) -> list:
    """Run the script in a process whose kernels are not interpreted; what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"PYTHONPATH": path, "PALIMPSEST_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[list]:
    """Two processes: the second finds in the cache what the first compiled, and compiles it again together."""
    cache = tmp_path_factory.mktemp("cache")
    return [outside(cache), outside(cache, "together")]


@pytest.fixture(scope="module")
def compiled(runs: list[list]) -> dict:
    """The sample kernels' jobs and facts, by plan and architecture."""
    return runs[0][0]


def test_another_process_finds_what_was_compiled(runs: list[list]) -> None:
    (first, _, told), (second, together, told_again) = runs
    assert first == second, "to the time it took"
    assert len(told) == len(first) and len(told_again) == len(together), "only what was compiled together was read"


def test_registers_and_stack_are_those_that_cuobjdump_has(runs: list[list]) -> None:
    """For kernels of all architectures, one of which spills."""
    for usage, found in runs[0][2]:
        assert re.search(r"REG:(\d+) STACK:(\d+)", usage).groups() == tuple(map(str, found)), usage
    assert any(stack for _, (_, stack) in runs[0][2])


def test_a_cubin_must_tell_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the slow path of a division alone."""

    def entry(what: int, function: int, figure: int) -> bytes:
        return struct.pack("<BBHII", 4, what, 8, function, figure)

    names, other = b"\0slow\0k\0", struct.pack("<BBH", 3, 0x2F, 7)  # has its value in place of a size
    slow, own = entry(0x11, 0, 8) + entry(0x2F, 0, 20), (entry(0x11, 1, 16), entry(0x2F, 1, 40))
    symbols = b"".join(struct.pack("<I20x", names.index(name)) for name in (b"slow", b"k\0"))
    held = {".text.k": b"", ".strtab": names, ".symtab": symbols, ".nv.info": other + slow + own[0] + own[1]}
    monkeypatch.setattr(sass, "sections", lambda cubin: held)
    assert sass.resources(b"") == (40, 16)
    for wrong in (slow, slow + own[0], slow + own[1]):
        held[".nv.info"] = wrong
        with pytest.raises(RuntimeError, match="told of registers and stacks of .*; it must of k"):
            sass.resources(b"")
    held[".text.other"] = b""
    with pytest.raises(RuntimeError, match="a cubin had 2 sections of machine code; it must have one"):
        sass.kernel(b"")


def test_arguments_become_types_constants_and_attributes(compiled: dict) -> None:
    job = compiled["product_bf16/90"][0]
    kinds = dict(job["signature"])
    assert kinds["x"] == "*bf16" and kinds["o"] == "*fp32" and kinds["scale"] == "fp32"
    names = [name for name, _ in job["signature"]]
    attributes = {names[i]: what for i, what in job["attributes"]}
    assert attributes["x"] == attributes["rounds"] == "D", "aligned pointers, and 16 rounds"
    assert kinds["T"] == "i32" and "T" not in attributes, "not specialised, though 1000 is a multiple of 8 only"
    assert kinds["stride"] == "constexpr", "a stride of 1 is a constant"
    assert dict(compiled["product_strided/90"][0]["signature"])["stride"] == "i32"
    assert dict(compiled["product_one_round/90"][0]["signature"])["rounds"] == "constexpr"


@pytest.mark.parametrize("arch, kind", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_matrix_instruction_of_each_architecture_is_seen(compiled: dict, arch: int, kind: str) -> None:
    facts = compiled[f"product_bf16/{arch}"][1]
    assert set(facts["matrix"]) == {kind}
    assert set(facts["loads"]) == {"128"} and facts["spill_loads"] == facts["spill_stores"] == 0
    assert 0 < facts["registers"] <= 255 and facts["shared"] > 0 and facts["programs"] > 0 and facts["seconds"] > 0
    assert sum(facts["mix"].values()) == facts["instructions"]
    assert bool(facts["tensor_memory"]) == (arch == 100)


def test_a_run_time_stride_shows_as_narrow_loads(compiled: dict) -> None:
    loads = compiled["product_strided/90"][1]["loads"]
    assert loads["16"] > loads["128"]


def test_spills_are_seen(compiled: dict) -> None:
    facts = compiled["crowded/90"][1]
    assert facts["spill_loads"] > 10 and facts["spill_stores"] > 10 and facts["stack"] > 0
    assert facts["matrix"] == {} and facts["ffma"] > 0


def test_an_interpreting_process_is_refused() -> None:
    from palimpsest.kernels.profile.offline import specialise

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        specialise(None, None, {}, {}, 90)  # type: ignore[arg-type]


LINES = """
        /*0230*/                   LEA.HI.X.SX32 R93, R4, c[0x0][0x164], 0x1, P2 ;
        /*0240*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0250*/              @P1  LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0260*/                   LDG.E.LTC128B R4, desc[UR4][R2.64] ;
        /*0270*/                   LDGSTS.E.BYPASS.LTC128B.64 [R4], desc[UR4][R2.64] ;
        /*0280*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0290*/                   STL.64 [R1+0x8], R4 ;
        /*02a0*/              @UP0 UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4], tmem[UR6], idesc[UR7], UP0 ;
        /*02b0*/                   FFMA R1, R2, R3, R4 ;
        /*02c0*/                   NOP;
.L_x_1:
"""


def test_instructions_are_read() -> None:
    (code,) = sass.read(LINES, [0x2D0])
    assert code.instructions == 9
    assert code.loads == {"128": 1, "16": 1, "32": 1, "64": 1, "bulk": 1}
    assert code.matrix == {"UTCHMMA": 1} and code.spill_stores == 1 and code.spill_loads == 0 and code.ffma == 1
    assert code.mix["integer and address"] == 1 and code.mix["global load"] == 5


def test_kernels_that_are_read_together_stay_apart() -> None:
    first, none, second = sass.read(LINES, [0x250, 0, 0x80])
    assert first.instructions == 2 and first.loads == {"128": 1}
    assert (
        none.instructions == 0 and second.instructions == 7 and second.loads == {"16": 1, "32": 1, "64": 1, "bulk": 1}
    )


def test_what_is_compiled_together_is_what_is_compiled_alone(compiled: dict, runs: list[list]) -> None:
    """Jobs of all architectures in turn, so that the machine code of each is read among that of others."""
    together = runs[1][1]
    assert set(together) == set(compiled)
    for name, (_, alone) in compiled.items():
        assert {**together[name], "seconds": 0} == {**alone, "seconds": 0}, name


@pytest.mark.parametrize(
    "arch, given, wanted",
    [
        (90, {"warps": 4, "registers": 255, "shared": 0}, (2, "registers")),
        (90, {"warps": 4, "registers": 128, "shared": 0}, (4, "registers")),
        (90, {"warps": 8, "registers": 32, "shared": 0}, (8, "registers")),
        (90, {"warps": 4, "registers": 33, "shared": 0}, (12, "registers")),
        (90, {"warps": 1, "registers": 16, "shared": 0}, (32, "blocks")),
        (90, {"warps": 4, "registers": 64, "shared": 113 * 1024}, (2, "shared memory")),
        (90, {"warps": 4, "registers": 64, "shared": 227 * 1024}, (1, "shared memory")),
        (90, {"warps": 4, "registers": 64, "shared": 227 * 1024 + 1}, (0, "shared memory")),
        (80, {"warps": 4, "registers": 64, "shared": 163 * 1024 + 1}, (0, "shared memory")),
        (89, {"warps": 16, "registers": 40, "shared": 0}, (3, "registers")),
        (100, {"warps": 4, "registers": 64, "shared": 0, "tensor_memory": 256}, (2, "tensor memory")),
    ],
)
def test_occupancy(arch: int, given: dict, wanted: tuple) -> None:
    """By hand, from the programming guide: registers go to a warp in 256s, 1 KiB of a block is the system's."""
    assert occupancy(arch, **given) == wanted


def test_floor_of_a_gpu() -> None:
    gpu = find_gpu("NVIDIA H200")
    assert gpu is GPUS["H200"] and gpu.arch in MULTIPROCESSORS
    assert gpu.floor(Cost(int(790e12), 1), 16) == (pytest.approx(1.0), "compute")
    assert gpu.floor(Cost(1, int(4.3e12)), 16) == (pytest.approx(1.0), "memory")
    assert find_gpu("NVIDIA GeForce RTX 4090").arch == 89 and find_gpu("NVIDIA A100-SXM4-80GB").arch == 80
    for other in ("GTX 1080", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA GH200 480GB"):
        with pytest.raises(ValueError, match=f"gpu was '{other}'"):
            find_gpu(other)
