"""Configuration files, installed with the package, and the one function that finds them."""

from pathlib import Path

HERE = Path(__file__).parent


def find_config(name: str | Path) -> Path:
    """The file of a configuration given as a path, or as a name inside ``configs/``.

    ``find_config("tiny/titans_mag")``, ``find_config("configs/tiny/titans_mag.yaml")`` and a path of one's own
    all work, in a checkout and from an installed wheel. A file that exists at the given path wins.

    Raises:
        FileNotFoundError: naming the places that were looked at.
    """
    given = Path(name)
    inside = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    tried = [given, HERE / inside]
    if inside.suffix != ".yaml":
        tried.append(HERE / inside.with_name(inside.name + ".yaml"))
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"config {str(name)!r} not found; looked at {', '.join(str(path) for path in tried)}")
