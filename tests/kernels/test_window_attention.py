"""Window attention beyond conformance: borders of its blocks, caches, flash-attn's place, memory, bad input."""

import importlib.machinery
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, EXACT, Draw, assert_close, assert_same, leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton_checks import CLOSE, check_configurations

from palimpsest.kernels import window_attention
from palimpsest.kernels.launch import Config, forced
from palimpsest.kernels.window_attention import backward as by_keys
from palimpsest.kernels.window_attention import blocks as block_module
from palimpsest.kernels.window_attention import chunked, flash, fused, kept
from palimpsest.kernels.window_attention import forward as by_queries
from palimpsest.kernels.window_attention.blocks import blocks
from palimpsest.kernels.window_attention.cost import cost, pairs

DOCUMENTS = torch.tensor([0, 1, 70, 70, 200], dtype=torch.int32)


def draw(batch: int, length: int, heads: int = 2, shared: int = 2, seed: int = 0) -> list[Tensor]:
    source = Draw(seed, torch.float64)
    return [source.normal(batch, length, h, 8) for h in (heads, shared, shared)]


def gradients(backend: str, tensors: list[Tensor], **options: object) -> list[Tensor]:
    """Output, floating state and gradients of q, k, v, prefix and cache."""
    given = leaves([tensors, options.pop("prefix", None), options.pop("state", None)])
    (q, k, v), prefix, state = given
    o, after = window_attention(q, k, v, prefix=prefix, state=state, return_state=True, backend=backend, **options)
    found = [o, after["k"], after["v"]]
    weights = Draw(4, torch.float64)
    loss = sum((x * weights.normal(*x.shape).to(x.device)).sum() for x in found)
    wanted = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point()]
    return [*found, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@pytest.mark.parametrize("window", [None, 5, 64, 70])
@pytest.mark.parametrize("length", [65, 131])
def test_blocks_of_queries(window: int | None, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are at least 64 queries: lengths at and past their borders, with and without a prefix."""
    source = Draw(9, torch.float64)
    for prefix, shared in ((None, 2), (None, 1), ((source.normal(3, 1, 8), source.normal(3, 1, 8)), 1)):
        monkeypatch.setattr(kept, "WIDEST", 0)
        tensors = draw(2, length, 2, shared)
        found = gradients("torch", tensors, window=window, prefix=prefix)
        assert_close(found, gradients("reference", tensors, window=window, prefix=prefix), EXACT, f"{window} {length}")


@pytest.mark.parametrize("window", [None, 1, 5, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_kept_probabilities(window: int | None, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of short calls in training: windows inside of, at and across its blocks of 64 queries."""
    ran = []
    run = kept.window_attention
    monkeypatch.setattr(kept, "window_attention", lambda *args: ran.append(args) or run(*args))
    source = Draw(9, torch.float64)
    for prefix in (None, (source.normal(3, 2, 8), source.normal(3, 2, 8))):
        tensors, options = draw(2, length), {"window": window, "prefix": prefix, "scale": 0.7}
        found = gradients("torch", tensors, **options)
        assert ran, "the path must run"
        assert_close(found, gradients("reference", tensors, **options), EXACT, f"{window} {length}")


def test_probabilities_are_kept_where_few_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(length: int, heads: int = 2, grad: bool = True, dtype: torch.dtype = torch.float32, **options) -> bool:
        q, k, v = (x.to(dtype).requires_grad_(grad) for x in draw(1, length, heads))
        o, _ = window_attention(q, k, v, **options)
        return "Kept" in str(o.grad_fn)

    assert path(512) and path(1000, window=kept.WIDEST - kept.SIZE)
    assert not path(513) and not path(1000, window=kept.WIDEST - kept.SIZE + 1), "memory would not be linear"
    assert not path(64, heads=4) and not path(64, grad=False) and not path(64, dtype=torch.bfloat16)
    prefix = draw(1, 3)[1][0].float()
    assert path(509, prefix=(prefix, prefix)) and not path(510, prefix=(prefix, prefix))
    assert not path(64, cu_seqlens=torch.tensor([0, 64], dtype=torch.int32))
    monkeypatch.setattr(kept, "WIDEST", 63)
    assert not path(64)


@pytest.mark.parametrize("window", [None, 5, 64])
def test_blocks_of_packed_documents_and_caches(window: int | None) -> None:
    source = Draw(9, torch.float64)
    size = 4 if window == 5 else 9
    state = {
        "k": source.normal(4, size, 1, 8),
        "v": source.normal(4, size, 1, 8),
        "count": torch.tensor([0, 3, size, 2], dtype=torch.int32),
    }
    prefix = (source.normal(2, 1, 8), source.normal(2, 1, 8))
    for tensors, borders in ((draw(1, 200, 2, 1), DOCUMENTS), (draw(4, 100, 2, 1), None)):
        options = {"window": window, "prefix": prefix, "state": state, "cu_seqlens": borders}
        found = gradients("torch", tensors, **options)
        assert_close(
            found, gradients("reference", tensors, **options), EXACT, "packed" if borders is not None else "rows"
        )


def test_full_attention_is_scaled_dot_product_attention() -> None:
    q, k, v = draw(2, 33, 4, 2)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close([window_attention(q, k, v)[0]], [wanted], EXACT, "full")
    wanted = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True, scale=0.3).transpose(1, 2)
    assert_close([window_attention(q, k, v, scale=0.3)[0]], [wanted], EXACT, "scale")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_window_holds_exactly_its_tokens(backend: str) -> None:
    q, k, v = draw(1, 90)
    k.requires_grad_()
    for t in (3, 70, 89):
        o, _ = window_attention(q, k, v, window=7, backend=backend)
        (gradient,) = torch.autograd.grad(o[:, t].square().sum(), k)
        seen = gradient.abs().sum((0, 2, 3)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - 6), t + 1))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_row_with_count_zero_is_a_fresh_row(backend: str) -> None:
    """Whatever lies in slots that hold no token, NaN too, reaches nothing."""
    kind, close = (torch.float32, CLOSE) if backend == "triton" else (torch.float64, EXACT)
    q, k, v = (x.to(DEVICE, kind) for x in draw(3, 4))
    old_k, old_v = (Draw(s, kind).normal(3, 5, 2, 8).to(DEVICE) for s in (1, 2))
    old_k[1], old_v[1] = torch.nan, torch.nan
    old_k[2, :3], old_v[2, :3] = torch.inf, torch.nan
    state = {"k": old_k, "v": old_v, "count": torch.tensor([5, 0, 2], dtype=torch.int32, device=DEVICE)}
    found, after = window_attention(q, k, v, window=6, state=state, return_state=True, backend=backend)
    fresh, _ = window_attention(q[1:2], k[1:2], v[1:2], window=6, backend=backend)
    assert_close([found[1:2]], [fresh], close, "fresh row")
    short = {"k": old_k[2:, 3:], "v": old_v[2:, 3:], "count": torch.tensor([2], dtype=torch.int32, device=DEVICE)}
    shorter, _ = window_attention(q[2:], k[2:], v[2:], window=6, state=short, backend=backend)
    assert_close([found[2:]], [shorter], close, "row of two")
    assert after["count"].tolist() == [5, 4, 5]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_kernels_of_small_tiles(window: int | None, packed: bool) -> None:
    """Several blocks of everything: queries, keys, prefix and cache; spans of the prefix, too."""
    source = Draw(9, torch.float64)
    rows, caches = (1, 4) if packed else (2, 2)
    options = {
        "window": window,
        "prefix": (source.normal(19, 1, 8), source.normal(19, 1, 8)),
        "state": {
            "k": source.normal(caches, 21, 1, 8),
            "v": source.normal(caches, 21, 1, 8),
            "count": torch.tensor([17, 0, 5, 21][:caches], dtype=torch.int32),
        },
        "cu_seqlens": torch.tensor([0, 1, 30, 30, 45], dtype=torch.int32) if packed else None,
    }
    tensors = draw(rows, 45, 2, 1)
    wanted = gradients("reference", tensors, **options)
    kinds = {torch.float64: torch.float32, torch.int32: torch.int32}
    narrow = tree_map_only(Tensor, lambda x: x.to(DEVICE, kinds[x.dtype]), [tensors, options])
    small = Config((("BLOCK_M", 16), ("BLOCK_N", 16)))
    with pytest.MonkeyPatch.context() as patch, forced(by_queries.QUERIES, small), forced(by_keys.KEYS, small):
        patch.setattr(by_keys, "SPAN", 32)
        found = gradients("triton", narrow[0], **narrow[1])
    assert_close([x.cpu() for x in found], wanted, CLOSE, f"window {window}")


