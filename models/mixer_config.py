"""The configuration of every token mixer, by its ``kind``."""

from dataclasses import fields
from typing import Annotated, Literal, Union

from pydantic import Field, model_validator
from typing_extensions import Self

from ..kernels.neural_memory.spec import MemorySpec
from .strict import Count, Positive, Strict


class MemoryRule(Strict):
    """A neural memory: its network, its inner loss, what it keeps and how it learns; see
    :class:`palimpsest.kernels.neural_memory.MemorySpec` for the meaning of every key.

    ``depth``, ``norm`` and ``residual``: null takes the network's default (mlp and gated_mlp: 2, true, true; linear: 1,
    false, false).
    ``half_life``: in how many tokens a memory halves at the start of training, [least, most] of its heads; null takes
    [7000, 70000] for a memory with a LayerNorm, whose gradient explodes over many of them, else [700, 7000].
    ``step_max`` bounds depth times the effective step of one chunk, sum of theta / (1 - eta), at every chunk length.
    """

    network: Literal["mlp", "linear", "gated_mlp"] = "mlp"
    depth: Count | None = None
    expansion: Count = 4
    norm: bool | None = None
    residual: bool | None = None
    bias: Literal["l2", "dot", "lp", "huber"] = "l2"
    retention: Literal["l2", "none", "lq", "kl", "norm"] = "l2"
    rule: Literal["momentum", "gd", "muon", "muon_gd"] = "momentum"
    chunk_size: Count = 64
    read_after_write: bool = True
    window: Count = 1
    ns_every: Count | None = None
    ns_steps: Count = 5
    lp_power: Annotated[float, Field(ge=1)] = 3.0
    lp_sharpness: Positive = 10.0
    lp_smoothing: Positive = 1e-6
    lq_power: Annotated[float, Field(ge=2)] = 4.0
    gates: Literal["head", "channel"] = "head"
    half_life: tuple[Positive, Positive] | None = None
    step_max: Positive = 2.0

    @property
    def start_half_life(self) -> tuple[float, float]:
        """``half_life``, or the network's default."""
        return self.half_life or ((7e3, 7e4) if self.spec.norm else (7e2, 7e3))

    @property
    def spec(self) -> MemorySpec:
        """The part of this section that the operation takes."""
        known = type(self).model_fields
        return MemorySpec(
            **{field.name: getattr(self, field.name) for field in fields(MemorySpec) if field.name in known}
        )

    @model_validator(mode="after")
    def _fits_the_operation(self) -> Self:
        _ = self.spec  # names the field that the operation would refuse
        if self.half_life is not None:
            was = f"half_life was {list(self.half_life)}"
            if self.half_life[0] > self.half_life[1]:
                raise ValueError(f"{was}; the first number must not exceed the second")
            if not self.spec.retention_gate:
                raise ValueError(f"{was}; it must be null, for nothing decays with retention {self.retention!r}")
        return self


class Features(Strict):
    """A feature map on a memory's queries and keys (ATLAS): a ``polynomial`` of ``degree`` with learnt coefficients, of
    every channel or (``width``) of random projections to so many channels; ``exp``; or ``identity``.
    """

    kind: Literal["polynomial", "exp", "identity"] = "polynomial"
    degree: Annotated[int, Field(ge=1, le=8)] = 2
    width: Count | None = None

    @model_validator(mode="after")
    def _width_is_a_sketch(self) -> Self:
        if self.width is not None and self.kind != "polynomial":
            raise ValueError(f"width was {self.width}; it must be null for the features {self.kind}")
        if self.width is not None and self.width < self.degree:
            raise ValueError(f"width was {self.width}; it must be at least degree = {self.degree}")
        return self


class MemoryConfig(MemoryRule):
    """A neural memory and the layer around it (Titans, section 4.4). Head width is ``dim // heads``.

    ``conv`` is the width of the short causal convolution on q, k and v (0: none). ``features`` (null: none): a feature
    map on q and k.
    """

    heads: Count = 4
    conv: Annotated[int, Field(ge=0, le=16)] = 4
    output_gate: Literal["silu", "none"] = "silu"
    features: Features | None = None

    @model_validator(mode="after")
    def _widths_meet(self) -> Self:
        if self.features is not None and self.features.width is not None and self.spec.residual:
            raise ValueError(f"width of features was {self.features.width}; with residual: true it must be null")
        return self


class Heads(Strict):
    """Attention heads; ``kv_heads`` (null: as many as heads) divides ``heads``; ``rope`` turns rotary embedding on."""

    heads: Count = 4
    kv_heads: Count | None = None
    rope: bool = True

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Self:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads was {self.kv_heads}; it must divide heads = {self.heads}")
        return self


class Attention(Heads):
    """Full causal attention."""

    kind: Literal["attention"] = "attention"
    persistent: Annotated[int, Field(ge=0)] = 0


