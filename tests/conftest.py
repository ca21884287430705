"""What all tests share: one seed for a whole run, printed and repeatable, and a sane number of threads."""

from __future__ import annotations

import random
import zlib

import hypothesis
import pytest

hypothesis.settings.register_profile("slipstream", deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile("slipstream")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of every random draw, hypothesis' included")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32)
    if config.getoption("--hypothesis-seed", default=None) is None:
        config.option.hypothesis_seed = str(config.option.seed)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (repeat this run's draws with --seed {config.option.seed})"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this test's own: the same for the same ``--seed``, whatever other tests run."""
    run_seed: int = request.config.option.seed
    own = zlib.crc32(f"{run_seed}/{request.node.nodeid}".encode())
    print(f"seed {own} (from --seed {run_seed})")
    return own


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """One thread: the tensors are tiny, and threads waiting for each other on a busy machine cost far more."""
    try:
        import torch  # noqa: PLC0415 (the tests of the light client run without it)
    except ModuleNotFoundError:
        return
    torch.set_num_threads(1)
