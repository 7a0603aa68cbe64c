"""What a neural memory is: a frozen, hashable description that selects the function an operation computes."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

NETWORKS = ("linear", "mlp", "gated_mlp")
BIASES = ("l2", "dot", "lp", "huber")
RETENTIONS = ("l2", "none", "lq", "kl", "norm")
RULES = ("momentum", "gd", "muon", "muon_gd")
GATES = ("head", "channel")

#: Added to the variance in the memory's LayerNorm.
LAYER_NORM_EPS = 1e-6
#: Added to the sums of squares, or of q-th powers, by which the retentions norm and lq divide.
RETENTION_EPS = 1e-12


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} was {value!r}; it must be one of {', '.join(allowed)}")


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} was {value!r}; it must be a whole number of at least 1")


def _number(name: str, value: object, least: float, exclusive: bool = False) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not real or value < least or (exclusive and value == least):  # type: ignore[operator]
        bound = f"above {least:g}" if exclusive else f"of at least {least:g}"
        raise ValueError(f"{name} was {value!r}; it must be a number {bound}")


@dataclass(frozen=True)
class MemorySpec:
    """The memory network M, its inner loss, and its learning rule.

    Inside a chunk every memory is linear in what is written to it; what is not (a projection, an orthogonalisation) is
    done once, after the read of the chunk's last token.

    Args:
        network: ``"linear"``, M(x; W) = x W; ``"mlp"``, M(x; W) = gelu(... gelu(x W1) W2 ...) Wn; or ``"gated_mlp"``,
            M(x; W) = (silu(x W1) ⊙ x W3) W2, weights in the order W1, W2, W3. gelu is its tanh form, what the JAX code
            of these papers computes by default.
        depth: number of layers n: 1 for ``"linear"``, at least 2 for ``"mlp"``, 2 for ``"gated_mlp"``.
        expansion: width of the hidden layers as a multiple of head_dim.
        norm: a LayerNorm, with a learnt scale that the memory does not write, on the last layer's output.
            ``None``: false for linear, else true.
        residual: add x to the output. ``None``: false for linear, else true.
        bias: attentional bias, the inner loss ℓ of r = M(k) − v: ``"l2"`` is ½‖r‖², ``"dot"`` is −⟨M(k), v⟩,
            ``"lp"`` is ‖r‖_p^p / p smoothed, that is, the loss whose gradient in r is tanh(ν r) (r² + ε)^((p−1)/2),
            ``"huber"`` is ½‖r‖² where ‖r‖ ≤ δ_t, else δ_t (‖r‖ − ½ δ_t), with δ_t > 0 given per token.
        retention: ``"l2"``, W_t = a_t W_{t-1} + S_t; ``"none"``, a = 1 (``log_retain`` is then None); ``"norm"``, a = 1
            and at a chunk's end the weights of every output unit are scaled to the norm they began with (LaCT);
            ``"lq"`` and ``"kl"``, where D_t = a_t D_{t-1} + S_t is what accumulates, and W follows from it: see below.
        rule: ``"momentum"``, S_t = η_t S_{t-1} − θ_t g_t; ``"gd"``, η = 0; ``"muon"``, momentum, which W sees only
            orthogonalised: W += NS(S) at a chunk's end, reads before it see A_t W (ATLAS); ``"muon_gd"``, the same of
            S = −Σ θ_i g_i since the last orthogonalisation (LaCT). ``log_momentum`` is None for both gd.
        chunk_size: C. All gradients of a chunk are taken at the weights at its start; 1 is the online rule.
        read_after_write: token t reads W_t; otherwise W_{t-1}.
        window: c of the omega rule (ATLAS): in place of g_t stands Σ γ_i g_i over the last c tokens, each at the
            present anchor, γ_i > 0 given per token; 1 is none, and takes no γ.
        ns_every: with muon, orthogonalise every this many tokens of a chunk, a divisor of C; None: at its end.
        ns_steps: Newton-Schulz steps of muon.
        lp_power, lp_sharpness, lp_smoothing: p ≥ 1, ν and ε of ``"lp"``.
        lq_power: q ≥ 2 of ``"lq"``.
        gates: ``"head"``, one a, η and θ for all of a token's memory; ``"channel"``, one for every output unit (Miras):
            column c of the last matrix goes by W_t = a_t[c] W_{t-1} + S_t, S_t = η_t[c] S_{t-1} − θ_t[c] g_t. Matrices
            before it, of other widths, take the mean of θ and the geometric means of a and η. It goes with every other
            choice: all that follows a write (a projection, an orthogonalisation) has a meaning for any S.

    ``"lq"`` (Moneta): W = r D with r = ‖D‖_q^(2−q) of each matrix, as at the chunk's start. ``"kl"`` (Memora):
    W = in · softmax(D) over the inputs of every output unit at the chunk's start, D being kept as log W; in the chunk
    W moves as D does, its linearisation at equal weights. The weights W_0 that an operation is given are D's start:
    any numbers do, and W_0 of kl is positive.

    Raises:
        ValueError: naming the field, what it was and what it must be; also for choices that make no sense together.

    Source: Titans (Behrouz et al., 2024) eqs. 8-15; Miras (Behrouz et al., 2025) for the names of the parts, lp, huber,
    lq and kl; ATLAS (Behrouz et al., 2025) for omega and muon; LaCT (Zhang et al., 2025) for norm and the gated mlp.
    """

    network: str = "mlp"
    depth: int | None = None
    expansion: int = 4
    norm: bool | None = None
    residual: bool | None = None
    bias: str = "l2"
    retention: str = "l2"
    rule: str = "momentum"
    chunk_size: int = 64
    read_after_write: bool = True
    window: int = 1
    ns_every: int | None = None
    ns_steps: int = 5
    lp_power: float = 3.0
    lp_sharpness: float = 10.0
    lp_smoothing: float = 1e-6
    lq_power: float = 4.0
    gates: str = "head"

    def __post_init__(self) -> None:
        _one_of("network", self.network, NETWORKS)
        _one_of("bias", self.bias, BIASES)
        _one_of("retention", self.retention, RETENTIONS)
        _one_of("rule", self.rule, RULES)
        _one_of("gates", self.gates, GATES)
        deep = self.network != "linear"
        for name, default in (("depth", 2 if deep else 1), ("norm", deep), ("residual", deep)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("depth", "expansion", "chunk_size", "window", "ns_steps"):
            _whole(name, getattr(self, name))
        for name in ("norm", "residual", "read_after_write"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} was {getattr(self, name)!r}; it must be true or false")
        for name, least in (("lp_power", 1.0), ("lp_sharpness", 0.0), ("lp_smoothing", 0.0), ("lq_power", 2.0)):
            _number(name, getattr(self, name), least, exclusive=least == 0.0)
            object.__setattr__(self, name, float(getattr(self, name)))
        assert self.depth is not None
        fits = {"linear": self.depth == 1, "mlp": self.depth >= 2, "gated_mlp": self.depth == 2}
        if not fits[self.network]:
            must = {"linear": "1", "mlp": "at least 2", "gated_mlp": "2"}[self.network]
            raise ValueError(f"depth was {self.depth} with network {self.network!r}; it must be {must}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse choices that mean nothing together."""
        if self.orthogonal and self.retention == "kl":
            raise ValueError(
                f"rule was {self.rule!r} with retention 'kl'; it must be momentum or gd: kl multiplies every weight by "
                f"the exponential of its own step, and an orthogonalised step has no size of its own for each weight"
            )
        if self.ns_every is not None:
            _whole("ns_every", self.ns_every)
            if not self.orthogonal:
                raise ValueError(
                    f"ns_every was {self.ns_every} with rule {self.rule!r}; it must be null: only muon orthogonalises"
                )
            if self.chunk_size % self.ns_every:
                raise ValueError(f"ns_every was {self.ns_every}; it must divide chunk_size = {self.chunk_size}")
        if self.rule == "muon_gd" and self.step_size == 1:
            name = "chunk_size" if self.ns_every is None else "ns_every"
            raise ValueError(
                f"{name} was 1 with rule 'muon_gd'; it must be at least 2: an orthogonalised gradient has no size, and "
                f"the step would mean nothing"
            )

    @property
    def layers(self) -> int:
        """Number of weight matrices."""
        assert self.depth is not None
        return 3 if self.network == "gated_mlp" else self.depth

    @property
    def last(self) -> int:
        """Which matrix is the last: its outputs are the memory's."""
        return 1 if self.network == "gated_mlp" else self.layers - 1

    @property
    def orthogonal(self) -> bool:
        """Whether W sees the momentum only orthogonalised."""
        return self.rule in ("muon", "muon_gd")

    @property
    def has_momentum(self) -> bool:
        """Whether the state carries a momentum S."""
        return self.rule != "gd"

    @property
    def momentum_gate(self) -> bool:
        """Whether η is given: ``log_momentum``."""
        return self.rule in ("momentum", "muon")

    @property
    def retention_gate(self) -> bool:
        """Whether a is given: ``log_retain``."""
        return self.retention in ("l2", "lq", "kl")

    @property
    def step_size(self) -> int:
        """Tokens of one step of a schedule: of a chunk, or of what muon orthogonalises at once."""
        return self.ns_every or self.chunk_size

    @property
    def derived_by_hand(self) -> bool:
        """Whether ``chunked.py`` has this memory with its own backward; autograd goes through a chunk of all others."""
        plain = self.network != "gated_mlp" and self.bias in ("l2", "dot") and self.gates == "head"
        return plain and self.retention in ("l2", "none") and not self.orthogonal and self.window == 1

    def weight_shapes(self, heads: int, key_dim: int, value_dim: int) -> list[tuple[int, int, int]]:
        """Shapes [H, in, out] of W1 … Wn for keys of ``key_dim`` and values of ``value_dim``."""
        hidden = self.expansion * key_dim
        if self.network == "gated_mlp":
            return [(heads, key_dim, hidden), (heads, hidden, value_dim), (heads, key_dim, hidden)]
        widths = [key_dim] + [hidden] * (self.layers - 1) + [value_dim]
        return [(heads, a, b) for a, b in pairwise(widths)]

    def encode(self) -> str:
        """One line that a registered operator can take as an argument; see :meth:`decode`."""
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())

    @classmethod
    def decode(cls, text: str) -> "MemorySpec":
        """The spec that :meth:`encode` wrote."""
        return cls(**{key: _value(value) for key, value in (item.split("=") for item in text.split(","))})


def _value(word: str) -> Any:
    """What a word of an encoding stands for."""
    known: dict[str, Any] = {"True": True, "False": False, "None": None}
    if word in known or word.isalpha() or not (word[0].isdigit() or word[0] == "-"):
        return known.get(word, word)
    return int(word) if word.isdigit() else float(word)
