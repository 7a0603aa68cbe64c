"""The mixers that the conformance suite runs: a new one is added to REGISTRY, and to nothing else."""

from typing import Any

import torch

from palimpsest.models.config import ModelConfig, validate
from palimpsest.models.mixers import Mixer, make_mixer

DIM = 8
MEMORY = {"heads": 2, "chunk_size": 5, "expansion": 2, "conv": 3}
HCAM = {"kind": "hcam", "heads": 2, "window": 4, "chunk_size": 3, "top_k": 2}
MIXTURE = {"kind": "mixture", "heads": 2, "memories": 3, "top_k": 2, "conv": 3, "chunk_size": 5}

#: name → the ``mixer`` section of a configuration. Chunks of 5 and segments of 7 end at different tokens on purpose.
REGISTRY: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention", "heads": 2},
    "attention, grouped": {"kind": "attention", "heads": 4, "kv_heads": 2, "persistent": 2},
    "attention, no positions": {"kind": "attention", "heads": 2, "rope": False},
    "window": {"kind": "window_attention", "heads": 2, "window": 4, "persistent": 3},
    "lmm": {"kind": "neural_memory", "memory": MEMORY},
    "lmm, plain": {
        "kind": "neural_memory",
        "memory": {**MEMORY, "network": "linear", "rule": "gd", "retention": "none", "conv": 0, "output_gate": "none"},
    },
    "lmm, deep": {"kind": "neural_memory", "memory": {**MEMORY, "depth": 3, "norm": False, "read_after_write": False}},
    "lmm, dot": {"kind": "neural_memory", "memory": {**MEMORY, "bias": "dot", "chunk_size": 1}},
    "lmm, omega": {
        "kind": "neural_memory",
        "memory": {
            **MEMORY,
            "bias": "huber",
            "rule": "muon",
            "window": 3,
            "features": {"degree": 3},
            "gates": "channel",
        },
    },
    "lmm, gated": {
        "kind": "neural_memory",
        "memory": {
            **MEMORY,
            "chunk_size": 4,
            "network": "gated_mlp",
            "residual": False,
            "bias": "dot",
            "retention": "norm",
            "rule": "muon_gd",
            "ns_every": 2,
            "ns_steps": 2,
            "features": {"degree": 2, "width": 5},
        },
    },
    "mac": {"kind": "titans_mac", "heads": 2, "segment": 7, "persistent": 2, "memory": MEMORY},
    "mac, bare": {
        "kind": "titans_mac",
        "heads": 4,
        "kv_heads": 2,
        "rope": False,
        "segment": 5,
        "persistent": 0,
        "memory": {**MEMORY, "conv": 0, "rule": "gd", "read_after_write": False},
    },
    "mac, kl": {
        "kind": "titans_mac",
        "heads": 2,
        "segment": 4,
        "persistent": 1,
        "memory": {**MEMORY, "bias": "lp", "retention": "kl", "rule": "gd"},
    },
    "mag": {"kind": "titans_mag", "heads": 2, "window": 4, "persistent": 2, "memory": MEMORY},
    "mag, silu": {"kind": "titans_mag", "heads": 2, "window": 3, "persistent": 1, "gate": "silu", "memory": MEMORY},
    "mal": {"kind": "titans_mal", "heads": 2, "window": 4, "persistent": 2, "memory": MEMORY},
    "mal, bare": {"kind": "titans_mal", "heads": 2, "window": 4, "persistent": 0, "memory": {**MEMORY, "conv": 0}},
    "lact": {
        "kind": "lact",
        "heads": 4,
        "window": 4,
        "memory": {
            **MEMORY,
            "chunk_size": 6,
            "conv": 0,
            "network": "gated_mlp",
            "norm": False,
            "residual": False,
            "bias": "dot",
            "retention": "norm",
            "rule": "muon_gd",
            "ns_steps": 2,
            "gates": "channel",
        },
    },
    "tnt": {
        "kind": "tnt",
        "shard": 6,
        "memory": {**MEMORY, "chunk_size": 8},
        "local": {"chunk_size": 2, "expansion": 2, "rule": "gd"},
    },
    "mixture": MIXTURE,
    "mixture, one": {**MIXTURE, "rule": "delta", "top_k": 1, "shared": False, "conv": 0, "output_gate": "none"},
    "mixture, linear": {**MIXTURE, "rule": "linear_attention", "memories": 4, "projections": "shared"},
    "mixture, neural": {**MIXTURE, "rule": "neural", "memory": {"chunk_size": 5, "expansion": 2}},
    "mixture, neural, plain": {
        **MIXTURE,
        "rule": "neural",
        "shared": False,
        "projections": "shared",
        "memory": {
            "network": "linear",
            "rule": "gd",
            "retention": "none",
            "chunk_size": 4,
            "read_after_write": False,
            "gates": "channel",
        },
    },
    "mixture, neural, omega": {
        **MIXTURE,
        "rule": "neural",
        "memory": {"chunk_size": 5, "expansion": 2, "bias": "huber", "retention": "lq", "rule": "gd", "window": 2},
    },
    "hcam": HCAM,
    "hcam, shared": {
        **HCAM,
        "heads": 4,
        "kv_heads": 2,
        "selectors": 2,
        "selection_width": 3,
        "share": 4,
        "persistent": 2,
        "combine": "gate",
        "scorer": {"kind": "landmark"},
    },
    "hcam, tree": {**HCAM, "branching": 2, "chunk_size": 2, "scorer": {"kind": "strided_mlp", "width": 2, "stride": 1}},
    "hcam, bank": {
        **HCAM,
        "share": 3,
        "scorer": {"kind": "representative", "tokens": 2},
        "bank": {"capacity": 3, "page": 2, "evict": "least_relevant"},
    },
    "hcam, cut": {**HCAM, "chunk_size": 5, "cut": {"gamma": 0.2, "window": 4, "least": 2}},
    "block union": {"kind": "block_union", "heads": 2, "chunk_size": 3, "top_k": 2},
    "block union, grouped": {
        "kind": "block_union",
        "heads": 4,
        "kv_heads": 2,
        "rope": False,
        "chunk_size": 4,
        "top_k": 1,
        "share": 3,
        "branching": 2,
        "scorer": {"kind": "representative", "tokens": 2},
    },
}


def small_model(mixer: dict[str, Any] | list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """A ``model`` section of width DIM. Weights far larger than usual, so that every path carries signal."""
    return {"vocab_size": 11, "dim": DIM, "layers": 2, "mixer": mixer, "ffn_hidden": 16, "init_std": 0.4, **keys}


def small_mixer(name: str, seed: int = 0, **keys: Any) -> Mixer:
    """A registered mixer in float64; ``keys`` stand in place of those of its section."""
    torch.manual_seed(seed)
    config = validate(ModelConfig, small_model(REGISTRY[name] | keys))
    return make_mixer(config, config.mixer_of(0)).double()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """x [B, T, DIM] in float64."""
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
