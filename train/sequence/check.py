"""Are divided sequences those of one process? Every mixer, in float64, against the same model in one process."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models import MemoryLM, ModelConfig, Output
from ...models.config import validate
from ...models.lm import make
from .. import parallel
from ..split import Batch
from .division import Division, link
from .link import Link

DIM = 8
_MEMORY = {"heads": 2, "chunk_size": 5, "expansion": 2, "conv": 3}
_HCAM = {"kind": "hcam", "heads": 2, "window": 4, "chunk_size": 3, "top_k": 2}
_MIXTURE = {"kind": "mixture", "heads": 2, "memories": 3, "top_k": 2, "conv": 3, "chunk_size": 5}
_ONE = {**_MIXTURE, "memories": 1, "top_k": 1, "shared": False, "balance_weight": 0}
_MUON = {"rule": "muon", "window": 3, "features": {"degree": 2}}
_LACT = {"chunk_size": 6, "conv": 0, "network": "gated_mlp", "norm": False, "residual": False, "bias": "dot"}
_LACT |= {"retention": "norm", "rule": "muon_gd", "ns_steps": 2}

CASES: dict[str, Any] = {
    "attention": {"kind": "attention", "heads": 2, "persistent": 2},
    "window_attention": {"kind": "window_attention", "heads": 4, "kv_heads": 2, "window": 4, "persistent": 3},
    "window_attention, longer than a part": {"kind": "window_attention", "heads": 2, "window": 15},
    "neural_memory": {"kind": "neural_memory", "memory": _MEMORY},
    "neural_memory, Omega and Muon": {"kind": "neural_memory", "memory": {**_MEMORY, **_MUON}},
    "titans_mac": {"kind": "titans_mac", "heads": 2, "segment": 7, "persistent": 2, "memory": _MEMORY},
    "titans_mag": {"kind": "titans_mag", "heads": 2, "window": 4, "persistent": 2, "memory": _MEMORY},
    "titans_mal": {"kind": "titans_mal", "heads": 2, "window": 9, "persistent": 2, "memory": _MEMORY},
    "lact": {"kind": "lact", "heads": 4, "window": 4, "memory": {**_MEMORY, **_LACT}},
    "tnt": {
        "kind": "tnt",
        "shard": 6,
        "memory": {**_MEMORY, "chunk_size": 8},
        "local": {"chunk_size": 2, "expansion": 2, "rule": "gd"},
    },
    "delta rule": {**_ONE, "rule": "delta"},
    "gated delta rule": {**_ONE, "rule": "gated_delta"},
    "linear attention with decay (Mamba-2)": {**_ONE, "rule": "linear_attention"},
    "mixture of gated delta rules": {**_MIXTURE, "router_z_weight": 0.02, "balance_weight": 0.05},
    "mixture of linear attentions": {**_MIXTURE, "rule": "linear_attention", "projections": "shared"},
    "mixture of neural memories": {**_MIXTURE, "rule": "neural", "memory": {"chunk_size": 5, "expansion": 2}},
    "hcam": {**_HCAM, "share": 4, "persistent": 2, "combine": "gate", "scorer": {"kind": "landmark"}},
    "hcam with a bank": {**_HCAM, "bank": {"capacity": 3, "page": 2}},
    "hcam, cut by surprise": {**_HCAM, "chunk_size": 5, "cut": {"gamma": 0.2, "window": 4, "least": 2}},
    "block_union": {"kind": "block_union", "heads": 4, "kv_heads": 2, "chunk_size": 4, "top_k": 1, "share": 3},
    "hcam and titans in turns": [{"kind": "neural_memory", "memory": _MEMORY}, _HCAM],
    "hmt": {"kind": "attention", "heads": 2, "hmt": {"segment": 5, "sensory": 2, "memories": 3, "bptt": 2}},
}
"""``mixer`` sections of small models, of two layers each; chunks, windows and segments end at different tokens."""


@dataclass(frozen=True)
class Result:
    """What one case gave: the difference of the tokens' losses, and the largest of any parameter's gradient, each in
    root mean square and relative to that of one process (of a gradient much smaller than others: to a thousandth of the
    largest one, by whose rounding it is off); bytes that all processes sent, of a forward and a backward; slots of the
    longest process, and slots that a process worked."""

    outputs: float
    gradients: float
    bytes: int
    slots: int
    worked: int


def section(case: Any) -> dict[str, Any]:
    """The ``model`` section of a case; weights far larger than usual, so that every path carries signal."""
    mixer = dict(case) if isinstance(case, Mapping) else case
    parts = {"hmt": mixer.pop("hmt")} if isinstance(mixer, dict) and "hmt" in mixer else {}
    size = {"vocab_size": 11, "dim": DIM, "layers": 2, "ffn_hidden": 16, "init_std": 0.4}
    return {**size, "mixer": mixer, **parts}


class _Loop:
    """As much of the loop as a division looks for."""

    def __init__(self, division: Division, micro_batches: int) -> None:
        self.division, self.micro_batches, self.autocast = division, micro_batches, nullcontext()

    def forward(self, batch: Batch) -> Output:
        """See :meth:`palimpsest.train.loop.Run.forward`."""
        return self.division.read(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets)

    def objective(self, output: Output, valid: int) -> Tensor:
        """See :meth:`palimpsest.train.loop.Run.objective`."""
        assert output.loss_sum is not None
        # As where the processes of the link are all there are, and their mean is taken.
        return output.loss_sum * (self.division.link.size / valid) + sum(output.aux.values()) / self.micro_batches


def packed(length: int) -> list[list[int]]:
    """Borders of documents for rows of ``length`` tokens: first a short document and one that is longer than several
    parts; then several in the first part, a border in the middle, where parts meet, and some near the end."""
    near, far = {0, 1, length // 8, length}, {0, length // 11, length // 5, length // 2, length - 4, length - 3, length}
    return [sorted(near), sorted(x for x in far if x >= 0)]


def compare(
    case: Any,
    link: Link,
    *,
    length: int,
    micro_batches: int = 2,
    documents: Sequence[Sequence[int]] = (),
    **options: bool,
) -> Result | None:
    """A case, divided among the processes of a link and in its first process alone; None in the others.

    Rows, one a micro batch, have ``length`` tokens. ``documents``: borders of those packed into a row, for the rows in
    turns; none: rows without. ``options``: of :class:`.division.Division`.
    """
    torch.manual_seed(3)
    model = make(validate(ModelConfig, section(case))).double()
    batches = _batches(micro_batches, length, documents)
    divided = copy.deepcopy(model)
    division = Division(divided, divided, link, length, **options)
    division.everyone = link.groups[0]  # others may be busy with another case
    link.clock = link.worked = link.bytes = 0
    parts = [division.cut(batch) for batch in batches]
    division.gradients(cast(Any, _Loop(division, micro_batches)), parts, micro_batches * length)
    done = torch.tensor([link.clock, link.worked, link.bytes])
    with torch.no_grad():
        losses = [_losses(division.read, part) for part in parts]
    link.flush()
    joined = _joined(link, torch.cat(losses), division, micro_batches)
    clocks = [torch.zeros_like(done) for _ in link.ranks] if link.rank == 0 else None
    dist.gather(done, clocks, dst=link.ranks[0], group=link.groups[0])
    if clocks is None:
        return None
    expected, grads = alone(model, batches)
    pairs = zip(divided.parameters(), grads, strict=True)
    least = max(_size(grad) for grad in grads) / 1000
    worst = max(_gap(p.grad, grad, least) for p, grad in pairs if p.grad is not None)
    slots = int(max(clock[0] for clock in clocks))
    sent = int(sum(clock[2] for clock in clocks))
    return Result(_gap(joined, expected), worst, sent, slots, int(done[1]))


def _batches(count: int, length: int, documents: Sequence[Sequence[int]]) -> list[Batch]:
    draw = torch.Generator().manual_seed(5)
    tokens, targets = torch.randint(0, 11, (2, count, length), generator=draw)
    cuts = [torch.tensor(row, dtype=torch.int32) for row in documents]
    rows = [Batch(tokens[i : i + 1], targets[i : i + 1]) for i in range(count)]
    return [row._replace(cu_seqlens=cuts[i % len(cuts)]) for i, row in enumerate(rows)] if cuts else rows


def alone(model: MemoryLM, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Losses [B, T] and the gradient of every parameter, in one process."""
    losses = []
    valid = sum(batch.targets.numel() for batch in batches)
    for batch in batches:
        output = model(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets)
        (output.loss_sum / valid + sum(output.aux.values()) / len(batches)).backward()
        with torch.no_grad():
            losses.append(_losses(model, batch))
    parameters: list[nn.Parameter] = list(model.parameters())
    return torch.cat(losses), [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def _losses(read: Callable[..., Output], batch: Batch) -> Tensor:
    """−log p of each target [B, T]."""
    loss = read(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets, reduction="none").loss
    assert loss is not None  # it is there whenever there are targets
    return loss


def _joined(link: Link, part: Tensor, division: Division, rows: int) -> Tensor:
    """The parts of all processes side by side, in the first."""
    whole = part.new_zeros(rows, division.length)
    begin = link.rank * division.length // link.size
    whole[:, begin : begin + part.shape[1]] = part
    dist.reduce(whole, link.ranks[0], group=link.groups[0])
    return whole


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _gap(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    """RMS of the difference over RMS of b, or over ``least`` where that is more."""
    return _size(a - b) / max(_size(b), least)


def work(cases: Mapping[str, Any], size: int, **options: Any) -> dict[str, Result]:
    """Run cases in the processes of a world that has been started, in groups of ``size`` that take them in turns; the
    results, in every process."""
    world = parallel.World(*parallel.rank_and_size(), torch.device("cpu"))
    mine = world.rank // size
    own = link(range(mine * size, (mine + 1) * size), world, timedelta(minutes=1))
    found: dict[str, Result | None] = {}
    for i, (name, case) in enumerate(cases.items()):
        if i % (world.size // size) == mine:
            found[name] = compare(case, own, **options)
    every = {name: x for part in parallel.gather(found) for name, x in part.items() if x is not None}
    return {name: every[name] for name in cases if name in every}


def process(rank: int, size: int, port: int, cases: Mapping[str, Any], length: int, answers: Any) -> None:
    """One of ``size`` processes of this machine that meet at a port; the first puts the results into a queue: of each
    case that of rows, and that of packed documents."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    plain = work(cases, size, length=length, micro_batches=1)
    documents = work(cases, size, length=length, documents=packed(length))
    if world.first:
        answers.put({name: (plain[name], documents[name]) for name in cases})
    parallel.stop(world)