def test_every_configuration_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_queries, "LENGTH", 100)

    def call() -> None:
        q, k, v = (x.float().requires_grad_() for x in draw(1, 20, 2, 1))
        state = {"k": k.detach(), "v": v.detach(), "count": torch.tensor([20], dtype=torch.int32)}
        borders = torch.tensor([0, 20], dtype=torch.int32)
        extras = {"prefix": (k.detach()[0], v.detach()[0]), "state": state, "cu_seqlens": borders}
        window_attention(q, k, v, window=40, **extras, backend="triton")[0].sum().backward()

    check_configurations(call)


def test_heads_of_a_fused_projection_are_read_in_place() -> None:
    joined = Draw(3, torch.float32).normal(2, 9, 3 * 16).to(DEVICE)
    parts = [x.unflatten(-1, (2, 8)) for x in joined.split(16, -1)]
    assert all(by_queries.rows(x) is x for x in parts)
    assert by_queries.rows(parts[0][:, 1:]) is not parts[0][:, 1:]
    wanted = window_attention(*(x.contiguous() for x in parts), window=4, backend="triton")[0]
    assert_same([window_attention(*parts, window=4, backend="triton")[0]], [wanted], "views")


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^q.dtype was float64; it must be float32 or narrower for backend 'triton'"):
        window_attention(*(x.to(DEVICE) for x in draw(1, 4)), backend="triton")
    with pytest.raises(ValueError, match=r"^D of q was 136; it must be at most 128 for backend 'triton'"):
        window_attention(*(torch.zeros(1, 2, 1, 136, device=DEVICE) for _ in range(3)), backend="triton")


