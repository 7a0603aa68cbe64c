"""The dry run against real models: exact where it says bytes of parameters, gradients, optimizer and kept tensors."""

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from training import MODEL

from palimpsest.models import build
from palimpsest.models.config import ConfigError
from palimpsest.models.lm import make
from palimpsest.models.meta_autocast import MetaAutocast
from palimpsest.train import optim, read_config, sltrain
from palimpsest.train.__main__ import main
from palimpsest.train.dry_run import fits, learning_rates, plan
from palimpsest.train.dry_run_text import text
from palimpsest.train.memory_estimate import activations, fixed
from palimpsest.train.parallel import checkpoint_blocks

ROWS, LENGTH = 3, 48
SMALL = {"model.dim": 32, "model.layers": 2, "train.seq_len": LENGTH}
HMT = {"segment": 4, "sensory": 1, "memories": 3, "bptt": 2}


def storages(tensors) -> int:
    """Bytes of the distinct storages of real tensors."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def really_kept(config, rows, bf16=False, checkpointing=False, length=None):
    """What autograd packs in a real forward on the CPU, besides parameters: bytes. With checkpointing what the blocks
    are called with as well, which it holds without packing."""
    model = make(config.model)
    if checkpointing:
        checkpoint_blocks(model.blocks)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.zeros(rows, length or config.train.seq_len, dtype=torch.int64)
    kept = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept.append(x)
        return x

    if checkpointing:
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(tokens, targets=tokens)
    return storages(kept)


def trained(config):
    """(model, optimizer) after a real update."""
    model = make(config.model)
    optimizer = optim.make(model, config.train)
    tokens = torch.zeros(1, config.train.seq_len, dtype=torch.int64)
    model(tokens, targets=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


def size(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("hmt", [None, HMT])
def test_parameters_gradients_and_optimizer_are_exact(content, hmt):
    config = read_config(content, {"model.hmt": hmt, "model.tie_embeddings": hmt is None})
    model, optimizer = trained(config)
    with torch.device("meta"):
        found = fixed(make(config.model), config.train, 1)
    assert found.parameters == size(model.parameters())
    assert found.gradients == size(p.grad for p in model.parameters())
    assert found.optimizer == size(x for held in optimizer.state.values() for x in held.values())


@pytest.mark.parametrize("changed", [{"train.optimizer": "muon"}, {"train.sltrain": {"rank": 2}}])
def test_other_optimizers_are_exact(changed):
    config = read_config("tiny/titans_mag", SMALL | changed)
    model = make(config.model)
    if config.train.sltrain is not None:
        sltrain.apply(model, optim.hidden_matrices(model), config.train.sltrain, 0)
    optimizer = optim.make(model, config.train)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    model(tokens, targets=tokens).loss.backward()
    optimizer.step()
    with torch.device("meta"):
        found = fixed(make(config.model), config.train, 1)
    assert found.parameters == size(model.parameters())
    assert found.optimizer == size(x for held in optimizer.state.values() for x in held.values())
    assert "counted on shapes" in found.rule


def test_an_optimizer_that_looks_at_values_is_put_down_as_adamw():
    config = read_config("tiny/titans_mag", SMALL | {"train.optimizer": "spam"})
    with torch.device("meta"):
        found = fixed(make(config.model), config.train, 1)
    assert found.optimizer == 2 * found.gradients and "put down as" in found.rule


def test_a_share_of_fsdp_is_exact(content):
    """Three processes, that divide hardly any parameter; this one is the first, the others are pretended."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = read_config(content)
    model = make(config.model)
    with torch.device("meta"):
        found = fixed(make(config.model), config.train, 3)
    block = max(size(b.parameters()) for b in model.blocks)
    root = size(model.parameters()) - sum(size(b.parameters()) for b in model.blocks)
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (3,))
        for part in [*model.blocks, model]:
            fully_shard(part, mesh=mesh)
        shares = [p.to_local() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    assert found.parameters == found.gradients == size(shares)
    scalars = 4 * len(shares)  # AdamW counts the steps of each parameter
    assert found.optimizer == 2 * size(shares) + scalars
    assert (found.root, found.block) == (root, block)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "name", ["titans_lmm", "titans_mag", "gated_deltanet", "moneta", "transformer", "mom_gated_delta"]
)
def test_kept_activations_are_those_of_a_real_forward(name, bf16):
    """Exactly where both take one path. Attention over windows in float32 is another operation on a CPU, that keeps its
    products: there within a sixth."""
    config = read_config(f"tiny/{name}", SMALL | {"train.precision": "bf16" if bf16 else "fp32"})
    found = activations(config.model, config.train, ROWS, gpu=False).kept
    real = really_kept(config, ROWS, bf16)
    if bf16 or name not in ("titans_mag", "transformer"):
        assert found == real
    else:
        assert 5 / 6 <= found / real <= 1


