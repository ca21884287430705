"""Folders go with their processes: closed, or killed and found by the next."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slipstream.runtime.handoff.own_folder import OwnFolder

_OTHER = """
import sys
from slipstream.runtime.handoff.own_folder import OwnFolder
print(OwnFolder().path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_is_there_until_it_is_closed(root: Path) -> None:
    first, second = OwnFolder(), OwnFolder()
    (first.path / "shm").touch()
    assert first.path.parent == root and first.path != second.path
    first.close()
    first.close()
    assert not first.path.exists() and second.path.exists()
    second.close()
    assert not list(root.iterdir())


def test_what_a_killed_process_left_goes_and_nothing_else(root: Path) -> None:
    unfinished, strange = root / "slipstream-kv-unfinished", root / "slipstream-kv-file"
    unfinished.mkdir()
    strange.touch()
    command = [sys.executable, "-P", "-c", _OTHER]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        OwnFolder().close()
        assert left.exists(), "its process lives"
        other.kill()
        other.wait()
        assert left.exists()
        OwnFolder().close()
    assert not left.exists()
    assert unfinished.exists() and strange.exists()