def test_by_default_existing_kernels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both could run: flash's for plain calls, Triton's with a prefix, or by argument."""
    q, k, v = (x.to(DEVICE, torch.float32) for x in draw(1, 5))
    called = []
    monkeypatch.setattr("palimpsest.kernels.op.backends.resolve", lambda *_: "triton")
    monkeypatch.setattr(flash, "choose", lambda *_, **__: lambda *_: called.append("flash") or q)
    launch = fused.forward.body
    monkeypatch.setattr(fused, "forward", lambda *args: called.append("triton") or launch(*args))
    window_attention(q, k, v)
    window_attention(q, k, v, prefix=(k[0], v[0]))
    window_attention(q, k, v, backend="triton")
    assert called == ["flash", "triton", "triton"]


def test_a_cache_longer_than_the_window_is_cut() -> None:
    q, k, v = draw(2, 3)
    old = {"k": Draw(1, torch.float64).normal(2, 9, 2, 8), "v": Draw(2, torch.float64).normal(2, 9, 2, 8)}
    long = old | {"count": torch.tensor([9, 2], dtype=torch.int32)}
    short = {name: x[:, 6:] for name, x in old.items()} | {"count": torch.tensor([3, 2], dtype=torch.int32)}
    found, wanted = (window_attention(q, k, v, window=4, state=s, return_state=True) for s in (long, short))
    assert_close([found[0]], [wanted[0]], EXACT, "outputs")
    assert_same(list(found[1].values()), list(wanted[1].values()), "states")
    assert found[1]["k"].shape[1] == 3


def test_memory_of_a_window_is_linear() -> None:
    """No tensor of forward or backward is larger than a small multiple of the inputs: nothing grows with T * T."""

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.largest = max([self.largest, *sizes])
            return result

    for borders in (None, torch.tensor([0, 900, 1000, 4096], dtype=torch.int32)):
        q, k, v = (x.requires_grad_() for x in draw(1, 4096))
        with Watch() as watch:
            # The registered operators hide their insides from a mode: call what they run.
            o, lse = chunked.forward.body(q, k, v, None, None, None, None, None, borders, 16, 0.3)
            chunked.backward.body(o, o, lse, q, k, v, None, None, None, None, None, borders, 16, 0.3)
        assert q.numel() <= watch.largest <= 2 * q.numel()


def test_blocks_touch_only_the_keys_they_need() -> None:
    q = torch.empty(1, 1000, 1, 8)
    taken = sum(b.columns.stop - b.columns.start for b in blocks(q, 1000, 32, 0, None))
    assert taken <= 1000 + 16 * 32


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("cached", [0, 3, 9])
def test_cost_counts_the_pairs_that_see_each_other(window: int | None, cached: int) -> None:
    for length in (1, 3, 12):
        seen = sum(min(cached + t + 1, window or cached + t + 1) + 2 for t in range(length))
        assert pairs(length, window, cached, prefix=2) == seen
        arguments = {"window": window, "prefix": 2, "cached": cached}
        assert cost((5, length, 4, 8), (5, length, 2, 8), **arguments).flops == 5 * 4 * seen * 4 * 8
        assert cost((5, length, 4, 8), (5, length, 2, 8), **arguments, backward=True).flops == 5 * 4 * seen * 10 * 8


class FlashAttention(types.ModuleType):
    """The package's two functions, by scaled_dot_product_attention."""

    __version__ = "2.8"

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)

    def flash_attn_func(self, q, k, v, softmax_scale, causal, window_size):  # type: ignore[no-untyped-def]
        assert causal and window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        return window_attention(q, k, v, window=window, scale=softmax_scale, backend="reference")[0]

    def flash_attn_varlen_func(self, q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size):  # type: ignore[no-untyped-def]
        assert causal and cu_q is cu_k and max_q == max_k == q.shape[0]
        window = None if window_size[0] < 0 else window_size[0] + 1
        options = {"window": window, "scale": softmax_scale, "cu_seqlens": cu_q, "backend": "reference"}
        return window_attention(q[None], k[None], v[None], **options)[0][0]