PRODUCTS = [
    lambda x, w: torch.nn.functional.linear(torch.nn.functional.linear(x, w), w),
    lambda x, w: (x @ w).mm(w).matmul(w),
    lambda x, w: torch.bmm(x[None], w[None]) + torch.einsum("ij,jk->ik", x, w),
    lambda x, w: torch.addmm(x, x, w),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_autocast_of_shapes_is_that_of_a_processor(product):
    """The same results' dtypes and kept bytes; a weight that is used twice is cast once."""
    found = []
    for device, autocast in (("cpu", torch.autocast("cpu", torch.bfloat16)), ("meta", MetaAutocast(torch.bfloat16))):
        x = torch.ones(6, 6, device=device, requires_grad=True) + 0.0
        w = torch.ones(6, 6, device=device, requires_grad=True)
        kept = {}  # the tensors, so that no storage takes another's place

        def pack(t, kept=kept):
            kept[t.untyped_storage()._cdata] = t
            return t

        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = product(x, w)
        found.append((y.dtype, y.shape, sorted(t.untyped_storage().nbytes() for t in kept.values())))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["hcam", "hmt"])
def test_kept_activations_of_other_paths_are_near(name):
    """A processor rotates by other tables than a GPU, and reads tokens' values where it can: within a tenth."""
    config = read_config(f"tiny/{name}", SMALL | {"model.dim": 64, "train.seq_len": 96})
    found = activations(config.model, config.train, ROWS, gpu=False).kept
    assert 0.9 <= found / really_kept(config, ROWS) <= 1.1


def test_checkpointing_keeps_what_it_says():
    config = read_config("tiny/titans_lmm", SMALL)
    found = activations(config.model, config.train, ROWS, gpu=False, again=(0, 1))
    assert found.kept == really_kept(config, ROWS, checkpointing=True)
    assert found.parts["inputs"] == 2 * ROWS * LENGTH * 32 * 4
    whole = activations(config.model, config.train, ROWS, gpu=False)
    assert found.kept + found.working < whole.kept + whole.working
    assert found.working > max(whole.blocks)  # one block is there whole while it is run again


def test_a_gpu_keeps_what_the_kernels_keep(content, monkeypatch):
    """The kernels themselves, in Triton's interpreter. Around them a processor keeps a little more of the MLP and of
    rotations: within a tenth."""
    mixer = {"kind": "neural_memory", "memory": {"heads": 2, "chunk_size": 8}}
    config = read_config(content, {"model.mixer": mixer, "train.seq_len": 64, "model.layers": 1})
    found = activations(config.model, config.train, 1, gpu=True)
    plain = activations(config.model, config.train, 1, gpu=False)
    monkeypatch.setenv("PALIMPSEST_BACKEND", "triton")
    real = really_kept(config, 1)
    assert 0.9 <= found.kept / real <= 1.1
    assert abs(found.kept - real) < abs(plain.kept - real)


def test_working_memory_is_what_a_profiler_sees():
    """A transformer's peak, from every allocation of a real forward and backward; what operations take inside of
    themselves, of constant size, is in that alone: here a fifth at most."""
    config = read_config("tiny/transformer", SMALL | {"model.dim": 64, "train.seq_len": 96})
    for checkpointing in (False, True):
        found = activations(config.model, config.train, ROWS, gpu=False, again=(0, 1) if checkpointing else ())
        assert 0.8 <= (found.kept + found.working) / _allocated(config, checkpointing) <= 1


