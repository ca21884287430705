"""Virtual environments for clients of other people: each its own, so that none meets Slipstream's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_INSTALL_TIMEOUT_S = 1800
_SHOWN_CHARS = 400


class ClientEnvironment:
    """Programs of one client, installed once into a folder that outlives the run."""

    def __init__(self, folder: Path, home: Path) -> None:
        self._folder = folder
        self._home = home

    def run(self, program: str, arguments: Sequence[str], *, cwd: Path, timeout_s: float) -> str:
        """Run one of its programs without network but loopback; return what it printed."""
        # Ours name our own packages; theirs must not see them.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self._home)}
        command = [str(self._folder / "bin" / program), *arguments]
        done = subprocess.run(
            command, cwd=cwd, env={**kept, **offline, "COLUMNS": "160"}, timeout=timeout_s, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, f"{program} ended with status {done.returncode}"
        return done.stdout


def client_environment(config: pytest.Config, name: str, requirements: Sequence[str], home: Path) -> ClientEnvironment:
    """Return a client's environment, made with pip when it is not there; skip the test when pip cannot.

    ``requirements`` are installed one after another: torch first decides which build the rest is content with.
    """
    assert config.cache is not None
    folder = config.cache.mkdir("slipstream-clients") / name
    stamp, wanted = folder / "installed.txt", "\n".join(requirements)
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=_INSTALL_TIMEOUT_S)
        for requirement in requirements:
            _install(folder, requirement)
        stamp.write_text(wanted, encoding="utf-8")
    return ClientEnvironment(folder, home)


def _install(folder: Path, requirement: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not install {requirement} within {_INSTALL_TIMEOUT_S} s")
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {requirement}: {done.stderr.strip()[-_SHOWN_CHARS:]}")
