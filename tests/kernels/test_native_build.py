"""Building the compiled kernels: what is refused, and what is said about it. Compilers here are little scripts."""

from __future__ import annotations

import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream.kernels.cpu import native as native_module
from slipstream.kernels.cpu import native_build
from slipstream.kernels.cpu.native import SWITCH, native
from slipstream.kernels.cpu.native_build import NativeBuildError, library

VERSION = 'if [ "$1" = --version ]; then echo "cc 1.0"; exit 0; fi\n'
WORKS = VERSION + 'while [ "$1" != -o ]; do shift; done\necho compiled >> "$2"\n'
FAILS = VERSION + 'echo "simd.h: In function sum:" >&2\necho "simd.h:3: error: no vectors" >&2\nexit 1\n'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that only its owner can write to, as caches should be."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    return folder


def with_compiler(place: Path, script: str) -> dict[str, str]:
    path = place / "compiler"
    path.write_text("#!/bin/sh\n" + script, encoding="utf-8")
    path.chmod(0o700)
    return {"CC": str(path), "XDG_CACHE_HOME": str(place / "cache"), "PATH": "/usr/bin:/bin"}


def test_a_library_is_built_once_into_a_private_folder(place: Path) -> None:
    environment = with_compiler(place, WORKS)
    built = library(environment)
    assert built.read_text(encoding="utf-8") == "compiled\n"
    assert [path.name for path in built.parent.iterdir()] == [built.name], "nothing else is left"
    assert built.is_relative_to(place / "cache" / "slipstream" / "native")
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700
    assert not built.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert library(environment) == built
    assert built.read_text(encoding="utf-8") == "compiled\n", "the second time it is only found"


def test_another_compiler_or_source_has_another_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library(with_compiler(place, WORKS))
    second = library(with_compiler(place, WORKS.replace("1.0", "2.0")))
    sources = place / "sources"
    sources.mkdir()
    (sources / "other.c").write_text("int other;\n", encoding="utf-8")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    third = library(with_compiler(place, WORKS))
    assert len({first, second, third}) == 3


def test_several_at_once_get_one_whole_library(place: Path) -> None:
    environment = with_compiler(place, WORKS)
    with ThreadPoolExecutor(6) as pool:
        built = set(pool.map(lambda _: library(environment), range(12)))
    (path,) = built
    assert path.read_text(encoding="utf-8") == "compiled\n"
    assert [left.name for left in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (FAILS, "simd.h:3: error: no vectors; set CC"),
        (VERSION + "exit 1\n", "failed: no message; set CC"),
        ("echo broken >&2; exit 3\n", "--version failed: broken; set CC to a C compiler"),
    ],
)
def test_a_compiler_that_fails_is_quoted(place: Path, script: str, message: str) -> None:
    with pytest.raises(NativeBuildError, match="compiler") as caught:
        library(with_compiler(place, script))
    assert message in str(caught.value)
    assert not list(place.rglob("*.so"))


def test_no_compiler(place: Path) -> None:
    environment = {"PATH": str(place), "XDG_CACHE_HOME": str(place)}
    with pytest.raises(NativeBuildError, match="no C compiler; install gcc or clang, or set CC"):
        library(environment)
    with pytest.raises(NativeBuildError, match="no 'nothing', which CC names"):
        library({**environment, "CC": "nothing"})


def test_a_compiler_that_hangs_is_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "TIMEOUT_S", 0.5)
    with pytest.raises(NativeBuildError, match="took more than"):
        library(with_compiler(place, VERSION + "exec tail -f /dev/null\n"))
    assert not list(place.rglob("*.so"))


@pytest.mark.parametrize("level", ["cache", "cache/slipstream", "cache/slipstream/native"])
def test_a_folder_that_others_can_write_to_is_refused(place: Path, level: str) -> None:
    environment = with_compiler(place, WORKS)
    library(environment)
    (place / level).chmod(0o770)
    with pytest.raises(NativeBuildError, match=r"others than its owner can change; chmod go-w .*XDG_CACHE_HOME"):
        library(environment)


def test_a_library_that_others_can_write_to_is_refused(place: Path) -> None:
    environment = with_compiler(place, WORKS)
    library(environment).chmod(0o722)
    with pytest.raises(NativeBuildError, match=r"kernels\.so"):
        library(environment)


def test_a_library_that_is_a_link_is_refused(place: Path) -> None:
    environment = with_compiler(place, WORKS)
    built = library(environment)
    built.rename(place / "elsewhere.so")
    built.symlink_to(place / "elsewhere.so")
    with pytest.raises(NativeBuildError, match=r"kernels\.so"):
        library(environment)


def test_a_cache_that_cannot_be_made_says_which(place: Path) -> None:
    environment = with_compiler(place, WORKS)
    (place / "cache").write_text("a file", encoding="utf-8")
    with pytest.raises(NativeBuildError, match=r"cannot keep compiled kernels in .*set XDG_CACHE_HOME"):
        library(environment)


@pytest.fixture
def _fresh() -> object:
    native.cache_clear()
    yield
    native.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_without_a_library_there_is_one_line_and_torch(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in with_compiler(place, FAILS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SWITCH, raising=False)
    with caplog.at_level(logging.INFO):
        assert native() is None
        assert native() is None
    (record,) = (record for record in caplog.records if record.name == native_module.__name__)
    assert "torch's operations take their place" in record.message
    assert "error: no vectors" in record.message


@pytest.mark.usefixtures("_fresh")
def test_a_library_that_cannot_be_loaded_leaves_torch(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in with_compiler(place, WORKS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SWITCH, raising=False)
    assert native() is None
    assert "cannot be loaded" in caplog.text


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_it_can_be_switched_off_and_is_quiet_then(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SWITCH, value)
    assert native() is None
    assert not caplog.records