def _allocated(config, checkpointing: bool) -> int:
    model = make(config.model)
    if checkpointing:
        checkpoint_blocks(model.blocks)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tokens = torch.zeros(ROWS, config.train.seq_len, dtype=torch.int64)
    model(tokens, targets=tokens).loss_sum.backward()  # tables that stay are made here
    with warnings.catch_warnings(), torch.profiler.profile(profile_memory=True) as profiler:
        warnings.simplefilter("ignore")
        model(tokens, targets=tokens).loss_sum.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_a_plan_says_what_the_config_says(content, tmp_path):
    config = read_config(
        content,
        {"train.batch_size": 12, "train.micro_batch_size": 2, "train.parallel": "ddp", "train.precision": "bf16"}
        | {"data.folder": str(tmp_path / "corpus")},
    )
    found = plan(config, processes=3, gpu="A100", mfu=0.5)
    batch = found["batch"]
    assert (batch["micro_batches"], batch["sequences_per_micro_batch"]) == (2, 2)
    assert batch["tokens_per_update"] == 12 * 16 and batch["tokens"] == 12 * 16 * 16
    model = build({"model": MODEL})
    total = sum(p.numel() for p in model.parameters())
    assert found["parameters"]["total"] == total == sum(found["parameters"]["parts"].values())
    lines = {line["what"]: line["bytes"] for line in found["memory"]["lines"]}
    assert lines["parameters"] == lines["gradients"] == lines["DDP's buckets"] == 4 * total
    assert found["memory"]["total"] == sum(lines.values())
    flops = model.flops_per_token(16)
    assert found["flops"]["total"] == flops * 12 * 16 * 16
    speed = 0.5 * 312e12 * 3 / flops  # the A100's data sheet
    assert found["time"]["tokens_per_second"] == pytest.approx(speed)
    assert found["time"]["seconds"] == pytest.approx(12 * 16 * 16 / speed)
    assert found["corpus"]["reason"].startswith("not prepared")
    assert json.loads(json.dumps(found))["name"] == "tiny"
    shown = text(found)
    assert f"{total:,}" in shown and "ESTIMATED" in shown and "of 0.5 on 3 x A100 (312.0 TFLOP/s)" in shown
    assert "12 sequences = 3 processes (ddp) x 2 micro batches x 2 sequences of 16 tokens" in shown
    assert "recomputed: all 2 blocks run again" in shown


def test_a_plan_recomputes_the_blocks_that_the_run_does(content):
    keys = {"model.layers": 3, "train.seq_len": 64, "train.activation_checkpointing": True}
    budget = read_config(content, keys)
    rows = budget.train.micro_batches(1)[1]
    first = activations(budget.model, budget.train, rows, gpu=True, again=[1])  # a memory, which keeps the most
    for more, again in (({"train.recompute_every": 2}, [0, 2]), ({"train.activation_budget": first.peak / 2**30}, [1])):
        found = plan(read_config(content, keys | more))
        assert found["memory"]["recomputed_blocks"] == again and found["memory"]["checkpointing"]
        held = activations(budget.model, budget.train, rows, gpu=True, again=again)
        assert found["memory"]["activations"]["checkpointed"] == held.parts
        assert f"recomputed: blocks {', '.join(map(str, again))} run again" in text(found)


def test_a_plan_of_divided_sequences_is_of_the_first_process(content):
    """It holds a part of each sequence, of as many micro batches as there are processes to run ahead of."""
    keys = {"train.batch_size": 8, "train.micro_batch_size": 1, "train.seq_len": 96, "train.parallel": "ddp"}
    config = read_config(content, keys | {"train.sequence_parallel": 3})
    found = plan(config, processes=6)
    assert (found["batch"]["micro_batches"], found["batch"]["sequences_per_micro_batch"]) == (4, 1)
    part = activations(config.model, config.train, 1, gpu=True, seq_len=32)
    lines = {line["what"]: line for line in found["memory"]["lines"]}
    for name in ("mixers", "mlps"):
        assert lines[f"activations: {name}"]["bytes"] == 3 * part.parts[name]
    assert "3 micro batches of 1 x 32 tokens" in lines["activations: mixers"]["formula"]
    shown = text(found)
    assert "2 groups of 3 processes, a part of each sequence in each, (ddp) x 4 micro batches" in shown
    assert "of the first of 3 processes; what they hear of each other is not counted" in shown


