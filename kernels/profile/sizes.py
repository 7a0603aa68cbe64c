"""Sizes of workloads, letter by letter, as commands read and write them."""

from collections.abc import Mapping

Sizes = Mapping[str, int]


def parse_sizes(words: list[str]) -> dict[str, int]:
    """``T=16k B=2`` as sizes; k is 1024.

    Raises:
        ValueError: for a word that is not LETTER=NUMBER.
    """
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        if len(name) != 1 or not number.removesuffix("k").isdigit():
            raise ValueError(f"size was {word!r}; it must be a letter, '=' and a number, as in T=16k")
        found[name] = int(number.removesuffix("k")) * (1024 if number.endswith("k") else 1)
    return found


def parse_sweep(text: str) -> list[dict[str, int]]:
    """``T=1k..64k`` as the sizes T = 1024, 2048, … 65536; ``T=1k,3k`` as those two."""
    name, _, rest = text.partition("=")
    if ".." not in rest:
        return [parse_sizes([f"{name}={number}"]) for number in rest.split(",")]
    low, high = (parse_sizes([f"{name}={number}"])[name] for number in rest.split("..", 1))
    if not 0 < low <= high:
        raise ValueError(f"sweep was {text!r}; it must go up, as in T=1k..64k")
    return [{name: low << i} for i in range((high // low).bit_length())]


def written(sizes: Sizes) -> str:
    """``B8 T4096 H16 D64``."""
    return " ".join(f"{name}{number}" for name, number in sizes.items())
