"""The choice of configurations: what is measured when, what is kept, and what a damaged or foreign file does."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slipstream.kernels import tuning
from slipstream.kernels.launch import HAS_TRITON, KernelConfig, launch
from slipstream.kernels.tuning import Run, Tuning, kernel_version, tuning_path, use_tuning

if HAS_TRITON:
    from triton.runtime.errors import OutOfResources

FIRST, SECOND, THIRD = (KernelConfig(tiles={"BLOCK": block}) for block in (32, 64, 128))
CONFIGS = (FIRST, SECOND, THIRD)


def some_kernel() -> None: ...


class TooLarge:
    """A kernel that no device has room for, as Triton says it."""

    __name__ = "too_large"

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def refuse(**_: object) -> None:
            raise OutOfResources(1 << 20, 1 << 16, "shared memory")

        return refuse


def other_kernel() -> None: ...


class Bench:
    """Configurations with known speeds; ``tried`` are those that were measured."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.tried: list[int] = []

    def attempt(self, config: KernelConfig) -> None:
        self.tried.append(config.tiles["BLOCK"])
        if config.tiles["BLOCK"] not in self.seconds:
            launch(TooLarge(), (1,), config)

    def time(self, run: Run) -> float:
        run()
        return self.seconds[self.tried[-1]]

    def tuning(self, path: Path, device: str = "gpu") -> Tuning:
        return Tuning(path, device, self.time)


@pytest.fixture(autouse=True)
def _no_tuning_left() -> Iterator[None]:
    yield
    use_tuning(None)


def test_the_fastest_is_found_while_warming_up_and_known_ever_after(tmp_path: Path) -> None:
    bench, path = Bench({32: 3.0, 64: 1.0, 128: 2.0}), tmp_path / "cache" / "gpu.json"
    known = bench.tuning(path)
    assert known.choose(some_kernel, ("bf16", 16), CONFIGS, bench.attempt) is FIRST
    assert not bench.tried, "nothing is measured while requests are served"
    with known.measuring():
        assert known.choose(some_kernel, ("bf16", 16), CONFIGS, bench.attempt) is SECOND
    assert sorted(bench.tried) == [32, 64, 128]
    known.save()
    assert known.measured == 0
    again = bench.tuning(path)
    bench.tried.clear()
    with again.measuring():
        assert again.choose(some_kernel, ("bf16", 16), CONFIGS, bench.attempt) is SECOND
    assert again.choose(some_kernel, ("bf16", 32), CONFIGS, bench.attempt) is FIRST, "another bucket"
    assert again.choose(other_kernel, ("bf16", 16), CONFIGS, bench.attempt) is FIRST, "another kernel"
    assert not bench.tried


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here: pip install triton")
def test_what_does_not_fit_the_device_is_not_chosen(tmp_path: Path) -> None:
    bench = Bench({32: 3.0, 128: 2.0})
    known = bench.tuning(tmp_path / "gpu.json")
    with known.measuring():
        assert known.choose(some_kernel, (1,), CONFIGS, bench.attempt) is THIRD


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 0}',
        '{"format": 1, "device": "gpu", "choices": {"key": 3}}',
        '{"format": 1, "device": "gpu"}',
    ],
)
def test_a_damaged_file_counts_as_empty_and_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    bench = Bench({32: 3.0, 64: 1.0, 128: 2.0})
    known = bench.tuning(path)
    with known.measuring():
        assert known.choose(some_kernel, (1,), CONFIGS, bench.attempt) is SECOND
    known.save()
    assert list(json.loads(path.read_text())["choices"].values()) == [str(SECOND)]


def test_a_configuration_that_is_gone_and_another_device_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    bench = Bench({32: 3.0, 64: 1.0, 128: 2.0})
    known = bench.tuning(path)
    with known.measuring():
        known.choose(some_kernel, (1,), CONFIGS, bench.attempt)
    known.save()
    assert bench.tuning(path).choose(some_kernel, (1,), (FIRST, THIRD), bench.attempt) is FIRST
    assert bench.tuning(path, "another gpu").choose(some_kernel, (1,), CONFIGS, bench.attempt) is FIRST


def test_entries_of_older_kernels_go(tmp_path: Path) -> None:
    path, version = tmp_path / "gpu.json", kernel_version(some_kernel)
    choices = {"some_kernel 0123 1": str(SECOND), f"other_kernel {version} 1": str(THIRD)}
    path.write_text(json.dumps({"format": 1, "device": "gpu", "choices": choices}))
    bench = Bench({32: 1.0, 64: 2.0, 128: 3.0})
    known = bench.tuning(path)
    with known.measuring():
        assert known.choose(some_kernel, (1,), CONFIGS, bench.attempt) is FIRST
    known.save()
    assert json.loads(path.read_text())["choices"] == {
        f"some_kernel {version} 1": str(FIRST),
        f"other_kernel {version} 1": str(THIRD),
    }


def _save_one(path: Path, bucket: int) -> None:
    bench = Bench({32: 3.0, 64: 1.0, 128: 2.0})
    known = bench.tuning(path)
    with known.measuring():
        known.choose(some_kernel, (bucket,), CONFIGS, bench.attempt)
    known.save()


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    context = multiprocessing.get_context("fork")
    savers = [context.Process(target=_save_one, args=(path, bucket)) for bucket in range(6)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join(60)
        assert saver.exitcode == 0
    assert len(json.loads(path.read_text())["choices"]) == 6


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    _save_one(tmp_path / "file" / "gpu.json", 1)
    assert "is not kept" in caplog.text


def test_launches_follow_the_tuning_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({32: 3.0, 64: 1.0, 128: 2.0})
    launched: list[tuple[tuple[int, ...], int]] = []

    def launch(kernel: object, grid: tuple[int, ...], config: KernelConfig, **arguments: object) -> None:
        assert arguments == {"size": 256}
        bench.attempt(config)
        launched.append((grid, config.tiles["BLOCK"]))

    def run() -> KernelConfig:
        return tuning.launch_tuned(
            some_kernel, lambda config: (256 // config.tiles["BLOCK"],), CONFIGS, ("bf16", 256), size=256
        )

    monkeypatch.setattr(tuning, "launch", launch)
    assert run() is FIRST, "without a tuning: the first, as in deterministic mode"
    known = bench.tuning(tmp_path / "gpu.json")
    use_tuning(known)
    assert run() is FIRST
    with known.measuring():
        assert run() is SECOND
    launched.clear()
    assert run() is SECOND
    assert launched == [((4,), 64)]


def test_where_it_is_kept(tmp_path: Path) -> None:
    kept = tuning_path({"XDG_CACHE_HOME": str(tmp_path)}, "NVIDIA H200 9.0 triton 3.6")
    assert kept == tmp_path / "slipstream" / "tuning" / "nvidia-h200-9-0-triton-3-6.json"
    assert tuning_path({"HOME": "/home/a"}, "x").is_relative_to("/home/a/.cache")
