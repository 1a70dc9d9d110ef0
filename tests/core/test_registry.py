"""Registries: filled by the files of a package at the first look-up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hfq.core.errors import UnknownNameError
from hfq.core.registry import Registry

PACKAGE = "colours"


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    """A registry whose package has two modules that are not imported yet."""
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from hfq.core.registry import Registry\nCOLOURS = Registry('colour', __name__)\n"
    )
    for name, value in (("red", 1), ("blue", 2)):
        text = f"from . import COLOURS\nCOLOURS.register({name!r}, {value})\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    registry: Registry[int] = __import__(PACKAGE).COLOURS
    return registry


def test_modules_are_imported_at_the_first_look_up(colours: Registry[int]) -> None:
    assert f"{PACKAGE}.red" not in sys.modules
    assert colours.get("red") == 1
    assert colours.names() == ("blue", "red")


def test_an_unknown_name_is_answered_with_the_known_ones(colours: Registry[int]) -> None:
    with pytest.raises(UnknownNameError) as error:
        colours.get("bleu")
    assert str(error.value) == (
        "unknown colour 'bleu': expected one of blue, red. Did you mean 'blue'?"
    )


@pytest.mark.parametrize("name", [None, 3, ["red"]])
def test_a_name_of_the_wrong_type_is_unknown(colours: Registry[int], name: object) -> None:
    with pytest.raises(UnknownNameError, match="expected one of blue, red"):
        colours.get(name)  # type: ignore[arg-type]


def test_a_name_is_registered_once(colours: Registry[int]) -> None:
    colours.register("green", 3)
    with pytest.raises(ValueError, match="colour 'green' is registered twice"):
        colours.register("green", 4)


def test_a_failed_import_is_seen_and_tried_again(colours: Registry[int], tmp_path: Path) -> None:
    broken = tmp_path / PACKAGE / "yellow.py"
    broken.write_text("import a_module_that_nobody_has\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            colours.names()
    broken.unlink()
    assert colours.names() == ("blue", "red")


def test_the_package_is_searched_once(colours: Registry[int], tmp_path: Path) -> None:
    """Look-ups happen for every weight of a model."""
    assert colours.names() == ("blue", "red")
    (tmp_path / PACKAGE / "late.py").write_text("raise AssertionError('imported')\n")
    assert colours.names() == ("blue", "red") and colours.get("red") == 1
