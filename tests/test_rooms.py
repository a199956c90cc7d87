"""The rooms of the package keep to the table in CONTRIBUTING.md: who may import whom, and no circles."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trl_miso"
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def allowed_imports(text: str) -> dict[str, set[str]]:
    """The table of rooms: room -> the rooms that it may import."""
    rows = re.findall(r"^\| `(\w+)` +\| ([^|]+)\|", text, flags=re.MULTILINE)
    rooms = {room: set(re.findall(r"`(\w+)`", imports)) for room, imports in rows}
    everything = {room for room, imports in rows if imports.strip() == "everything"}
    return rooms | {room: set(rooms) - {room, "__main__"} for room in everything}


def imports_of(source: str) -> list[tuple[str, list[str]]]:
    """(module, imported names) for each import of the package, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl_miso":
            found.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names if alias.name.split(".")[0] == "trl_miso"]
    return found


def violations(files: dict[str, str], allowed: dict[str, set[str]]) -> list[str]:
    """What breaks the rules, in files given as path below the package -> source."""
    broken = []
    for path, source in files.items():
        room = path.split("/")[0].removesuffix(".py")
        for module, names in imports_of(source):
            other = module.split(".")[1] if "." in module else ""
            if room != "__init__" and other not in allowed[room] | {room}:
                broken.append(f"{path} imports {module or 'trl_miso'}: {room} may import {sorted(allowed[room])}")
            broken += [f"{path} imports {module}.{name}" for name in names if name.startswith("_") and name[1] != "_"]
    return broken


@pytest.fixture(scope="module")
def allowed():
    if not CONTRIBUTING.exists():
        pytest.skip("CONTRIBUTING.md, which has the table of rooms, is not part of this copy")
    return allowed_imports(CONTRIBUTING.read_text(encoding="utf-8"))


def test_every_room_is_in_the_table(allowed):
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(allowed) == rooms - {"__init__", "__pycache__", ".agents"}


def test_the_table_has_no_circle(allowed):
    """Rooms whose imports are all removed can be removed, until none is left."""
    left = dict(allowed)
    while left:
        removable = [room for room, imports in left.items() if not imports & set(left)]
        assert removable, f"these rooms import each other: {sorted(left)}"
        for room in removable:
            del left[room]


def test_imports_keep_to_the_table(allowed):
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert violations(files, allowed) == []


@pytest.mark.parametrize(
    "source",
    [
        "from trl_miso.training import trainer",
        "import trl_miso.training.trainer",
        "from trl_miso import MISOSFTTrainer",
        "def late():\n    from trl_miso.cli.main import main",
        "from trl_miso.segments.packed import _place",
    ],
)
def test_a_forbidden_import_is_found(source, allowed):
    assert violations({"data/contexts.py": source}, allowed)
