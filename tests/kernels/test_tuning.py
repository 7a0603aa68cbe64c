"""Which configuration runs: canaries decide, verdicts are kept on disk, and the fastest of the right ones is taken."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from palimpsest.kernels import launch, tuning
from palimpsest.kernels.launch import Config, Kernel, architecture, forced, planning, targeting

CONFIGS = [Config((("BLOCK", size),), num_warps=4, num_stages=2) for size in (16, 32, 64)]
WIDE, TALL = CONFIGS[0], CONFIGS[1]


class Fake:
    """A kernel that is never compiled: ``wrong`` are the configurations with which its canary finds another answer."""

    def __init__(self, name: str, wrong: tuple[Config, ...] = (), inner: "Fake | None" = None) -> None:
        self.wrong, self.inner, self.canaries = wrong, inner, []
        function = SimpleNamespace(fn=SimpleNamespace(__name__=name), cache_key=f"source of {name}")
        self.kernel = Kernel(function, lambda constants: CONFIGS, self.canary)

    def canary(self, constants: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """1 where it is right; what the inner kernel gives is wrong with this one."""
        config = launch._forced[self.kernel.name]
        self.canaries.append(config)
        if self.inner is not None:
            self.inner.choose(constants)
        spoilt = any(
            other.kernel.name in launch._forced and launch._forced[other.kernel.name] in other.wrong for other in FAKES
        )
        return [(torch.full([4], 1.5 if spoilt else 1.0), torch.ones(4))]

    def choose(self, constants: dict[str, Any] | None = None, programs: int = 1000) -> Config:
        """What a launch would take."""
        return tuning.choose(self.kernel, lambda every: (programs,), {}, constants or {"D": 64})


FAKES: list[Fake] = []


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes fake kernels, on a GPU that is as fake; ``make.times`` maps BLOCK to the seconds of a launch."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake GPU/1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_multiprocessors", lambda: 132)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_verdicts", {})
    monkeypatch.setattr(launch, "KERNELS", {})
    ran: list[Config] = []
    monkeypatch.setattr(Kernel, "run", lambda self, config, *rest: ran.append(config))

    def measure(run: Any) -> float:
        run()
        measure.measured.append(ran[-1])
        return measure.times[dict(ran[-1].blocks)["BLOCK"]]

    measure.times, measure.measured = {16: 3.0, 32: 2.0, 64: 1.0}, []
    monkeypatch.setattr(tuning, "measure", measure)

    def new(name: str = "fake", **given: Any) -> Fake:
        FAKES.append(Fake(name, **given))
        return FAKES[-1]

    new.clock = measure
    yield new
    FAKES.clear()


def forget() -> None:
    """As a new process would."""
    tuning._chosen.clear()
    tuning._verdicts.clear()


def kept(tmp_path: Path) -> dict:
    """The file of verdicts."""
    (path,) = tmp_path.glob("kernels-*.json")
    return json.loads(path.read_text())


def test_the_fastest_of_the_right_ones_is_taken(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake = make(wrong=(CONFIGS[2],))
    with caplog.at_level(logging.INFO, "palimpsest.kernels"):
        assert fake.choose() == TALL, "64 would be faster, and is wrong"
    assert f"with {CONFIGS[2]}: WRONG, not used (RMS-relative distance 0.5" in caplog.text
    assert f"with {WIDE}: right" in caplog.text and make.clock.measured == [WIDE, TALL]
    ((name, verdicts),) = kept(tmp_path).items()
    assert name.startswith("fake@") and name.endswith(" D=64")
    assert [verdicts[str(config)]["passed"] for config in CONFIGS] == [True, True, False]
    assert fake.choose() == TALL and len(fake.canaries) == 3, "known in this process"
    forget()
    assert fake.choose() == TALL and len(fake.canaries) == 3 and len(make.clock.measured) == 2, "known on disk"
    assert fake.choose({"D": 128}) == TALL and len(fake.canaries) == 6, "other constants are another kernel"


def test_the_file_names_gpu_and_version(make: Any, tmp_path: Path) -> None:
    import triton

    make().choose()
    version = triton.__version__.replace(".", "-")
    assert [path.name for path in tmp_path.glob("kernels-*.json")] == [f"kernels-Fake-GPU-1-triton-{version}.json"]


def test_a_grid_that_does_not_fill_the_gpu_is_timed_apart(make: Any) -> None:
    fake = make()
    assert fake.choose(programs=132) == CONFIGS[2]
    make.clock.times = {16: 1.0, 32: 2.0, 64: 3.0}
    assert fake.choose(programs=131) == WIDE and len(fake.canaries) == 3, "checked once, timed twice"
    assert fake.choose(programs=5000) == CONFIGS[2]
    forget()
    make.clock.times = {16: 9.0, 32: 9.0, 64: 9.0}
    assert (fake.choose(programs=131), fake.choose(programs=132)) == (WIDE, CONFIGS[2])


@pytest.mark.parametrize("failure", ["nan", "memory", "runtime"])
def test_other_ways_of_being_wrong(make: Any, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def canary(constants: dict[str, Any]) -> list:
        if launch._forced["fake"] != TALL:
            return [(torch.ones(2), torch.ones(2))]
        if failure == "memory":
            raise OutOfResources(300000, 232448, "shared memory")
        if failure == "runtime":
            raise RuntimeError("PassManager::run failed")
        return [(torch.tensor([1.0, float("nan")]), torch.ones(2))]

    fake = make()
    monkeypatch.setattr(fake.kernel, "canary", canary)
    passed, found = tuning.validate(fake.kernel, TALL, {})
    told = {"nan": "distance nan", "memory": "out of resource: shared memory", "runtime": "PassManager"}[failure]
    assert not passed and told in found
    assert tuning.validate(fake.kernel, WIDE, {})[0]
    assert fake.choose() == CONFIGS[2]


def test_half_precision_has_its_own_tolerance(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make()
    for dtype, far in tuning.TOLERANCE.items():
        for factor, passes in ((0.7, True), (1.4, False)):
            found = torch.full([8], 1 + factor * far, dtype=torch.float32).to(dtype)
            monkeypatch.setattr(fake.kernel, "canary", lambda constants, found=found: [(found, torch.ones(8))])
            assert tuning.validate(fake.kernel, WIDE, {})[0] == passes, (dtype, factor)


def test_a_canary_that_compares_nothing_is_an_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make()
    monkeypatch.setattr(fake.kernel, "canary", lambda constants: [])
    with pytest.raises(ValueError, match="canary of fake compares nothing"):
        fake.choose()


def test_none_right_is_an_error_that_names_all(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"no configuration of fake@\w+ D=64 passed .*BLOCK=16 .*BLOCK=64 "):
        make(wrong=tuple(CONFIGS)).choose()


@pytest.mark.parametrize("damage", ["{", "[1, 2]", '{"fake": 3}', '{"fake": {"BLOCK=16": {}}}', "\udcff"])
def test_a_damaged_file_is_said_and_replaced(make: Any, tmp_path: Path, damage: str, caplog: Any) -> None:
    fake = make()
    fake.choose()
    (path,) = tmp_path.glob("kernels-*.json")
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    forget()
    assert fake.choose() == CONFIGS[2] and len(fake.canaries) == 6
    assert "is damaged; kernels are checked anew" in caplog.text
    assert len(kept(tmp_path)) == 1


def test_without_tuning_the_first_that_is_right_is_taken(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_AUTOTUNE", "0")
    fake = make(wrong=(WIDE,))
    assert fake.choose() == TALL and fake.canaries == [WIDE, TALL] and not make.clock.measured


def test_another_source_is_another_kernel(make: Any) -> None:
    fake = make()
    fake.choose()
    fake.kernel.function.cache_key = "changed"
    forget()
    fake.choose()
    assert len(fake.canaries) == 6


def test_a_kernel_inside_anothers_canary_is_not_blamed(make: Any, tmp_path: Path) -> None:
    """With a wrong outer configuration every inner one looks wrong: none of that is written, and nothing is timed."""
    inner = make("inner")
    outer = make("outer", wrong=(WIDE,), inner=inner)
    assert outer.choose() == CONFIGS[2]
    verdicts = {name.split("@")[0]: configs for name, configs in kept(tmp_path).items()}
    assert [verdicts["outer"][str(config)]["passed"] for config in CONFIGS] == [False, True, True]
    assert "no configuration of inner" in verdicts["outer"][str(WIDE)]["found"]
    assert list(verdicts["inner"].values()) == [{"passed": True, "found": "0"}], "the first, right with the second"
    assert len(make.clock.measured) == 2, "the outer kernel's two"
    assert inner.choose() == CONFIGS[2] and len(make.clock.measured) == 5


def test_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    one, two = tuning.Verdicts(path), tuning.Verdicts(path)
    one.note("a", WIDE, {"passed": True, "found": "0"})
    two.note("b", TALL, {"passed": False, "found": "no"})
    one.note("a", WIDE, {"seconds, full": 1.0})
    whole = tuning.Verdicts(path).known
    assert whole == {
        "a": {str(WIDE): {"passed": True, "found": "0", "seconds, full": 1.0}},
        "b": {str(TALL): {"passed": False, "found": "no"}},
    }
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_forced_configurations_nest(make: Any) -> None:
    kernel = make().kernel
    assert not launch.is_forced()
    with forced(kernel, WIDE):
        with forced(kernel, TALL):
            assert launch._forced == {"fake": TALL}
        assert launch._forced == {"fake": WIDE} and launch.is_forced()
    assert not launch.is_forced()


@pytest.mark.parametrize(
    "capability, arch", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)]
)
def test_a_gpu_goes_by_an_architecture_that_is_compiled_for(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not in the interpreter; a plan goes by the one that it is made for."""
    major, minor = capability
    assert architecture() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major, minor=minor))
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    assert architecture() == arch
    with planning():
        assert architecture() is None
        with targeting(100):
            assert architecture() == 100
