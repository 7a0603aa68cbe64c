"""From a configuration to its corpus: tokenised now, or found, compared with what is asked for, and verified."""

import hashlib
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

from .build import build as build_corpus
from .corpus import Corpus
from .data_config import DataConfig
from .files import DataError, files, source_digest
from .mixture import MixtureCorpus
from .shards import MANIFEST, read_manifest, verify_files
from .tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("palimpsest.train")

FORMAT = 1


def prepare(config: DataConfig, *, verify: bool = True, build: bool = True, jobs: int = 1) -> Corpus:
    """The corpus that a configuration describes: tokenised now, or found and verified; or the mixture of several.

    Args:
        build: False: only a corpus that is there.
        jobs: processes that tokenise, where that is still to do; the corpus does not depend on it.
        verify: whether the checksums of a corpus that is found are computed, which reads it once. Without, only the
            files' sizes are compared; for ranks of a node where another one verifies.

    ``seconds`` of the corpus says how long tokenising took, where this call did it.

    Raises:
        DataError: for a source, text or tokenizer that cannot be used; for a corpus that is found but damaged, or was
            made from another configuration, tokenizer or state of the source files. It names the key or the file.
    """
    if config.task is not None:
        raise DataError(f"data.task was {config.task!r}; it must be null where text is wanted: a task has no corpus")
    if config.source == "mixture":
        return _mixture(config, verify, build, jobs)
    tokenizer = load_tokenizer(config.tokenizer)
    if config.source == "corpus":
        return _prepared(config, tokenizer, verify)
    identity = _identity(config, tokenizer)
    given = None if config.folder is None else Path(config.folder).expanduser()
    found = None
    try:
        found = files(config)
        digest = source_digest(config, found)
    except DataError as error:
        if given is None or not (given / MANIFEST).exists():
            raise
        logger.warning("using the corpus in %s without its source: %s", given, error)
        digest = None
    fingerprint = hashlib.sha256(json.dumps([identity, digest], sort_keys=True).encode("utf-8")).hexdigest()
    folder = given or Path("runs", "data", fingerprint[:16])
    began, built = time.monotonic(), False
    if not (folder / MANIFEST).exists():
        if not build:
            raise DataError(f"no corpus is in {folder} yet")
        about = {"identity": identity, "source": digest, "fingerprint": fingerprint}
        built = build_corpus(folder, config, tokenizer, about, jobs, found)
    seconds = time.monotonic() - began if built else None
    manifest = read_manifest(folder)
    _check_identity(manifest, identity, digest, folder)
    verify_files(manifest, folder, checksums=verify and not built)  # what was just written needs no reading
    corpus = Corpus(folder, manifest, tokenizer, config.documents, config.reset)
    corpus.seconds = seconds
    return corpus


def _prepared(config: DataConfig, tokenizer: Tokenizer, verify: bool) -> Corpus:
    """The corpus in a folder, whatever it was made from."""
    folder = Path(str(config.folder)).expanduser()
    if not (folder / MANIFEST).is_file():
        raise DataError(f"data.folder was {config.folder!r}, which holds no {MANIFEST}; it must be a prepared corpus")
    manifest = read_manifest(folder)
    then = manifest["identity"]["tokenizer"]
    if _content(then) != _content(tokenizer.identity):
        raise DataError(
            f"data.tokenizer was {tokenizer.identity}; the corpus in {folder} was prepared with {then}; it must be that"
        )
    verify_files(manifest, folder, checksums=verify)
    return Corpus(folder, manifest, tokenizer, config.documents, config.reset)


def _content(identity: dict[str, Any]) -> dict[str, Any]:
    """What makes tokenizers the same wherever their files lie."""
    return {key: value for key, value in identity.items() if key != "name" or "sha256" not in identity}


def _mixture(config: DataConfig, verify: bool, build: bool, jobs: int) -> MixtureCorpus:
    """Every component, prepared or found and verified."""
    corpora: dict[str, Corpus] = {}
    for index in range(len(config.mixture)):
        try:
            corpora[config.label(index)] = prepare(config.component(index), verify=verify, build=build, jobs=jobs)
        except DataError as error:
            raise DataError(f"data.mixture.{index}: {error}") from error
    return MixtureCorpus(corpora, [component.weight for component in config.mixture])


def _identity(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a corpus is made from, as far as the configuration says."""
    keys = {
        "stdlib": (),
        "text": ("path",),
        "jsonl": ("path", "text_key"),
        "parquet": ("path", "text_key"),
        "hf": ("name", "subset", "split", "text_key"),
    }[config.source]
    identity = {key: getattr(config, key) for key in ("source", *keys, "validation_fraction", "shard_tokens")}
    if config.source == "stdlib":
        identity["python"] = platform.python_version()
    return {"format": FORMAT, **identity, "tokenizer": tokenizer.identity}


def _check_identity(manifest: dict[str, Any], identity: dict[str, Any], digest: str | None, folder: Path) -> None:
    """Refuse a corpus that was made from something else than the configuration now asks for."""
    remedy = f"choose another data.folder than {folder}, or delete it to have the corpus prepared again"
    for key in sorted(identity.keys() | manifest["identity"].keys()):
        now, then = identity.get(key), manifest["identity"].get(key)
        if now != then:
            raise DataError(f"data.{key} was {now!r}; the corpus in {folder} was prepared with {then!r}; {remedy}")
    if digest is not None and digest != manifest["source"]:
        raise DataError(f"the source files changed after the corpus in {folder} was prepared from them; {remedy}")
