"""What a large model needs: built shard by shard, recomputed in parts, and products in 8 bits where there are such."""

import sys
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from training import MODEL, TRAIN

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.train import parallel, read_config
from palimpsest.train.float8 import use_float8
from palimpsest.train.memory_estimate import activations
from palimpsest.train.recompute import by_budget, chosen, named

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


def checkpointed(**keys):
    return read_config({"name": "x", "model": MODEL, "train": {"activation_checkpointing": True, **keys}})


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
            parallel.checkpoint_blocks(blocks, chosen(checkpointed(recompute_every=every), 5, 1, gpu=False))
            seen[:] = [0] * 5
        x = torch.ones(2, 3)
        for block in blocks:
            x = block(x)
        gradients.append(torch.autograd.grad(x.sum(), list(blocks.parameters())))
    assert seen == calls
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ConfigError, match="train.recompute_every was 2; it must be 1 unless train.activation_checkp"):
        read_config({"name": "x", "model": MODEL, "train": {"recompute_every": 2}})


# Says after the model is spread which blocks' forward is torch's checkpoint.
CHECKPOINTED = """
from palimpsest.train import parallel
distribute = parallel.distribute
def told(model, blocks, *args):
    print("checkpointed", [i for i, block in enumerate(blocks) if hasattr(block.forward, "func")])
    return distribute(model, blocks, *args)
parallel.distribute = told
"""

# Blocks 0, 2, 4 keep more than 1 and 3: an attention's activations are fewer than a memory's.
MIXED = {
    "vocab_size": 256,
    "dim": 16,
    "layers": 5,
    "mixer": [{"kind": "neural_memory", "memory": {"heads": 2, "chunk_size": 8}}, {"kind": "attention", "heads": 2}],
}


def budgeted(gib, **keys):
    train = {"activation_checkpointing": True, "activation_budget": gib, "seq_len": 64, **keys}
    return read_config({"name": "x", "model": MIXED, "train": train})


def test_a_budget_takes_the_fewest_blocks_that_fit_the_largest_first(caplog):
    config, order = budgeted(1.0), [0, 2, 4, 1, 3]
    counts = [activations(config.model, config.train, 2, gpu=False, again=order[:n]) for n in range(6)]
    peaks = [found.peak for found in counts]
    assert peaks == sorted(peaks, reverse=True) and peaks[5] < peaks[0] / 2
    sizes = counts[0].blocks
    assert sizes[0] >= sizes[2] >= sizes[4] > sizes[1] >= sizes[3] > 0
    for budget in {*peaks, *(peak - 1 for peak in peaks[:5] if peak > peaks[5])}:
        fewest = next(n for n, peak in enumerate(peaks) if peak <= budget)
        assert by_budget(config, 2, budget, gpu=False).again == tuple(sorted(order[:fewest]))
    with pytest.raises(ConfigError, match=r"train.activation_budget was .*; it must be at least .* GiB, which 2 x 64"):
        by_budget(config, 2, peaks[5] - 1, gpu=False)
    with caplog.at_level("INFO", "palimpsest"):
        assert chosen(budgeted(peaks[2] / 2**30), 5, 2, gpu=False) == (0, 2)
    assert "activation checkpointing: 2 of 5 blocks (0, 2) are run again; counted on shapes" in caplog.text


def test_a_budget_is_kept_to_by_the_run(run, corpus, tmp_path):
    """The log has what was chosen, and the weights have the bits of a run that recomputes nothing."""
    peak = activations(budgeted(1.0).model, budgeted(1.0).train, 2, gpu=False, again=[0, 2]).peak
    weights = []
    for name, keys in (
        ("plain", []),
        ("budget", ["activation_checkpointing=true", f"activation_budget={peak / 2**30}"]),
    ):
        path = tmp_path / f"{name}.yaml"
        train = {**TRAIN, "seq_len": 64, "batch_size": 2, "micro_batch_size": None, "out": str(tmp_path / name)}
        path.write_text(yaml.safe_dump({"name": name, "model": MIXED, "data": corpus, "train": train}))
        result = run(path, *(f"train.{key}" for key in keys), prelude=CHECKPOINTED)
        assert result.codes == [0], result.output
        assert ("2 of 5 blocks (0, 2) are run again" in result.output) == bool(keys)
        assert f"checkpointed {[0, 2] if keys else []}\n" in result.output
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation_checkpointing": False}, "must be null unless train.activation_checkpointing is true"),
        ({"recompute_every": 2}, "must be null with train.recompute_every"),
        ({"sequence_parallel": 2}, "must be null with train.sequence_parallel"),
    ],
)
def test_a_budget_that_chooses_nothing_is_refused(keys, message):
    with pytest.raises(ConfigError, match=f"train.activation_budget was 0.5; it {message}"):
        budgeted(0.5, **keys)


def test_numbers_of_blocks_in_few_words():
    assert [named(x) for x in ((), (3,), (0, 1), (0, 1, 2, 5, 7, 8))] == ["none", "3", "0 to 1", "0 to 2, 5, 7 to 8"]


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
