"""Attention over chunks beyond conformance: against dense attention, in all its ways, its extremes, and bad input."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import DEVICE, EXACT, SINGLE, Draw, assert_close, assert_same
from host_reads import no_reads
from torch import Tensor
from triton_checks import check_configurations

from palimpsest.kernels import ChunkLayout, chunk_attention, select_chunks, window_attention
from palimpsest.kernels.chunk_attention import layout as layouts
from palimpsest.kernels.chunk_attention import operator
from palimpsest.kernels.launch import planning

NAMES = ("q", "k", "v", "summary_q", "summary_k")
WAYS = ("reference", "gather", "dense")
DOCUMENTS = (0, 0, 5, 6, 13, 23)
CHUNKS = (0, 3, 3, 5, 6, 8, 12, 13, 22, 23, 23)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def arguments(
    length: int = 23, chunks: int = 6, *, rows: int = 2, heads: int = 6, shared: int = 3, choosers: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Six query heads over three key heads, whose choice is made for three at a time: no two groups are the same."""
    draw = Draw(0, dtype)
    shapes = {
        "q": (rows, length, heads, 8),
        "k": (rows, length, shared, 8),
        "v": (rows, length, shared, 8),
        "summary_q": (rows, length, choosers, 4),
        "summary_k": (rows, chunks, choosers, 4),
    }
    return {name: draw.normal(*shape).to(DEVICE) for name, shape in shapes.items()}


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Output, selection and gradients of a call, in one of the two ways of plain torch or by a backend."""

    def call(way: str, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        monkeypatch.setattr(operator, "plain_way", lambda *_: way)
        inputs = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
        backend = "torch" if way in ("gather", "dense") else way
        o, chosen = chunk_attention(**inputs, **options, return_selection=True, backend=backend)
        weight = Draw(9, torch.float64).normal(*o.shape).to(o)
        gradients = torch.autograd.grad((o * weight).sum(), list(inputs.values()), materialize_grads=True)
        return [o.detach(), chosen, *gradients]

    return call


@pytest.mark.parametrize("layout", ["rows", "documents", "borders", "both"])
@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.parametrize("read", ["two_level", "union"])
def test_every_way_is_the_reference(go: Callable[..., list[Tensor]], layout: str, share: int, read: str) -> None:
    options: dict[str, Any] = {"top_k": 3, "share": share, "read": read}
    rows, chunks = (2, 6) if layout == "rows" else (1, 10)
    options |= {"cu_chunks": integers(*CHUNKS)} if layout in ("borders", "both") else {"chunk_size": 4}
    if layout in ("documents", "both"):
        options["cu_seqlens"] = integers(*DOCUMENTS)
    given = arguments(chunks=chunks, rows=rows)
    wanted = go("reference", given, **options)
    for way in WAYS[1:]:
        found = go(way, given, **options)
        assert_same([found[1]], [wanted[1]], f"{way}: selection")
        assert_close([found[0], *found[2:]], [wanted[0], *wanted[2:]], EXACT, way)


def dense(q: Tensor, k: Tensor, v: Tensor, summary_q: Tensor, summary_k: Tensor, size: int) -> Tensor:
    """Two-level attention over all completed chunks, straight from the definition, of one head."""
    length = q.shape[1]
    whole = torch.arange(length, device=q.device) // size
    count = summary_k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 8**-0.5
    scores = torch.cat([scores, scores.new_full((*scores.shape[:3], count * size - length), float("-inf"))], -1)
    inside = scores.unflatten(-1, (count, size)).softmax(-1)
    values = torch.cat([v, v.new_zeros(v.shape[0], count * size - length, *v.shape[2:])], 1)
    each = torch.einsum("bhtcj,bcjhd->bhtcd", inside, values.unflatten(1, (count, size)))
    relevance = torch.einsum("bthe,bche->bhtc", summary_q, summary_k) * 4**-0.5
    seen = torch.arange(count, device=q.device) < whole[:, None]
    weights = relevance.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhtc,bhtcd->bthd", weights, each)


@pytest.mark.parametrize("way", WAYS)
def test_with_all_chunks_it_is_dense_two_level_attention(go: Callable[..., list[Tensor]], way: str) -> None:
    given = arguments(heads=1, shared=1, choosers=1)
    found = go(way, given, top_k=6, chunk_size=4)
    inputs = {name: x.clone().requires_grad_() for name, x in given.items()}
    o = dense(*inputs.values(), 4)
    weight = Draw(9, torch.float64).normal(*o.shape).to(o)
    wanted = torch.autograd.grad((o * weight).sum(), list(inputs.values()))
    assert_close([found[0], *found[2:]], [o, *wanted], EXACT, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [1, 3, 8])
def test_a_union_of_all_chunks_is_causal_attention(go: Callable[..., list[Tensor]], way: str, share: int) -> None:
    given = arguments()
    found = go(way, given, top_k=6, chunk_size=4, read="union", share=share)
    q, k, v = (given[name].clone().requires_grad_() for name in "qkv")
    o, _ = window_attention(q, k, v, backend="torch")
    weight = Draw(9, torch.float64).normal(*o.shape).to(o)
    wanted = torch.autograd.grad((o * weight).sum(), (q, k, v))
    assert_close([found[0], *found[2:5]], [o, *wanted], EXACT, way)
    assert not found[5].any() and not found[6].any()


@pytest.mark.parametrize("way", ["gather", "dense"])
@pytest.mark.parametrize("read", ["two_level", "union"])
def test_gradients_are_those_of_finite_differences(way: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "plain_way", lambda *_: way)
    given = [x.requires_grad_() for x in arguments(9, 3, rows=1, heads=2, shared=1, choosers=1).values()]

    def function(*tensors: Tensor) -> Tensor:
        o = chunk_attention(*tensors, top_k=2, chunk_size=3, share=2, read=read, backend="torch")
        assert isinstance(o, Tensor)
        return o

    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_of_equal_chunks_the_lower_wins(backend: str) -> None:
    """Ties at zero, minus infinity and what is no number come last, and empty chunks are not chosen."""
    layout = ChunkLayout.borders(integers(0, 2, 4, 4, 6, 8, 10, 11), 11)
    queries, chunks = torch.ones(1, 11, 1, 4, device=DEVICE), torch.zeros(1, 7, 1, 4, device=DEVICE)
    chunks[0, 3] = 1
    chunks[0, 4] = float("-inf")
    chunks[0, 0] = float("nan")
    found = select_chunks(queries, chunks, layout, 4, backend=backend)[0, :, 0].tolist()
    assert found[0] == found[1] == [-1] * 4 and found[2] == [0, -1, -1, -1] and found[4] == [1, 0, -1, -1]
    assert found[6] == [3, 1, 0, -1] and found[8] == [3, 1, 0, 4] and found[10] == [3, 1, 5, 0]
    zeros = torch.stack([torch.zeros(4), -torch.zeros(4)]).repeat(4, 1)[:7].view(1, 7, 1, 4).to(DEVICE)
    assert select_chunks(queries, zeros, layout, 3, backend=backend)[0, 10, 0].tolist() == [0, 1, 3]
    assert select_chunks(queries, chunks, layout, 9, backend=backend)[0, 10, 0].tolist() == [3, 1, 5, 0, 4] + [-1] * 4


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_tree_finds_what_all_scores_find_when_it_keeps_enough(backend: str) -> None:
    """And with less it never sees a chunk that is not a candidate, whatever lies in it."""
    layout = ChunkLayout.packed(integers(0, 0, 5, 6, 40, 61), 61, 2, 3)
    draw = Draw(0, torch.float64)
    queries, chunks = draw.normal(1, 61, 2, 4).to(DEVICE), draw.normal(1, 35, 2, 4).to(DEVICE)
    every = select_chunks(queries, chunks, layout, 18, backend=backend)
    assert_same([select_chunks(queries, chunks, layout, 18, branching=3, backend=backend)], [every], "a wide beam")
    narrow = select_chunks(queries, chunks, layout, 2, branching=2, backend=backend)
    first, last = (x.view(1, 61, 1, 1) for x in (layout.first, layout.last))
    assert bool(((narrow < 0) | ((narrow >= first) & (narrow < last))).all())
    for t in (7, 30, 45):  # of another document, or complete later
        unseen = torch.arange(35, device=DEVICE)
        unseen = (unseen < layout.first[t]) | (unseen >= layout.last[t])
        moved = torch.where(unseen[:, None, None], 1e6, chunks)
        found = select_chunks(queries, moved, layout, 2, branching=2, backend=backend)
        assert_same([found[:, t]], [narrow[:, t]], f"query {t}")


def test_a_tree_scores_few_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes about as long per query whatever the memory's length: levels grow with its logarithm."""
    from palimpsest.kernels.chunk_attention import selection

    scored = []
    best = selection.best
    monkeypatch.setattr(selection, "best", lambda score, *rest: scored.append(score.shape[-1]) or best(score, *rest))
    for chunks in (16, 256):
        layout = ChunkLayout.cached(integers(2 * chunks - 1), 1, 2 * chunks, 2)
        draw = Draw(0, torch.float32)
        select_chunks(draw.normal(1, 1, 1, 4), draw.normal(1, chunks, 1, 4), layout, 2, branching=4, backend="torch")
    assert scored == [12] * 3 + [12] * 5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.parametrize("read", ["two_level", "union"])
