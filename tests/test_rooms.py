"""The contract between the rooms of docs/architecture.md, which `make check` holds: it notices whoever breaks it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LINT = """
import sys
# The package that is installed for development would be looked at instead of the copy.
sys.meta_path = [each for each in sys.meta_path if "editable" not in type(each).__module__.lower()]
sys.path.insert(0, ".")
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml"))
"""

OWNERS = {
    "llama_cpp": {"llama"},
    "zmq": {"swarm"},
    "aiohttp": {"api", "commands", "models"},
    "_native": {"llama", "kv", "worker"},
}
"""Who may import what."""


def levels() -> list[list[str]]:
    """The rooms, level by level, the highest first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    found = next(each for each in config["contracts"] if each["type"] == "layers")
    assert found["exhaustive"]
    return [level.split(" | ") for level in found["layers"]]


ROOMS = [room for level in levels() for room in level]


class House:
    """A copy of the package in which imports can be planted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.planted = 0
        shutil.copy(ROOT / "pyproject.toml", root)
        shutil.copytree(ROOT / "swarmcpp", root / "swarmcpp", ignore=shutil.ignore_patterns("*.gguf", "__pycache__"))

    def plant(self, room: str, line: str) -> str:
        """Let `room` have an import inside a function; the name of the module that has it."""
        package = self.root / "swarmcpp" / room
        if not package.is_dir():
            target, name = package.with_suffix(".py"), f"swarmcpp.{room}"
        else:
            target, name = package / "planted.py", f"swarmcpp.{room}.planted"
        self.planted += 1
        with target.open("a") as file:
            file.write(f"\n\ndef planted_{self.planted}() -> None:\n    {line}\n")
        return name

    def lint(self) -> tuple[int, str]:
        """What import-linter says of it."""
        done = subprocess.run([sys.executable, "-c", LINT], cwd=self.root, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_the_contract_is_kept(house: House) -> None:
    code, said = house.lint()
    assert code == 0, said


def test_at_most_twelve_levels() -> None:
    assert len(levels()) <= 12


def test_every_room_that_takes_what_it_may_not_is_caught(house: House) -> None:
    planted = [
        (house.plant(room, f"import {package}"), package)
        for package, owners in OWNERS.items()
        if package != "_native"
        for room in ROOMS
        if room not in owners
    ]
    code, said = house.lint()
    assert code == 1
    missed = [each for each in planted if "{} -> {} ".format(*each) not in said]
    assert not missed, said


def test_every_import_of_a_higher_room_or_a_neighbour_is_caught(house: House) -> None:
    planted: list[tuple[str, str]] = []
    above: list[str] = []
    for level in levels():
        for room in level:
            others = [*above[-1:], *(each for each in level if each != room)]
            planted += [(house.plant(room, f"import swarmcpp.{other}"), f"swarmcpp.{other}") for other in others]
        above += level
    code, said = house.lint()
    assert code == 1
    missed = [each for each in planted if "{} -> {} ".format(*each) not in said]
    assert not missed, said


def test_a_room_that_the_contract_does_not_know_is_caught(house: House) -> None:
    for name in ("attic", "cellar"):
        (house.root / "swarmcpp" / name).mkdir()
        (house.root / "swarmcpp" / name / "__init__.py").write_text("")
    (house.root / "swarmcpp" / "shed.py").write_text("")
    code, said = house.lint()
    assert code == 1 and all(name in said for name in ("attic", "cellar", "shed")), said


def test_the_fakes_stand_on_the_ground_and_nothing_stands_on_them(house: House) -> None:
    planted = [(house.plant("testing", f"import swarmcpp.{room}"), f"swarmcpp.{room}") for room in ("files", "node")]
    planted.append((house.plant("kv", "import swarmcpp.testing"), "swarmcpp.testing"))
    code, said = house.lint()
    assert code == 1
    missed = [each for each in planted if "{} -> {} ".format(*each) not in said]
    assert not missed, said


def test_a_circle_within_a_room_is_caught(house: House) -> None:
    (house.root / "swarmcpp" / "kv" / "one.py").write_text("def f() -> None:\n    import swarmcpp.kv.two\n")
    (house.root / "swarmcpp" / "kv" / "two.py").write_text("import swarmcpp.kv.one\n")
    code, said = house.lint()
    assert code == 1 and "swarmcpp.kv" in said, said


def test_the_walks_of_the_docs_lead_through_functions_that_are_there() -> None:
    steps = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(steps) > 60
    defined = {
        file: {
            node.name for node in ast.walk(ast.parse((ROOT / "swarmcpp" / file).read_text())) if hasattr(node, "name")
        }
        for file, _ in steps
    }
    assert not [f"{file}:{name}" for file, name in steps if name not in defined[file]]


@pytest.mark.parametrize("line", ["from swarmcpp import _native", "from swarmcpp._native import abort_generation"])
def test_native_code_has_its_users(house: House, line: str) -> None:
    for room in ROOMS:
        house.plant(room, line)
    ruff = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "json", "swarmcpp"]
    done = subprocess.run(ruff, cwd=house.root, capture_output=True, text=True, check=False)
    found = {Path(each["filename"]).relative_to(house.root / "swarmcpp") for each in json.loads(done.stdout)}
    assert {path.parts[0].removesuffix(".py") for path in found} == set(ROOMS) - OWNERS["_native"]
