"""The note of the Ray that was started here, and ending exactly the process that it names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slipstream.runtime.controller.launch import MARK_VARIABLE
from slipstream.runtime.controller.local_ray import LocalRay, LocalRays, own_devices, state_folder
from slipstream.runtime.controller.marked_processes import ProcessMark, end_marked, end_tree, marked, process_mark
from slipstream.runtime.controller.records import to_json

# A process with a child of its own, both of which last until they are ended.
_PROGRAM = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={MARK_VARIABLE: "chat/17"},
    ) as started:
        yield started
        started.kill()


def child_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def there(pid: int) -> bool:
    return process_mark(pid) is not None


def noted(folder: Path, mark: ProcessMark) -> LocalRays:
    (folder / "ray.json").write_text(to_json(LocalRay(address="127.0.0.1:1", process=mark)), encoding="utf-8")
    return LocalRays(folder)


def test_the_one_that_is_noted_is_found_and_ended_with_all_it_has_started(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    child = child_of(process)
    mark = process_mark(process.pid)
    assert mark is not None
    rays = noted(tmp_path, mark)
    found = rays.find()
    assert found is not None and found.address == "127.0.0.1:1"
    assert rays.end() and rays.find() is None and not (tmp_path / "ray.json").exists()
    assert not there(child) and not there(process.pid)
    assert not rays.end()


def test_another_process_with_its_number_is_left_alone(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    child = child_of(process)
    mark = process_mark(process.pid)
    assert mark is not None
    rays = noted(tmp_path, replace(mark, born_s=mark.born_s - 60.0))
    assert rays.find() is None and not rays.end()
    assert not end_tree(replace(mark, born_s=mark.born_s + 60.0), patience_s=1.0)
    assert there(process.pid) and there(child)
    assert end_tree(mark, patience_s=10.0)
    process.wait(10)
    assert not end_tree(mark, patience_s=1.0)


def test_a_note_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "ray.json").write_text("{", encoding="utf-8")
    assert LocalRays(tmp_path).find() is None and LocalRays(tmp_path / "nowhere").find() is None


def test_processes_are_known_by_their_mark(process: subprocess.Popen[bytes]) -> None:
    child = child_of(process)
    assert sorted(marked("chat/17")) == sorted([process.pid, child]) and marked("chat/1") == []
    end_marked("chat/1")
    assert there(process.pid)
    end_marked("chat/17")
    process.wait(10)
    assert marked("chat/17") == []


def test_where_notes_are_and_what_the_machine_has(tmp_path: Path) -> None:
    assert state_folder({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "slipstream"
    assert state_folder({}).parts[-3:] == (".local", "state", "slipstream")
    assert own_devices(2, has_gpus=False) == {"slipstream_device_0": 1.0, "slipstream_device_1": 1.0}
    assert own_devices(1, has_gpus=False) == own_devices(2, has_gpus=False)
    assert own_devices(2, has_gpus=True) == {}