class WindowAttention(Heads):
    """Sliding-window attention over the last ``window`` tokens and ``persistent`` learnt tokens."""

    kind: Literal["window_attention"] = "window_attention"
    window: Count = 256
    persistent: Annotated[int, Field(ge=0)] = 0


class NeuralMemory(Strict):
    """Titans LMM: the memory layer alone."""

    kind: Literal["neural_memory"] = "neural_memory"
    memory: MemoryConfig = MemoryConfig()


class TitansMAC(Heads):
    """Titans MAC: memory as context, in segments of ``segment`` tokens (Titans, eqs. 21-25)."""

    kind: Literal["titans_mac"] = "titans_mac"
    segment: Count = 128
    persistent: Annotated[int, Field(ge=0)] = 4
    gate: Literal["sigmoid", "silu"] = "sigmoid"
    memory: MemoryConfig = MemoryConfig()


class TitansMAG(Heads):
    """Titans MAG: memory as a gate on sliding-window attention (Titans, eqs. 26-28)."""

    kind: Literal["titans_mag"] = "titans_mag"
    window: Count = 256
    persistent: Annotated[int, Field(ge=0)] = 4
    gate: Literal["sigmoid", "silu"] = "sigmoid"
    memory: MemoryConfig = MemoryConfig()


class TitansMAL(Heads):
    """Titans MAL: memory as a layer before sliding-window attention (Titans, eqs. 29-31)."""

    kind: Literal["titans_mal"] = "titans_mal"
    window: Count = 256
    persistent: Annotated[int, Field(ge=0)] = 4
    memory: MemoryConfig = MemoryConfig()


class LaCT(Heads):
    """A memory written in large chunks, and attention over the last ``window`` tokens with the same q, k and v, summed
    (LaCT, Zhang et al., 2025). ``heads`` are those of the attention."""

    kind: Literal["lact"] = "lact"
    window: Count = 256
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def _keys_are_shared(self) -> Self:
        if self.kv_heads not in (None, self.heads):
            raise ValueError(f"kv_heads was {self.kv_heads}; it must be null: the memory has a key for every query")
        return self


class TNT(Strict):
    """A memory in large chunks over the whole sequence, and a ``local`` one in small chunks that begins anew every
    ``shard`` tokens, so that shards run at once (TNT, Li et al., 2025).

    ``span``: the local memory is read with its queries mapped to the span of the shard's keys so far.
    """

    kind: Literal["tnt"] = "tnt"
    memory: MemoryConfig = MemoryConfig(chunk_size=512)
    local: MemoryRule = MemoryRule(chunk_size=16)
    shard: Count = 2048
    span: bool = True

    @model_validator(mode="after")
    def _shapes_meet(self) -> Self:
        if self.memory.features is not None:
            raise ValueError("features of memory was a section; it must be null in tnt")
        return self


class Mixture(Strict):
    """Mixture of memories: each token goes to ``top_k`` of ``memories``, and with ``shared`` to one more. A lone memory
    with none shared is a plain layer of its rule.

    ``rule`` is that of every memory; ``memory`` describes it for the rule neural, and is null for the others, which
    work in chunks of ``chunk_size`` tokens. ``projections``: k, v and the gates from matrices of each memory's own, or
    from one for all. ``balance_weight`` and ``router_z_weight`` weigh the router's losses in training.
    """

    kind: Literal["mixture"] = "mixture"
    rule: Literal["gated_delta", "delta", "linear_attention", "neural"] = "gated_delta"
    heads: Count = 4
    memories: Annotated[int, Field(ge=1, le=64)] = 4
    top_k: Annotated[int, Field(ge=1, le=8)] = 2
    shared: bool = True
    projections: Literal["per_memory", "shared"] = "per_memory"
    conv: Annotated[int, Field(ge=0, le=16)] = 4
    chunk_size: Count = 64
    output_gate: Literal["silu", "none"] = "silu"
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    router_z_weight: Annotated[float, Field(ge=0)] = 0.0
    memory: MemoryRule | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.memories:
            raise ValueError(f"top_k was {self.top_k}; it must be at most memories = {self.memories}")
        if (self.memory is None) == (self.rule == "neural"):
            must = "be given for the rule neural" if self.memory is None else f"be null for the rule {self.rule}"
            raise ValueError(f"memory was {'null' if self.memory is None else 'a section'}; it must {must}")
        return self


class Scorer(Strict):
    """How a chunk of tokens becomes one summary: their ``mean``; the mean of the ``tokens`` that the chunk's own later
    tokens attend to most (``representative``); a small network over windows of ``width`` tokens at every ``stride``
    (``strided_mlp``); what a learnt token reads from the chunk (``landmark``).
    """

    kind: Literal["mean", "representative", "strided_mlp", "landmark"] = "mean"
    tokens: Count = 4
    width: Count = 8
    stride: Count = 4


