"""Building llama.cpp's own programs: flags and the cache; the build itself is run by `make bench`."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import pytest

from bench import reference


def built(root: Path, flags: tuple[str, ...]) -> None:
    home = root / f"llama-cpp-python-{metadata.version('llama-cpp-python')}"
    (home / "build" / "bin").mkdir(parents=True)
    for target in reference.TARGETS:
        (home / "build" / "bin" / target).touch()
    (home / "built").write_text("\n".join((metadata.version("llama-cpp-python"), *flags)))


@pytest.mark.skipif(shutil.which("sh") is None, reason="the flags come from a shell script")
def test_a_finished_build_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BUILD", tmp_path)
    built(tmp_path, (*reference.CMAKE_FLAGS, *reference.machine_flags()))
    found = reference.ensure()
    assert found.server.is_file()
    assert found.rpc_server.is_file()


@pytest.mark.skipif(shutil.which("sh") is None, reason="the flags come from a shell script")
def test_a_build_with_other_flags_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BUILD", tmp_path)
    built(tmp_path, ("-DCMAKE_BUILD_TYPE=Debug",))
    asked: list[str] = []

    def refuse(version: str, into: Path) -> Path:
        asked.append(version)
        raise LookupError(version)

    monkeypatch.setattr(reference, "fetch_source", refuse)
    with pytest.raises(LookupError):
        reference.ensure()
    assert asked == [metadata.version("llama-cpp-python")]


def test_flags_with_spaces_stay_one_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_C_FLAGS='-O2 -g' -DGGML_BLAS=ON")
    assert reference.machine_flags()[-2:] == ("-DCMAKE_C_FLAGS=-O2 -g", "-DGGML_BLAS=ON")


def test_a_failed_build_ends_with_the_logs_end(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    with pytest.raises(SystemExit, match=r"build\.log") as caught:
        reference._cmake(tmp_path / "nowhere", tmp_path / "build", (), 1, tmp_path / "build.log")
    assert "nowhere" in str(caught.value)


def test_programs_find_their_libraries() -> None:
    made = reference.Reference("0", Path("some/bin"), ()).environment()
    assert any(
        value.split(":")[0] == str(Path("some/bin")) for key, value in made.items() if key.endswith("LIBRARY_PATH")
    )
