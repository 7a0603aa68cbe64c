"""Give a run what Hugging Face's libraries look for: ``python -m palimpsest.eval.export RUN OUT``.

OUT holds the model (config.json, model.safetensors, generation_config.json) and its tokenizer (tokenizer.json,
tokenizer_config.json), for ``AutoModelForCausalLM`` and ``AutoTokenizer``; see :mod:`palimpsest.models.hub`. It needs
the extra ``hf``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.tokenizer import Tokenizer
from .harness import Run, open_run, pick_device, reported


def byte_backend() -> Any:
    """One token per byte, with the byte as its id, as a ``tokenizers.Tokenizer``.

    Byte-level BPE without merges, over the printable characters that stand for bytes there. Byte 0 alone is not under
    its character but is a special token, itself: so it can be skipped, and no letter of any text is taken for it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    names[0] = "\0"
    backend = Tokenizer(models.BPE({names[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("\0", special=True, normalized=False)])
    return backend


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any:
    """A ``PreTrainedTokenizerFast`` that encodes and decodes as ``tokenizer`` does.

    Its separator is the token that begins, ends and pads, on the left, where prompts of a batch are filled up. Nothing
    is added to a text. Special tokens that a text spells out are text, but for the byte 0 of the byte tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    backend = byte_backend() if tokenizer.name == "bytes" else tokenizer.backend  # type: ignore[attr-defined]
    separator = backend.id_to_token(tokenizer.separator)
    made = PreTrainedTokenizerFast(
        tokenizer_object=_unadorned(backend),
        bos_token=separator,
        eos_token=separator,
        pad_token=separator,
        padding_side="left",
        split_special_tokens=tokenizer.name != "bytes",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return made


def _unadorned(backend: Any) -> Any:
    """A copy that adds no tokens of its own to a text."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    return copy


def export(run: Run, out: str | Path) -> None:
    """Write model and tokenizer of a run into the folder ``out``."""
    from transformers import GenerationConfig

    from ..models.hub import PalimpsestForCausalLM

    model = PalimpsestForCausalLM.of(run.model, run.config.plain())
    separator = run.tokenizer.separator
    ids = {f"{name}_token_id": separator for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    hugging_face_tokenizer(run.tokenizer).save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and say which files it has; 0 when done, 2 for bad input."""
    parser = argparse.ArgumentParser("palimpsest-export", description=__doc__)
    parser.add_argument("run", help="run folder, with model.safetensors, config.json and config.yaml")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args(argv)
    with reported() as outcome:
        export(open_run(args.run, pick_device("cpu")), args.out)
        for path in sorted(Path(args.out).iterdir()):
            print(path)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