class Bank(Strict):
    """What is kept of a stream: at most ``capacity`` chunks, on the ``cpu`` or where the model is.

    ``write``: every chunk, or with ``surprise`` those whose summary's cosine similarity to the most similar one kept is
    below 1 - ``threshold``. ``evict``, when the bank is full: the chunk written first, the one not read for longest, or
    the one read with the least weight per token since it was written. Chunks lie in pages of ``page``; ``near`` of them
    stay on the model's device once read, and the ``ahead`` next best are brought there with those that are read.
    """

    capacity: Count
    write: Literal["every", "surprise"] = "every"
    threshold: Annotated[float, Field(ge=0, lt=2)] = 0.1
    evict: Literal["fifo", "lru", "least_relevant"] = "fifo"
    device: Literal["cpu", "model"] = "cpu"
    page: Count = 16
    near: Count = 256
    ahead: Annotated[int, Field(ge=0)] = 4


class Cut(Strict):
    """Chunks that end where a token surprises: where -log p of its key, given those of the last ``window`` tokens, is
    ``gamma`` standard deviations above its mean over these; then moved back to where the keys fall apart best. They
    have at least ``least`` tokens and at most the memory's chunk_size.
    """

    gamma: Annotated[float, Field(ge=0)] = 1.0
    window: Annotated[int, Field(ge=2)] = 32
    least: Count = 8


class ChunkMemory(Heads):
    """A memory of the past in chunks of ``chunk_size`` tokens, of which a token reads the ``top_k`` best.

    ``share``: so many consecutive tokens read the chunks that the first of them chooses. ``branching`` (null: none):
    choosing goes down a tree of means of so many summaries. ``bank`` (null: all is kept, where the model is): what is
    kept when a state is carried from call to call; a call without one reads all of its own tokens. ``cut`` (null: all
    chunks have ``chunk_size`` tokens): where chunks end.
    """

    chunk_size: Count = 32
    top_k: Count = 8
    share: Count = 1
    branching: Annotated[int, Field(ge=2)] | None = None
    scorer: Scorer = Scorer()
    bank: Bank | None = None
    cut: Cut | None = None

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.bank is not None and self.chunk_size % self.share:
            was = self.share
            raise ValueError(f"share was {was}; with a bank it must divide chunk_size = {self.chunk_size}")
        if self.cut is not None:
            least = self.cut.least
            if least > self.chunk_size:
                raise ValueError(f"least of cut was {least}; it must be at most chunk_size = {self.chunk_size}")
            if self.share > 1:
                raise ValueError(f"share was {self.share}; with cut it must be 1")
            if self.bank is not None:
                raise ValueError("bank was a section; with cut it must be null")
        if self.scorer.kind == "strided_mlp" and self.scorer.width > self.chunk_size:
            was = self.scorer.width
            raise ValueError(f"width of scorer was {was}; it must be at most chunk_size = {self.chunk_size}")
        return self


class HCAM(ChunkMemory):
    """Local attention over ``window`` tokens, then two-level attention over chunks (HCAM, Lampinen et al., 2021).

    ``selectors`` heads choose chunks, each for heads / selectors heads, by keys of ``selection_width`` (null: the head
    width). ``combine``: what the memory says is added, or first goes through a gate per head. ``detach``: no gradient
    into what is remembered, as in the paper.
    """

    kind: Literal["hcam"] = "hcam"
    window: Count = 64
    persistent: Annotated[int, Field(ge=0)] = 0
    selectors: Count = 1
    selection_width: Count | None = None
    combine: Literal["residual", "gate"] = "residual"
    detach: bool = False

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if self.heads % self.selectors:
            raise ValueError(f"selectors was {self.selectors}; it must divide heads = {self.heads}")
        if self.top_k < 2:
            must = "be at least 2: the weight of a lone chunk is 1 and teaches nothing about choosing"
            raise ValueError(f"top_k was {self.top_k}; it must {must}")
        return self


class BlockUnion(ChunkMemory):
    """One softmax over all tokens of the chosen chunks and of the token's own chunk (MoBA, Lu et al., 2025)."""

    kind: Literal["block_union"] = "block_union"

    @model_validator(mode="after")
    def _nothing_to_learn(self) -> Self:
        if self.scorer.kind not in ("mean", "representative"):
            must = "be mean or representative: no gradient reaches a summary that only chooses"
            raise ValueError(f"kind of scorer was {self.scorer.kind!r}; it must {must}")
        return self


MixerConfig = Annotated[
    Union[  # noqa: UP007
        Attention,
        WindowAttention,
        NeuralMemory,
        TitansMAC,
        TitansMAG,
        TitansMAL,
        LaCT,
        TNT,
        Mixture,
        HCAM,
        BlockUnion,
    ],
    Field(discriminator="kind"),
]
