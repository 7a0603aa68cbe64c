"""Sources: what is read, in which order, and how each bad input is named."""

import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from palimpsest.models.config import ConfigError, validate
from palimpsest.train.data_config import DataConfig
from palimpsest.train.sources import DataError, documents, files, source_digest


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)
    return target


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def read(source: str, path: str | list[str] | None = None, **keys: str) -> list[bytes]:
    return [document.text for document in documents(DataConfig(source=source, path=path, **keys))]


# -- text -------------------------------------------------------------------------------------------------------------


def test_text_files_folders_and_globs_in_order(here):
    for name in ("b/2.txt", "b/1.md", "b/.hidden", "b/.git/x", "b/sub/0.txt", "a.txt", "c1.log", "c0.log"):
        write(name, name)
    assert read("text", "a.txt") == [b"a.txt"]
    assert read("text", "b") == [b"b/1.md", b"b/2.txt", b"b/sub/0.txt"]
    assert read("text", ["c*.log", "a.txt", "b/**/*.txt"]) == [
        b"c0.log",
        b"c1.log",
        b"a.txt",
        b"b/2.txt",
        b"b/sub/0.txt",
    ]


def test_text_is_kept_byte_for_byte(here):
    raw = b"\xef\xbb\xbfline\r\n\ttab \xf0\x9f\x99\x82 no newline"
    write("a.txt", raw)
    assert read("text", "a.txt") == [raw]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.txt", "data.path was 'missing.txt', which does not exist; it must name existing files"),
        ("*.none", r"data.path was '\*.none', which matches no file"),
        ("empty", "data.path was 'empty', a folder without any file"),
        (["a.txt", "*.txt"], "which names a.txt twice; it must name each file once"),
        ("x.jsonl", "named x.jsonl, which data.source 'text' cannot read; read it with data.source 'jsonl'"),
        ("x.parquet", "read it with data.source 'parquet'"),
        ("x.zip", "named x.zip, which data.source 'text' cannot read; unpack it"),
        ("nul.txt", r"nul.txt is binary \(a NUL byte at byte 3\); it must be text"),
        ("latin.txt", r"latin.txt is not UTF-8 text \(unexpected end of data at byte 3\)"),
    ],
)
def test_bad_text_is_named(here, path, message):
    for name in ("a.txt", "x.jsonl", "x.parquet", "x.zip"):
        write(name, "text")
    write("nul.txt", b"abc\0def")
    write("latin.txt", "caf\u00e9".encode("latin-1"))
    Path("empty").mkdir()
    if path == ["a.txt", "*.txt"]:
        Path("nul.txt").unlink()
    with pytest.raises(DataError, match=message):
        read("text", path)


def test_a_file_is_the_same_by_any_link(here):
    """To itself, to its folder, and to a folder above; files of one name in two folders are two."""
    write("up/down/a.txt", "text")
    write("up/other/a.txt", "text")
    for link, target in (("file.txt", "up/down/a.txt"), ("folder", "up/down"), ("above", "up")):
        Path(link).symlink_to(target)
    assert len(files(config_of(["up"]))) == 2
    for second in ("file.txt", "folder/a.txt", "above/down"):
        with pytest.raises(DataError, match=f"which names {second}.* twice; it must name each file once"):
            files(config_of(["up", second]))


def config_of(path: list[str]) -> DataConfig:
    return DataConfig(source="text", path=path)


# -- jsonl ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".jsonl.zst", ".JSONL.GZ"])
def test_json_lines_packed_or_not(here, suffix):
    texts = [f"document {i} \u00e9\n" * 50 for i in range(2000)]
    raw = lines(*({"text": text, "id": 1} for text in texts)) + b"\n  \n"
    half = len(raw) // 2
    pack = {"gz": gzip.compress, "zst": lambda part: zstandard.ZstdCompressor().compress(part)}
    kind = suffix.lower().rsplit(".", 1)[1]
    write("x" + suffix, pack[kind](raw[:half]) + pack[kind](raw[half:]) if kind in pack else raw)
    assert read("jsonl", "x" + suffix) == [text.encode() for text in texts]


