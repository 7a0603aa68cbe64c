"""What a large model needs: built shard by shard, recomputed in parts, and products in 8 bits where there are such."""

import sys
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn
from training import MODEL, TRAIN

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.train import parallel, read_config
from palimpsest.train.float8 import use_float8

# Compares the weights before the first update with those that the seed gives in this one process.
FRESH = """
import torch
from palimpsest.models import build
from palimpsest.train import launch, loop
def compare(self):
    torch.manual_seed(self.config.seed)
    whole = build(self.config.plain()).state_dict()
    mine = {name.removeprefix("module."): value for name, value in self.model.state_dict().items()}
    assert mine.keys() == whole.keys()
    for name, value in mine.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(value, whole[name]), name
    sharded = [value for value in self.model.parameters() if hasattr(value, "to_local")]
    print(f"rank {rank}: {len(mine)} tensors are as the seed gives them, {len(sharded)} sharded")
    raise SystemExit(0)
loop.Run.loop = compare
launch_model = launch.model
def model(config, world):
    built = []
    make = build.__globals__["make"]
    def counted(config):
        made = make(config)
        built.append(made.embed.weight.device.type)
        return made
    build.__globals__["make"] = counted
    found = launch_model(config, world)
    build.__globals__["make"] = make
    print(f"rank {rank} built on {built}")
    return found
launch.model = model
"""


@pytest.fixture
def small(corpus, tmp_path):
    """A config whose mixer has a buffer beside its parameters: the signs of its keys' features."""
    memory = {"heads": 2, "chunk_size": 8, "features": {"degree": 2}}
    mixer = [MODEL["mixer"][0], {"kind": "neural_memory", "memory": memory}]
    path = tmp_path / "small.yaml"
    out = {"out": str(tmp_path / "run")}
    content = {"name": "tiny", "seed": 3, "model": MODEL | {"mixer": mixer}, "data": corpus, "train": TRAIN | out}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("meta", [True, False])
def test_a_model_made_in_shards_has_the_seeds_weights_bit_for_bit(run, small, meta):
    result = run(small, "train.parallel=fsdp", f"train.meta_init={meta}", processes=2, prelude=FRESH)
    assert result.codes == [0, 0], result.output
    for rank in (0, 1):
        assert f"rank {rank}: 2" in result.output or f"rank {rank}: 3" in result.output, result.output
        built = (["meta"] if rank else ["meta", "cpu"]) if meta else ["cpu"]
        assert f"rank {rank} built on {built}" in result.output


def test_only_sharded_models_are_made_on_meta():
    content = {"name": "x", "model": MODEL, "train": {"meta_init": True, "parallel": "ddp"}}
    with pytest.raises(ConfigError, match="train.meta_init was true; it must be false unless train.parallel is fsdp"):
        read_config(content)


@pytest.mark.parametrize(("every", "calls"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1])])
def test_every_so_many_th_block_is_run_again(every, calls):
    seen = [0] * 5

    class Counted(nn.Linear):
        def forward(self, x):
            seen[self.number] += 1
            return super().forward(x).tanh()

    torch.manual_seed(0)
    blocks = nn.ModuleList(Counted(3, 3) for _ in range(5))
    for number, block in enumerate(blocks):
        block.number = number
    gradients = []
    for spare in (False, True):
        if spare:
            parallel.checkpoint_blocks(blocks, every)
            seen[:] = [0] * 5
        x = torch.ones(2, 3)
        for block in blocks:
            x = block(x)
        gradients.append(torch.autograd.grad(x.sum(), list(blocks.parameters())))
    assert seen == calls
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ConfigError, match="train.recompute_every was 2; it must be 1 unless train.activation_checkp"):
        read_config({"name": "x", "model": MODEL, "train": {"recompute_every": 2}})


def test_float8_says_what_is_missing(monkeypatch):
    blocks = build({"model": MODEL}).blocks
    with pytest.raises(
        ConfigError, match=r"train.precision was 'fp8'; it needs a GPU .* 8.9 or more, and this run is on"
    ):
        use_float8(blocks, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ConfigError, match=r"8.9 or more, and A100 has 8.0"):
        use_float8(blocks, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"it needs torchao: pip install 'palimpsest\[fp8\]'"):
        use_float8(blocks, torch.device("cuda"))


def test_float8_is_asked_for_the_layers_that_fit(monkeypatch):
    """A stand-in for torchao, which has no part for CPUs: it notes the modules that our filter gives it."""
    chosen = []
    fake = ModuleType("torchao.float8")
    fake.convert_to_float8_training = lambda module, module_filter_fn: chosen.extend(
        child for name, child in module.named_modules() if module_filter_fn(child, name)
    )
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8)), nn.Linear(16, 16), nn.LayerNorm(16)])
    assert use_float8(blocks, torch.device("cuda")) == 2
    assert chosen == [blocks[0][0], blocks[1]]
    with pytest.raises(ConfigError, match="a linear layer whose sizes are multiples of 16, and this model has none"):
        use_float8(nn.ModuleList([nn.Linear(8, 8)]), torch.device("cuda"))