def test_kernels_of_a_gpu_are_chosen_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention())
    for everything in (False, True):
        for dtype in (torch.float16, torch.bfloat16):
            assert flash.choose(cuda, dtype, 64, everything).func is flash.flash_attention
        assert flash.choose(cpu, torch.bfloat16, 64, everything) is None
        other = flash.scaled_dot_product if everything else None
        assert flash.choose(cuda, torch.float32, 64, everything) is other
        assert flash.choose(cuda, torch.float16, 512, everything) is other
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    assert flash.choose(cuda, torch.bfloat16, 64, everything=False) is None
    assert flash.choose(cuda, torch.bfloat16, 64, everything=True) is flash.scaled_dot_product


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("borders", [None, torch.tensor([0, 3, 20], dtype=torch.int32)])
def test_kernels_of_a_gpu_are_given_the_same_call(
    monkeypatch: pytest.MonkeyPatch, window: int | None, borders: Tensor | None
) -> None:
    tensors = draw(1, 20, 4, 2)
    wanted = gradients("reference", tensors, window=window, cu_seqlens=borders)
    flash_attention = partial(flash.flash_attention, FlashAttention())
    everything = window is None and borders is None
    for run in [flash_attention, flash.scaled_dot_product] if everything else [flash_attention]:
        chosen = []
        monkeypatch.setattr(
            flash, "choose", lambda *_, run=run, chosen=chosen, everything: chosen.append(everything) or run
        )
        assert_close(gradients("torch", tensors, window=window, cu_seqlens=borders), wanted, EXACT, str(run))
        assert chosen == [everything]