def test_a_cached_memory_goes_on(go: Callable[..., list[Tensor]], way: str, share: int, read: str) -> None:
    """Cut anywhere, with a run's choice kept, it is the whole; slots that are not filled may be no numbers."""
    given, slots, size = arguments(19, 5), 24, 4
    whole, chosen, *_ = go(way, given, top_k=2, chunk_size=size, share=share, read=read)
    memory = {name: torch.full((2, slots, 3, 8), float("nan"), dtype=torch.float64, device=DEVICE) for name in "kv"}
    parts, kept = [], chosen[:, :0]
    for begin, stop in ((0, 5), (5, 6), (6, 7), (7, 13), (13, 19)):
        for name, x in memory.items():
            x[:, begin:stop] = given[name][:, begin:stop]
        layout = ChunkLayout.cached(integers(begin, begin), stop - begin, slots, size, share)
        summary_k = torch.zeros(2, 6, 2, 4, dtype=torch.float64, device=DEVICE)
        summary_k[:, : stop // size] = given["summary_k"][:, : stop // size]
        now = {name: given[name][:, begin:stop] for name in ("q", "summary_q")} | memory | {"summary_k": summary_k}
        own = select_chunks(now["summary_q"], summary_k, layout, 2)
        if begin % share:
            own[:, : share - begin % share] = kept[:, -1:]
        kept = own
        parts.append(go(way, now, top_k=2, layout=layout, read=read, selection=own)[0])
    assert_close([torch.cat(parts, 1)], [whole], EXACT, "cut")


def test_rows_of_unequal_pasts_in_one_row_of_queries() -> None:
    """Queries of documents packed into a row, each going on with a row of the memory."""
    given, size = arguments(19, 5), 4
    whole = chunk_attention(**given, top_k=2, chunk_size=size)
    layout = ChunkLayout.cached(integers(10, 16), 8, 19, size, cu_seqlens=integers(0, 5, 8))
    tokens = {
        name: torch.cat([given[name][:1, 10:15], given[name][1:, 16:]], 1) for name in ("q", "summary_q")
    }  # fmt: skip
    rest = {name: given[name] for name in ("k", "v", "summary_k")}
    for backend in ("reference", "torch"):
        o = chunk_attention(**tokens, **rest, top_k=2, layout=layout, backend=backend)
        assert_close([o], [torch.cat([whole[:1, 10:15], whole[1:, 16:]], 1)], EXACT, backend)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_attend_is_zero(go: Callable[..., list[Tensor]], way: str) -> None:
    given = arguments()
    for options in ({"share": 64}, {"selection": torch.full((2, 23, 2, 3), -1, dtype=torch.int32, device=DEVICE)}):
        o, _, *gradients = go(way, given, top_k=3, chunk_size=4, **options)
        assert not o.any() and not any(x.any() for x in gradients)
    alone = {name: x[:, :1] for name, x in given.items()}
    assert not go(way, alone, top_k=3, chunk_size=4)[0].any()


@pytest.mark.parametrize("read", ["two_level", "union"])
@pytest.mark.parametrize("layout", ["rows", "borders"])
def test_triton_in_all_its_forms(
    go: Callable[..., list[Tensor]], read: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of unequal sizes and shared choices; borders with chunks longer than a tile, and documents."""
    from palimpsest.kernels.chunk_attention import forward

    monkeypatch.setattr(forward, "LARGEST", 16)
    options: dict[str, Any] = {"top_k": 2, "share": 5, "read": read}
    if layout == "rows":
        given = arguments(13, 4, rows=1, dtype=torch.float32)
        options |= {"chunk_size": 4, "share": 3}
    else:
        given = arguments(44, 5, rows=1, heads=2, shared=1, choosers=1, dtype=torch.float32)
        options |= {"cu_chunks": integers(0, 3, 3, 21, 40, 44), "cu_seqlens": integers(0, 3, 44)}
    wanted, found = go("gather", given, **options), go("triton", given, **options)
    assert_same([found[1]], [wanted[1]], "selection")
    assert_close([found[0], *found[2:]], [wanted[0], *wanted[2:]], SINGLE, "triton")


@pytest.mark.parametrize("read", ["two_level", "union"])
def test_decoding_in_triton(go: Callable[..., list[Tensor]], read: str) -> None:
    """One query a row, in the middle of a run."""
    given = arguments(19, 5, dtype=torch.float32)
    layout = ChunkLayout.cached(integers(13, 18), 1, 19, 4, 8)
    now = {name: x[:, 13:14] if name in ("q", "summary_q") else x for name, x in given.items()}
    wanted, found = (go(way, now, top_k=2, layout=layout, read=read) for way in ("reference", "triton"))
    assert_same([found[1]], [wanted[1]], "selection")
    assert_close([found[0], *found[2:]], [wanted[0], *wanted[2:]], SINGLE, "triton")


@pytest.mark.parametrize("read, share", [("two_level", 4), ("union", 8)])
def test_every_configuration_is_right(read: str, share: int) -> None:
    def call() -> None:
        given = arguments(40, 4, rows=1, heads=2, shared=1, choosers=1, dtype=torch.float32)
        inputs = [x.requires_grad_() for x in given.values()]
        o = chunk_attention(*inputs, top_k=2, chunk_size=10, share=share, read=read, backend="triton")
        assert isinstance(o, Tensor)
        o.sum().backward()

    check_configurations(call)


@pytest.mark.parametrize("read", ["two_level", "union"])
@pytest.mark.parametrize("way", ["gather", "triton"])
def test_nothing_is_read_on_the_host(
    go: Callable[..., list[Tensor]], way: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels are planned, not interpreted: the interpreter reads. Borders are checked where they lie on a
    CPU, which is left out here."""
    monkeypatch.setattr(layouts, "_readable", lambda _: False)
    documents, chunks, start = integers(*DOCUMENTS), integers(*CHUNKS), integers(0)
    given = arguments(chunks=10, rows=1, dtype=torch.float32)
    makers = [
        lambda: ChunkLayout.packed(documents, 23, 4, 3),
        lambda: ChunkLayout.borders(chunks, 23, 3, documents, longest=9),
        lambda: ChunkLayout.cached(start, 23, 40, 4, 3),
    ]
    for i, make in enumerate(makers):
        if i == 2:
            given = given | {name: torch.zeros(1, 40, 3, 8, device=DEVICE) for name in "kv"}
        with no_reads(monkeypatch):
            options = {"layout": make(), "top_k": 3, "read": read}
            if way == "gather":
                go(way, given, **options)
            else:
                with planning() as plan:
                    go(way, given, **options)
                assert len(plan) == (7 if read == "two_level" else 4)


def test_memory_of_training_does_not_grow_with_the_square() -> None:
    """What is kept for the backward, over inputs and output, is a number per query, head and chosen chunk."""
    kept = []
    for length in (64, 128):
        given = [x.requires_grad_() for x in arguments(length, length // 4, rows=1).values()]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            chunk_attention(*given, top_k=3, chunk_size=4, share=16, backend="torch")
        kept.append(sum(sizes))
    assert kept[1] <= 2 * kept[0]


def test_the_short_memory_alone_is_dense() -> None:
    """Which way plain torch goes, by shapes."""
    for length, share, way in ((64, 1, "dense"), (64, 64, "gather"), (65536, 1, "gather")):
        q, k = (torch.empty(1, length, heads, 8) for heads in (2, 1))
        chunks, chosen = torch.empty(1, length // 4, 1, 4), torch.empty(1, length, 1, 2, dtype=torch.int32)
        layout = replace(ChunkLayout.regular(1, 4, 4, 1), share=share)
        assert operator.plain_way(q, k, chunks, chosen, layout) == way, (length, share)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"q": torch.zeros(2, 23, 6)}, "q.shape"),
        ({"q": torch.zeros(2, 0, 6, 8)}, "q.shape"),
        ({"q": torch.zeros(2, 23, 6, 8, dtype=torch.int64)}, "q.dtype"),
        ({"k": torch.zeros(2, 23, 4, 8)}, "H of q"),
        ({"k": torch.zeros(2, 22, 3, 8), "v": torch.zeros(2, 22, 3, 8)}, "k.shape"),
        ({"v": torch.zeros(2, 23, 3, 4)}, "v.shape"),
        ({"v": torch.zeros(2, 23, 3, 8).double()}, "v.dtype"),
        ({"summary_q": torch.zeros(2, 22, 2, 4)}, "summary_q.shape"),
        ({"summary_q": torch.zeros(2, 23, 4, 4), "summary_k": torch.zeros(2, 6, 4, 4)}, "H of q"),
        ({"summary_k": torch.zeros(2, 5, 2, 4)}, "summary_k.shape"),
        ({"summary_k": torch.zeros(1, 12, 2, 4)}, "summary_k.shape"),
        ({"summary_k": torch.zeros(2, 6, 2, 4, device="meta")}, "summary_k.device"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": None}, "chunk_size, cu_chunks, layout"),
        ({"layout": ChunkLayout.regular(2, 23, 4)}, "chunk_size, cu_chunks, layout"),
        ({"cu_chunks": integers(0, 23), "chunk_size": None}, "batch size with cu_chunks"),
        ({"cu_seqlens": integers(0, 23)}, "batch size with cu_seqlens"),
        ({"layout": ChunkLayout.regular(1, 23, 4), "chunk_size": None}, "summary_k.shape"),
        ({"layout": ChunkLayout.regular(2, 24, 4), "chunk_size": None}, "layout"),
        ({"layout": 4, "chunk_size": None}, "layout"),
        ({"read": "both"}, "read"),
        ({"share": 0}, "share"),
        ({"top_k": 0}, "top_k"),
        ({"scale": float("nan")}, "scale"),
        ({"summary_scale": float("inf")}, "summary_scale"),
        ({"selection": torch.zeros(2, 23, 2, 3)}, "selection.dtype"),
        ({"selection": torch.zeros(2, 23, 1, 3, dtype=torch.int32)}, "selection.shape"),
        ({"selection": torch.zeros(2, 23, 2, 0, dtype=torch.int32)}, "selection.shape"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], name: str) -> None:
    given: dict[str, Any] = {**arguments(dtype=torch.float32), "top_k": 3, "chunk_size": 4}
    given = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in given.items()}
    with pytest.raises(ValueError, match=f"^{name}"):
        chunk_attention(**(given | change))


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: ChunkLayout.borders(integers(0, 3, 2, 5), 5), "cu_chunks"),
        (lambda: ChunkLayout.borders(integers(0, 3), 5), "cu_chunks"),
        (lambda: ChunkLayout.borders(integers(0), 5), "cu_chunks.shape"),
        (lambda: ChunkLayout.borders(integers(0, 5).long(), 5), "cu_chunks.dtype"),
        (lambda: ChunkLayout.borders(integers(0, 5), 5, longest=-1), "longest"),
        (lambda: ChunkLayout.cached(integers(3, 9), 4, 12, 4), "start"),
        (lambda: ChunkLayout.cached(integers(3).long(), 4, 12, 4), "start.dtype"),
        (lambda: ChunkLayout.packed(integers(0, 5), 5, 4, 0), "share"),
    ],
)
def test_bad_layouts_are_named(make: Callable[[], ChunkLayout], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        make()


@pytest.mark.parametrize(
    "change, name",
    [
        ({"dtype": torch.float64}, "q.dtype was float64; it must be float32 or narrower"),
        ({"width": 129}, "D of q was 129; it must be at most 128"),
        ({"size": 129}, "E of summary_q was 129; it must be at most 128"),
        ({"top_k": 65}, "top_k was 65; it must be at most 64"),
    ],
)
def test_what_the_kernels_do_not_cover(change: dict[str, Any], name: str) -> None:
    known = {"dtype": torch.float32, "width": 8, "size": 4, "top_k": 1} | change
    shapes = [(1, 4, 1, known["width"])] * 3 + [(1, 4, 1, known["size"]), (1, 2, 1, known["size"])]
    tensors = [torch.zeros(shape, dtype=known["dtype"], device=DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match=f"^{name}"):
        chosen = torch.zeros(1, 4, 1, known["top_k"], dtype=torch.int32, device=DEVICE)
        chunk_attention(*tensors, top_k=1, chunk_size=2, selection=chosen, backend="triton")
    with pytest.raises(ValueError, match="^branching was 2; it must be None"):
        small = torch.zeros(1, 4, 1, 4, device=DEVICE)
        select_chunks(small, small, ChunkLayout.regular(1, 4, 1, device=DEVICE), 1, branching=2, backend="triton")
