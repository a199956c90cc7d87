"""Files that the package brings, by name: recipes of the paper's experiments, accelerate configs and chat templates."""

import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

_FOLDER = Path(__file__).parent
_FILES = {
    "recipe": _FOLDER.glob("*.yaml"),
    "accelerate config": (_FOLDER / "accelerate").glob("*.yaml"),
    "chat template": (_FOLDER / "chat_templates").glob("*.jinja"),
}
SHIPPED: dict[str, dict[str, Path]] = {}  # kind -> name -> file
for _kind, _files in _FILES.items():
    SHIPPED[_kind] = {file.stem: file for file in sorted(_files)}


def find_file(kind: str, name: str) -> Path:
    """The file at the path `name`, or the shipped file of that name.

    Raises:
        ValueError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = SHIPPED[kind]
    if name in shipped:
        return shipped[name]
    suggestion = did_you_mean(name, list(shipped)) or similar_path(name)
    raise ValueError(
        f"Got {name!r} as {kind}, expected a file or a name that `trl-miso recipes` lists.{suggestion} Fix: correct it."
    )


def check_path(name: str, suffixes: Collection[str] = ()) -> None:
    """Raise ValueError if `name` can only be a path, by its form or its suffix, and nothing is there."""
    if "://" in name or Path(name).exists():
        return
    is_file_name = "/" not in name and re.search(r"\.[a-z]+$", name)
    if is_file_name or Path(name).suffix in suffixes or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"Got {name!r}, which does not exist.{similar_path(name)} Fix: correct the path.")


def similar_path(name: str) -> str:
    """A suggestion for a path that does not exist, with a leading space; empty if nothing beside it is close."""
    path = Path(name)
    if not path.parent.is_dir():
        return similar_path(str(path.parent)) if len(path.parts) > 1 else ""
    close = get_close_matches(path.name, [neighbour.name for neighbour in path.parent.iterdir()], n=1)
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""


def did_you_mean(name: str, names: list[str]) -> str:
    """`Did you mean 'x'?` with the closest of the names and a leading space; empty if none is close."""
    close = get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