def test_json_lines_of_a_folder_take_their_files_only(here):
    write("d/b.jsonl", lines({"body": "two"}))
    write("d/a.jsonl.gz", gzip.compress(lines({"body": "one"})))
    write("d/readme.md", "no json")
    assert read("jsonl", "d", text_key="body") == [b"one", b"two"]
    Path("e").mkdir()
    with pytest.raises(DataError, match=r"'e', a folder without a file ending in .jsonl or .jsonl.gz"):
        read("jsonl", "e")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', r"x.jsonl:2 is not JSON: Expecting value.*; each line must be one JSON object"),
        (b'{"text": "\xff"}\n', r"x.jsonl:1 is not JSON: 'utf-8' codec"),
        (b"[1]\n", "x.jsonl:1 holds list; each line must be one JSON object"),
        (b'\n{"body": "a", "id": 1}\n', r"x.jsonl:2 has no field 'text' \(data.text_key\); it has \['body', 'id'\]"),
        (b'{"text": 3}\n', r"field 'text' \(data.text_key\) of x.jsonl:1 was int; it must be a string"),
        (b'{"text": null}\n', "was NoneType; it must be a string"),
        (b'{"text": "a\\u0000"}\n', r"x.jsonl:1 is binary \(a NUL byte at byte 1\)"),
        (
            b'{"text": "a\\ud800"}\n',
            r"x.jsonl:1 has text that is not Unicode \(surrogates .* at character 1\)",
        ),
    ],
)
def test_bad_lines_are_named(here, content, message):
    write("x.jsonl", content)
    with pytest.raises(DataError, match=message):
        read("jsonl", "x.jsonl")


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "other"])
def test_damaged_packed_files_are_named(here, kind, damage):
    raw = lines(*({"text": os.urandom(60).hex()} for _ in range(500)))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = bytearray(gzip.compress(raw) if kind == "gz" else compressor.compress(raw))
    if damage == "truncated":
        del packed[len(packed) // 2 :]
    elif damage == "changed":
        packed[-3] ^= 0x10
    else:
        packed = bytearray(raw)
    write(f"x.jsonl.{kind}", bytes(packed))
    with pytest.raises(DataError, match=f"x.jsonl.{kind} is damaged or not what its suffix says"):
        read("jsonl", f"x.jsonl.{kind}")


def test_unknown_suffixes_are_named(here):
    write("x.txt", "text")
    with pytest.raises(DataError, match=r"named x.txt, which data.source 'jsonl' cannot read; it must end in .jsonl,"):
        read("jsonl", "x.txt")
    with pytest.raises(DataError, match=r"named x.txt, which data.source 'parquet' cannot read; it must end in .parq"):
        read("parquet", "x.txt")


# -- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: str, **columns: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def test_parquet_rows_in_order(here):
    texts = [f"row {i}" for i in range(700)]
    write_parquet("x.parquet", body=texts, id=list(range(700)))
    assert read("parquet", "x.parquet", text_key="body") == [text.encode() for text in texts]


def test_bad_parquet_is_named(here):
    write_parquet("x.parquet", body=["a", None], id=[1, 2])
    with pytest.raises(DataError, match=r"x.parquet has no column 'text' \(data.text_key\); it has body, id"):
        read("parquet", "x.parquet")
    with pytest.raises(DataError, match=r"'body' \(data.text_key\) of x.parquet row 2 was NoneType; it must be a str"):
        read("parquet", "x.parquet", text_key="body")
    with pytest.raises(DataError, match=r"'id' .* of x.parquet row 1 was int"):
        read("parquet", "x.parquet", text_key="id")
    write("y.parquet", b"PAR1 not parquet")
    with pytest.raises(DataError, match=r"y.parquet is damaged or not parquet"):
        read("parquet", "y.parquet")


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def test_hugging_face_local_folder(here, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    write("d/train.jsonl", lines({"text": "one"}, {"text": "two"}))
    write("d/test.jsonl", lines({"text": "three"}))
    assert read("hf", name="d") == [b"one", b"two"]
    assert read("hf", name="d", split="test") == [b"three"]
    assert files(DataConfig(source="hf", name="d")) == [] and source_digest(DataConfig(source="hf", name="d")) is None
    with pytest.raises(DataError, match=r"d/train row 1 has no field 'body' \(data.text_key\); it has \['text'\]"):
        read("hf", name="d", text_key="body")
    with pytest.raises(DataError, match=r"data.name was 'd' .*data.split 'other'\), which cannot be loaded"):
        read("hf", name="d", split="other")
    with pytest.raises(DataError, match=r"data.name was './missing' .* cannot be loaded"):
        read("hf", name="./missing")


# -- the standard library ---------------------------------------------------------------------------------------------


def test_standard_library_is_the_same_every_time():
    config = DataConfig(source="stdlib")
    found = files(config)
    assert found == sorted(found) == files(config) and source_digest(config) == source_digest(config)
    names = {path.name for path in found}
    assert {"argparse.py", "dataclasses.py", "_pydecimal.py"} <= names and all(name.endswith(".py") for name in names)
    parts = {part for path in found for part in path.relative_to(Path(os.__file__).parent).parts[:-1]}
    assert not parts & {"site-packages", "test", "tests", "__pycache__", "idle_test"}
    size = sum(len(document.text) for document in documents(config))
    assert size > 5e6


def test_standard_library_reads_declared_encodings_and_names_bad_ones(here, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(here))
    with pytest.raises(DataError, match=r"data.source was 'stdlib', but .* has no .py files; use data.source 'text'"):
        read("stdlib")
    write("a.py", "# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode("latin-1"))
    write("b.py", "# caf\u00e9\n")
    write("site-packages/c.py", "x")
    assert read("stdlib") == ["# -*- coding: latin-1 -*-\n# caf\u00e9\n".encode(), "# caf\u00e9\n".encode()]
    write("d.py", b"# \xff\n")
    with pytest.raises(DataError, match=r"d.py is not in the encoding that it declares"):
        read("stdlib")


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "text"}, "data.path was None; with data.source 'text' it must name files, folders or globs"),
        ({"source": "jsonl", "path": []}, r"data.path was \[\]; with data.source 'jsonl'"),
        ({"source": "stdlib", "path": "x"}, "data.path was 'x'; it must be null with data.source 'stdlib'"),
        ({"source": "hf"}, "data.name was None; with data.source 'hf' it must name a Hugging Face dataset"),
        ({"source": "csv"}, "data.source was 'csv'; it must be 'stdlib', .*'hf', 'corpus', 'mixture' or 'task'"),
        ({"surce": "text"}, "data.surce: unknown key 'surce' in data; did you mean 'source'?"),
        ({"validation_fraction": 0.7}, "data.validation_fraction was 0.7; it must be less than or equal to 0.5"),
        ({"documents": "padded"}, "data.documents was 'padded'; it must be 'stream', 'packed' or 'whole'"),
        ({"shard_tokens": 0}, "data.shard_tokens was 0; it must be greater than or equal to 1"),
        ({"source": "text", "path": "-"}, "data.folder was null; with data.path '-' it must name the corpus' folder"),
        ({"source": "text", "path": ["-", "a"]}, r"data.path was \['-', 'a'\] .*; '-' must stand alone, for text or"),
        ({"source": "parquet", "path": "-", "folder": "x"}, "'-' must stand alone, for text or jsonl"),
        ({"source": "corpus"}, "data.folder was null; with data.source 'corpus' it must name the corpus' folder"),
        ({"source": "mixture"}, "data.mixture had 0; with data.source 'mixture' it must have components"),
        ({"mixture": [{"folder": "x", "weight": 1}], "source": "stdlib"}, "data.mixture had 1; .* it must be empty"),
        ({"mixture": [{"folder": "x", "weight": 1}], "folder": "y"}, "data.folder was 'y'; it must be null beside"),
        ({"mixture": [{"folder": "x", "weight": 0}]}, "data.mixture.0.weight was 0; it must be greater than 0"),
        ({"mixture": [{"folder": "x"}]}, "data.mixture.0.weight"),
        (
            {"mixture": [{"path": "x", "weight": 1}]},
            "data.mixture.0: data.path was 'x'; it must be null with data.source 'corpus'",
        ),
        ({"mixture": [{"folder": "a/x", "weight": 1}, {"folder": "b/x", "weight": 1}]}, r"labels \['x', 'x'\]"),
        ({"reset": True}, "data.reset was True; it must be null or False with data.documents 'stream'"),
        (
            {"documents": "packed", "reset": False},
            "data.reset was False; it must be null or True with data.documents 'p",
        ),
    ],
)
def test_bad_keys_are_named(keys, message):
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, keys, place="data")


@pytest.mark.parametrize(
    ("source", "module"), [("jsonl", "zstandard"), ("parquet", "pyarrow.parquet"), ("hf", "datasets")]
)
def test_a_missing_package_is_named_with_its_extra(here, monkeypatch, source, module):
    write("x.jsonl.zst", b"x")
    write("x.parquet", b"x")
    monkeypatch.setitem(sys.modules, module, None)
    keys = {"name": "d"} if source == "hf" else {"path": {"jsonl": "x.jsonl.zst", "parquet": "x.parquet"}[source]}
    with pytest.raises(DataError, match=r"extra 'data': pip install 'palimpsest\[data\]'"):
        read(source, **keys)


def test_the_digest_sees_names_sizes_and_changes(here):
    config = DataConfig(source="text", path="*.txt")
    write("a.txt", "one")
    first = source_digest(config)
    os.utime("a.txt", ns=(0, 0))
    second = source_digest(config)
    write("b.txt", "two")
    assert len({first, second, source_digest(config)}) == 3
