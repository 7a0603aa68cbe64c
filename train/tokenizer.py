"""Tokenizers: bytes (nothing to download), a ``tokenizers`` JSON file, or any Hugging Face name.

``python -m palimpsest.train.tokenizer SOURCE... --vocab-size N --out tokenizer.json`` trains one (``vocabulary.py``).

Every tokenizer has one document separator. In a corpus it opens each document, so that it is both the first token a
model is given and what it must predict where a document ends.
"""

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import DataError

if TYPE_CHECKING:  # processes that only tokenise start without torch
    from torch import Tensor

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<bos>", "<s>", "[SEP]", "<sep>")
"""Tokens taken for the document separator of a JSON file, the first that it has."""


class Tokenizer(ABC):
    """What the corpus, the loop and the evaluation ask of a tokenizer."""

    name: str
    vocab_size: int
    """Ids are in [0, vocab_size)."""
    separator: int
    """The id that opens a document; no document's text is ever encoded to it."""
    identity: dict[str, str | int]
    """What makes two tokenizers the same: name and a checksum of the content."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The token ids of each UTF-8 text, without separators."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are not valid UTF-8 become U+FFFD."""

    @cached_property
    @abstractmethod
    def byte_counts(self) -> np.ndarray:
        """The number of UTF-8 bytes that each id stands for, float64 [vocab_size]; 0 for the separator."""

    @cached_property
    def byte_table(self) -> "Tensor":
        """``byte_counts`` as a tensor."""
        import torch

        return torch.from_numpy(self.byte_counts)

    def encode(self, text: str | bytes) -> list[int]:
        """The token ids of one text, without separators."""
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return self.encode_documents([raw])[0].tolist()

    def bytes_per_token(self, tokens: "Tensor") -> "Tensor":
        """The bytes that each token stands for, float64 of the tokens' shape; 0 where a target is ignored (< 0).

        Bits per byte of any text is ``nats.sum() / log(2) / bytes_per_token(targets).sum()``: the separator costs nats
        and has no bytes. Exact for bytes and byte-level vocabularies; for those that normalise text, ``Split.bytes_of``
        scales it so that the sum over the corpus is exact.
        """
        import torch

        table = self.byte_table.to(tokens.device)
        return torch.where(tokens >= 0, table[tokens.clamp(min=0).long()], table.new_zeros(()))


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8; byte 0, which no text contains, separates documents."""

    name = "bytes"
    vocab_size = 256
    separator = 0

    def __init__(self) -> None:
        self.identity = {"name": "bytes"}

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    @cached_property
    def byte_counts(self) -> np.ndarray:
        table = np.ones(self.vocab_size)
        table[self.separator] = 0.0
        return table


class VocabularyTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library.

    Args:
        backend: a ``tokenizers.Tokenizer``. Its truncation and padding are switched off, and special tokens that a
            text spells out are read as plain text.
        separator: the id that separates documents.
    """

    def __init__(self, name: str, backend: Any, separator: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.name, self.separator, self.backend = name, separator, backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        content = hashlib.sha256(backend.to_str().encode("utf-8")).hexdigest()
        self.identity = {"name": name, "sha256": content, "separator": separator}

    def __getstate__(self) -> dict[str, Any]:
        """All but the tensor: a process that tokenises has no torch, and need not find the rest anew."""
        return {key: value for key, value in self.__dict__.items() if key != "byte_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True  # the library keeps truncation and padding, and not this

    def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8") for text in texts]
        encodings = self.backend.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    @cached_property
    def byte_counts(self) -> np.ndarray:
        decoder = json.dumps(json.loads(self.backend.to_str()).get("decoder"))
        added = self.backend.get_added_tokens_decoder()
        table = np.zeros(self.vocab_size)
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                special = added[index].special or index == self.separator
                table[index] = 0 if special else len(added[index].content.encode("utf-8"))
            elif index != self.separator:
                table[index] = _token_bytes(token, decoder)
        return table


def _token_bytes(token: str, decoder: str) -> int:
    """The bytes that a vocabulary entry stands for, given the JSON of the tokenizer's decoder."""
    if '"ByteLevel"' in decoder:
        return len(token)  # one printable character per byte
    if '"ByteFallback"' in decoder and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1
    if '"WordPiece"' in decoder:
        token = token.removeprefix("##")
    if '"Metaspace"' in decoder or "\\u2581" in decoder:
        token = token.replace("\u2581", " ")
    return len(token.encode("utf-8"))


class _ReadErrorsNamed:
    """Turns what reading a tokenizers file raises into a DataError that names it.

    The library raises ``Exception`` itself, which only its exact class tells from anything else that can go wrong.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind in (Exception, OSError, UnicodeDecodeError):
            raise DataError(
                f"data.tokenizer was {self.name!r}; it must be a JSON file of the tokenizers library: {error}"
            ) from error


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` names.

    Args:
        name: ``bytes``; the path of a ``tokenizers`` JSON file (ends in ``.json``); or a Hugging Face name or folder.

    Raises:
        DataError: when it cannot be found or read, has no separator, or the package that it needs is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    return _from_file(name) if name.endswith(".json") else _from_hugging_face(name)


def _from_file(name: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"data.tokenizer was {name!r}; a tokenizers file needs the extra 'data': pip install 'palimpsest[data]'"
        ) from error
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"data.tokenizer was {name!r}; it must be an existing file, or 'bytes', or a Hugging Face name")
    with _ReadErrorsNamed(name):
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    for separator in SEPARATORS:
        index = backend.token_to_id(separator)
        if index is not None:
            return VocabularyTokenizer(name, backend, index)
    must = f"it must have one of {list(SEPARATORS)}"
    raise DataError(f"data.tokenizer was {name!r}, whose vocabulary has no document separator; {must}")


def _from_hugging_face(name: str) -> Tokenizer:
    must = "it must be 'bytes', the path of a tokenizers .json file, or a Hugging Face name"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            f"data.tokenizer was {name!r}; {must} (which needs the extra 'hf': pip install 'palimpsest[hf]')"
        ) from error
    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer was {name!r}; {must}: {str(error).splitlines()[0]}") from error
    if not found.is_fast:
        raise DataError(f"data.tokenizer was {name!r}; it must have a fast implementation (a tokenizer.json)")
    separators = (found.eos_token_id, found.bos_token_id, found.sep_token_id)
    separator = next((index for index in separators if index is not None), None)
    if separator is None:
        raise DataError(f"data.tokenizer was {name!r}; it must have an eos, bos or sep token to separate documents")
    return VocabularyTokenizer(name, found.backend_tokenizer, separator)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a byte-level vocabulary on a corpus; see ``vocabulary.py``."""
    from .vocabulary import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