def test_gradients_between_micro_batches_of_fsdp(content):
    """Shards alone, of replicas those that they have not summed up yet; whole tensors where sequences are divided."""
    total = 4 * sum(p.numel() for p in build({"model": MODEL}).parameters())
    for keys, processes, low, high in (
        ({}, 2, None, None),
        ({}, 4, None, None),  # one micro batch
        ({"train.fsdp_shard": 2, "train.batch_size": 8}, 4, 0.5 * total, 0.52 * total),
        ({"train.sequence_parallel": 2}, 2, total, total),
    ):
        config = read_config(content, {"train.micro_batch_size": 1, "train.parallel": "fsdp"} | keys)
        lines = {line["what"]: line["bytes"] for line in plan(config, processes=processes)["memory"]["lines"]}
        size = lines.get("FSDP's gradients of micro batches")
        assert size is None if low is None else low <= size <= high, (keys, size)


def test_learning_rates_are_those_of_training(content):
    config = read_config(content, {"train.steps": 100, "train.warmup_steps": 10, "train.lr": 1.0})
    rates = learning_rates(config)
    assert "train.lr=" in "\n".join(plan(config)["step_law"])
    assert list(rates) == [1, 10, 25, 50, 75, 100]
    assert rates[1] == pytest.approx(0.1) and rates[10] == 1.0 and rates[100] == pytest.approx(0.1)


def test_what_fits_is_told():
    memory = {"total": int(80e9), "total_checkpointed": int(70e9)}
    told = {name: (plain, again) for name, _, plain, again in fits({"memory": memory})}
    assert told["H100"] == (False, True) and told["H200"] == (True, True) and told["RTX4090"] == (False, False)


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_command_writes_its_json_alone(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = copy.copy(everything(tmp_path))
    assert main([str(config), "--dry-run"]) == 0
    assert everything(tmp_path) == before
    assert "nothing is trained" in capsys.readouterr().out
    assert main([str(config), "--dry-run", "--measure", "--json", "found.json"]) == 0
    after = everything(tmp_path)
    assert after.keys() - before.keys() == {tmp_path / "found.json"}
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["time"]["measured"]["tokens_per_second"] > 0
    assert "time on this processor, measured" in capsys.readouterr().out


def test_epochs_are_of_the_corpus_that_is_there(content, corpus):
    from palimpsest.train.data import prepare

    config = read_config(content)
    tokens = prepare(config.data).manifest["splits"]["train"]["tokens"]
    assert plan(config)["corpus"] == {"tokens": tokens, "epochs": 4 * 16 * 16 / tokens}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run", "--processes", "0"], "--processes was 0; it must be at least 1"),
        (["--dry-run", "--processes", "2"], "train.parallel was 'none' with --processes 2; it must be 'ddp' or 'fsdp'"),
        (["--dry-run", "--processes", "3", "train.parallel=ddp"], "train.batch_size was 4; it must be a multiple of"),
        (
            ["--dry-run", "--processes", "4", "train.parallel=fsdp", "train.fsdp_shard=3"],
            "train.fsdp_shard was 3; it must divide --processes 4",
        ),
        (["--dry-run", "--mfu", "1.5"], "--mfu was 1.5; it must be more than 0 and at most 1"),
        (["--dry-run", "--gpu", "V100"], "--gpu was 'V100'; it must be one of ['A100'"),
        (["--dry-run", "--json", "nowhere/a.json"], "--json was 'nowhere/a.json'; its folder must exist"),
        (["--mfu", "0.5"], "--mfu was 0.5; it must be left out without --dry-run"),
    ],
)
def test_what_is_refused(config, capsys, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(config), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_refusals_are_config_errors(content):
    foreign = {"model.hmt": HMT, "model.huggingface": {"model_type": "llama"}}
    with pytest.raises(ConfigError, match="model.huggingface was given; it must be null for a dry run"):
        plan(read_config(content, foreign))
    with pytest.raises(ConfigError, match="--processes was -1"):
        plan(read_config(content), processes=-1)
