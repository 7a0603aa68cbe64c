"""What a neural memory is: a frozen, hashable description that selects the function an operation computes."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

NETWORKS = ("linear", "mlp")
BIASES = ("l2", "dot")
RETENTIONS = ("l2", "none")
RULES = ("momentum", "gd")

#: Added to the variance in the memory's LayerNorm.
LAYER_NORM_EPS = 1e-6


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} was {value!r}; it must be one of {', '.join(allowed)}")


@dataclass(frozen=True)
class MemorySpec:
    """The memory network M, its inner loss, and its learning rule.

    Args:
        network: ``"linear"``, M(x; W) = x W; or ``"mlp"``, M(x; W) = gelu(... gelu(x W1) W2 ...) Wn. gelu is its tanh
            form, what the JAX code of these papers computes by default.
        depth: number of weight matrices n; 1 for ``"linear"``, at least 2 for ``"mlp"``.
        expansion: width of the hidden layers as a multiple of head_dim.
        norm: a LayerNorm, with a learnt scale that the memory does not write, on the last layer's output.
            ``None``: true for mlp, false for linear.
        residual: add x to the output. ``None``: true for mlp, false for linear.
        bias: attentional bias, the inner loss: ``"l2"`` is ½‖M(k) − v‖², ``"dot"`` is −⟨M(k), v⟩.
        retention: ``"l2"``, W_t = a_t W_{t-1} + S_t; ``"none"``, a = 1 (``log_retain`` is then None).
        rule: ``"momentum"``, S_t = η_t S_{t-1} − θ_t g_t; ``"gd"``, η = 0 (``log_momentum`` is then None).
        chunk_size: C. All gradients of a chunk are taken at the weights at its start; 1 is the online rule.
        read_after_write: token t reads W_t; otherwise W_{t-1}.

    Raises:
        ValueError: naming the field, what it was and what it must be.

    Source: Titans (Behrouz et al., 2024) eqs. 8-15; Miras (Behrouz et al., 2025) for the names of the parts.
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

    def __post_init__(self) -> None:
        _one_of("network", self.network, NETWORKS)
        _one_of("bias", self.bias, BIASES)
        _one_of("retention", self.retention, RETENTIONS)
        _one_of("rule", self.rule, RULES)
        deep = self.network == "mlp"
        for name, default in (("depth", 2 if deep else 1), ("norm", deep), ("residual", deep)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("depth", "expansion", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} was {value!r}; it must be a whole number of at least 1")
        for name in ("norm", "residual", "read_after_write"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} was {getattr(self, name)!r}; it must be true or false")
        if deep == (self.depth == 1):
            raise ValueError(
                f"depth was {self.depth} with network {self.network!r}; it must be {'at least 2' if deep else '1'}"
            )

    @property
    def layers(self) -> int:
        """Number of weight matrices n."""
        assert self.depth is not None
        return self.depth

    @property
    def has_momentum(self) -> bool:
        """Whether the state carries a momentum S."""
        return self.rule == "momentum"

    def weight_shapes(self, heads: int, key_dim: int, value_dim: int) -> list[tuple[int, int, int]]:
        """Shapes [H, in, out] of W1 … Wn for keys of ``key_dim`` and values of ``value_dim``."""
        hidden = self.expansion * key_dim
        widths = [key_dim] + [hidden] * (self.layers - 1) + [value_dim]
        return [(heads, a, b) for a, b in pairwise(widths)]

    def encode(self) -> str:
        """One line that a registered operator can take as an argument; see :meth:`decode`."""
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())

    @classmethod
    def decode(cls, text: str) -> "MemorySpec":
        """The spec that :meth:`encode` wrote."""
        words: dict[str, Any] = {"True": True, "False": False}
        pairs = (item.split("=") for item in text.split(","))
        return cls(**{key: words.get(value, int(value) if value.isdigit() else value) for key, value in pairs})
