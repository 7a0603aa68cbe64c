"""A Hugging Face causal language model as the backbone of HMT (the extra ``hf``)."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelConfig, validate
from .hmt import SegmentMemory
from .hmt_config import HMTConfig
from .lm import MemoryLM, fingerprint
from .mixers import LayerState, Mixer

UNTOLD = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""What a Hugging Face configuration says that does not change what is computed."""


class HuggingFaceLM(MemoryLM):
    """HMT over the decoder of a Hugging Face causal model: its embeddings, its layers, its head.

    Made by :func:`wrap`, or with fresh weights from a configuration whose ``huggingface`` is such a model's. It is a
    :class:`MemoryLM`: it trains, carries a state, packs documents, decodes, saves and loads as one. Its mixers are not
    ours: there are no diagnostics of its layers.

    Raises:
        ModuleNotFoundError: without the package transformers (``pip install palimpsest[hf]``).
        ValueError: for a model that does not keep the keys and values of all tokens, or whose head adds a bias.
    """

    def __init__(self, config: ModelConfig, causal: Any = None) -> None:
        nn.Module.__init__(self)
        assert config.huggingface is not None and config.hmt is not None  # the configuration sees to it
        if causal is None:
            from transformers import AutoConfig, AutoModelForCausalLM

            causal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.huggingface))
        self.config = config
        self.backbone: Any = causal.base_model
        head = causal.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"model was {type(causal).__name__}, whose head has a bias; it must have none")
        self.head = None if head.weight is self.embed.weight else head
        self.hmt = SegmentMemory(config, config.hmt)
        self.fingerprint = fingerprint(config)
        self._cache()

    @property
    def embed(self) -> nn.Embedding:  # type: ignore[override]
        """The model's own table."""
        return self.backbone.get_input_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The model's own layers."""
        return self.backbone.layers

    def _mixers(self) -> list[Mixer]:
        return []

    def _cache(self) -> Any:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache(config=self.backbone.config)
        other = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        if other:
            was = f"{type(self.backbone).__name__}, which keeps {', '.join(sorted(other))}"
            raise ValueError(f"model was {was}; it must keep the keys and values of all tokens")
        return cache

    def through(
        self, x: Tensor, layers: list[LayerState] | None, cu_seqlens: Tensor | None, keep: bool
    ) -> tuple[Tensor, list[LayerState]]:
        """See :meth:`MemoryLM.through`; rows are equally far, as those of a segment's pass are, and never packed."""
        cache: Any = self._cache() if keep or layers else None
        for i, layer in enumerate(layers or []):
            start = layer["k"].shape[1] - int(layer["count"][0])  # the rest is there to be as long as other rows
            cache.update(*(layer[name][:, start:].transpose(1, 2) for name in ("k", "v")), i)
        result = self.backbone(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None)
        after: list[LayerState] = []
        for layer in cache.layers if keep else []:
            k, v = (kept.transpose(1, 2) for kept in (layer.keys, layer.values))
            count = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32, device=k.device)
            after.append({"k": k, "v": v, "count": count})
        return result.last_hidden_state, after

    def fresh(self, batch: int) -> list[LayerState]:
        """Empty caches."""
        told, weight = self.backbone.config, self.embed.weight
        heads = getattr(told, "num_key_value_heads", None) or told.num_attention_heads
        width = getattr(told, "head_dim", None) or told.hidden_size // told.num_attention_heads
        empty = weight.new_zeros(batch, 0, heads, width)
        count = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        return [{"k": empty, "v": empty.clone(), "count": count.clone()} for _ in self.blocks]


@torch.no_grad()
def wrap(causal: Any, hmt: HMTConfig | Mapping[str, Any]) -> HuggingFaceLM:
    """HMT over a causal language model of the package transformers, whose weights it takes (no copy is made)::

        wrap(AutoModelForCausalLM.from_pretrained(name), {"segment": 512, "recall": "none"}).save("runs/start")

    That folder can be loaded, evaluated, and trained from: ``train.init=runs/start``, with the ``model`` section of
    its config.json.

    Args:
        causal: decoder-only, with full attention and rotary (or no) positions. hmt: the section ``model.hmt``.

    Raises:
        ValueError: for a model whose logits are not a matrix times its last hidden values, and those of
            :class:`HuggingFaceLM`.
    """
    told = json.loads(causal.config.to_json_string(use_diff=False))
    table = causal.get_input_embeddings().weight
    section = {
        "vocab_size": table.shape[0],
        "dim": table.shape[1],
        "layers": causal.config.num_hidden_layers,
        "mixer": {"kind": "attention", "heads": 1, "rope": False},  # not used
        "tie_embeddings": causal.get_output_embeddings().weight is table,
        "softcap": getattr(causal.config, "final_logit_softcapping", None),
        "init_std": float(table.float().std()),
        "hmt": hmt.model_dump() if isinstance(hmt, HMTConfig) else dict(hmt),
        "huggingface": {key: value for key, value in told.items() if key not in UNTOLD},
    }
    model = HuggingFaceLM(validate(ModelConfig, section, "model"), causal)
    assert model.hmt is not None
    model.hmt.to(table)
    training = causal.training
    tokens = torch.arange(4, device=table.device)[None] % table.shape[0]
    expected = causal.eval()(tokens, use_cache=False).logits
    found = model._logits(model.through(model.embed(tokens), None, None, False)[0])
    causal.train(training)
    near = 0.02 if table.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not (found - expected).abs().max() <= near * expected.abs().max():
        raise ValueError(f"model was {type(causal).__name__}, whose logits are scaled; it must give head · last hidden")
    return model