def test_a_prefix_or_a_cache_stays_with_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flash, "choose", lambda *_, everything: pytest.fail("a prefix or cache cannot be expressed there")
    )
    q, k, v = draw(2, 4)
    state = {"k": k, "v": v, "count": torch.tensor([4, 4], dtype=torch.int32)}
    window_attention(q, k, v, prefix=(k[0], v[0]))
    window_attention(q, k, v, state=state)


def test_devices_without_a_kernel_compute_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on this device: block by block also without a window."""
    state = {"k": draw(2, 4)[1], "v": draw(2, 4)[2], "count": torch.tensor([4, 1], dtype=torch.int32)}
    prefix = (state["k"][0], state["v"][1])
    for tensors, options in (
        (draw(1, 300, 4, 2), {}),
        (draw(2, 90, 4, 2), {"window": 5, "state": state, "prefix": prefix}),
        (draw(2, 1, 4, 2), {"state": state | {"count": torch.tensor([4, 4], dtype=torch.int32)}}),
        (draw(1, 200, 4, 2), {"window": 5, "cu_seqlens": DOCUMENTS, "prefix": prefix}),
    ):
        wanted = gradients("reference", tensors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(block_module, "has_kernel", lambda device: False)
            assert_close(gradients("torch", tensors, **options), wanted, EXACT, str(options))


def bad(**change: object) -> dict[str, object]:
    q, k, v = draw(2, 4, 4, 2)
    return {"q": q, "k": k, "v": v} | change


def cache(rows: int = 2, size: int = 3, **change: object) -> dict[str, object]:
    whole = {name: torch.zeros(rows, size, 2, 8, dtype=torch.float64) for name in ("k", "v")}
    return whole | {"count": torch.zeros(rows, dtype=torch.int32)} | change


ZEROS = torch.zeros(2, 2, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"q": torch.zeros(2, 4, 8)}, "q.shape"),
        ({"q": torch.zeros(2, 0, 4, 8).double()}, "q.shape"),
        ({"q": torch.zeros(2, 4, 4, 8, dtype=torch.int64)}, "q.dtype"),
        ({"q": torch.zeros(2, 4, 3, 8).double()}, "H of q"),
        ({"k": torch.zeros(2, 5, 2, 8).double()}, "k.shape"),
        ({"k": torch.zeros(2, 4, 2, 8)}, "k.dtype"),
        ({"k": torch.zeros(2, 4, 2, 8, device="meta").double()}, "k.device"),
        ({"v": torch.zeros(2, 4, 1, 8).double()}, "v.shape"),
        ({"v": torch.zeros(2, 4, 2, 8)}, "v.dtype"),
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"scale": float("nan")}, "scale"),
        ({"prefix": torch.zeros(2)}, "prefix"),
        ({"prefix": (ZEROS[:, :1], ZEROS)}, r"prefix\[0\].shape"),
        ({"prefix": (ZEROS, ZEROS[:1])}, r"prefix\[1\].shape"),
        ({"prefix": (ZEROS, ZEROS.float())}, r"prefix\[1\].dtype"),
        ({"state": {"k": ZEROS}}, "state"),
        ({"state": cache(rows=3)}, r"state\['k'\].shape"),
        ({"state": cache(v=torch.zeros(2, 2, 2, 8).double())}, r"state\['v'\].shape"),
        ({"state": cache(v=torch.zeros(2, 3, 2, 8))}, r"state\['v'\].dtype"),
        ({"state": cache(count=torch.zeros(2))}, r"state\['count'\].dtype"),
        ({"state": cache(count=torch.tensor([0, 4], dtype=torch.int32))}, r"state\['count'\]"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "batch size with cu_seqlens"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        window_attention(**bad(**change))  # type: ignore[arg-type]
