"""What a stranger installs: a source archive, a wheel built from it, a clean environment, and five steps of training.

The environment sees the heavy dependencies of the running one through a single path line, which names a folder and
runs none of that folder's own start-up lines: an editable install of the checkout stays out of sight.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "models", "train", "eval", "configs")
LEFT = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "runs", "build", "dist", "tests", "docs", "shared")


def run(command: list[str | Path], folder: Path, expected: int = 0) -> str:
    """Run a command outside of the checkout; its standard output, or error where it had to fail."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    environment |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    words = list(map(str, command))
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == expected, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stderr if expected else done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive, built from a copy of the checkout; once for all test processes."""
    shared = (
        tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.getbasetemp()
    )
    target = shared / "dist"
    with FileLock(shared / "dist.lock"):
        if not target.exists():
            source = shared / "source"
            shutil.copytree(ROOT, source, ignore=LEFT)
            run([sys.executable, "-m", "build", "--no-isolation", "--outdir", shared / "built", source], shared)
            (shared / "built").rename(target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder of a clean virtual environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    bin_ = folder / "bin"
    run([sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--no-deps", "--no-index", wheel], folder)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return bin_


def metadata(wheel: Path) -> Message:
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"palimpsest/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in {".py", ".yaml", ".json"}
    }
    assert names == expected
    assert "palimpsest/configs/quickstart.yaml" in names
    assert not [name for name in names if "test" in Path(name).name]


def test_metadata(wheel: Path) -> None:
    fields = metadata(wheel)
    needs = fields.get_all("Requires-Dist") or []
    plain = {re.split(r"[^\w-]", need)[0].lower() for need in needs if "extra ==" not in need}
    assert plain == {"torch", "triton", "einops", "numpy", "pydantic", "pyyaml", "safetensors", "tensorboard"}
    assert next(need for need in needs if need.startswith("triton")).endswith('; platform_system == "Linux"')
    assert "torch>=2.11" in needs
    assert set(fields.get_all("Provides-Extra") or []) == {"data", "hf", "lm-eval", "plot", "flash", "fp8", "dev"}
    assert fields["Requires-Python"].replace(" ", "") in {">=3.10,<3.14", "<3.14,>=3.10"}
    assert fields["License-Expression"] == "Apache-2.0"


def test_requirements_are_met_by_what_runs_the_tests(environment: Path, tmp_path: Path) -> None:
    script = """
from importlib.metadata import requires, version
from packaging.requirements import Requirement
for need in map(Requirement, requires("palimpsest")):
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        assert need.specifier.contains(version(need.name), prereleases=True), (str(need), version(need.name))
        print(need.name)
"""
    assert "torch" in run([environment / "python", "-c", script], tmp_path)


def test_bare_rooms_cannot_be_imported(environment: Path, tmp_path: Path) -> None:
    for room in ROOMS:
        output = run([environment / "python", "-c", f"import {room}"], tmp_path, expected=1)
        assert f"No module named '{room}'" in output
    where = run([environment / "python", "-c", "import palimpsest.models as m; print(m.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)


def test_five_steps_and_a_sample_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    """The console scripts train a model with a configuration from the wheel, and have it write."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {n}th line says {n * n}." for n in range(4000)), encoding="utf-8")
    overrides = {
        "data.source": "text",
        "data.path": text,
        "data.folder": tmp_path / "shards",
        "train.out": tmp_path / "run",
        "train.steps": 5,
        "train.batch_size": 2,
        "train.seq_len": 64,
        "train.warmup_steps": 1,
        "train.validate_every": 5,
        "train.validation_batches": 1,
        "train.checkpoint_every": 5,
        "model.dim": 32,
        "model.layers": 2,
    }
    given = [f"{key}={value}" for key, value in overrides.items()]
    run([environment / "palimpsest-train", "configs/quickstart.yaml", *given], tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in steps) == 5
    assert (tmp_path / "run" / "model.safetensors").is_file() and (tmp_path / "run" / "config.json").is_file()
    command = [environment / "palimpsest-generate", tmp_path / "run", "--prompt", "The 1", "--max-tokens", "8"]
    assert run([*command, "--past-end", "--seed", "0"], tmp_path).strip()
