"""What a placed rank says and refuses before there are others, and what it counts as its own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from slipstream.comm.mesh import MeshShape
from slipstream.runtime.worker.launch import check_devices
from slipstream.runtime.worker.placed_rank import LoadedLines, check_address, interface_of
from slipstream.runtime.worker.rank import rank_device
from slipstream.sdk.errors import ConfigError
from slipstream.tests.worker.test_rank_order import SETUP

ON_GPUS = replace(SETUP, device="cuda", tp=2, pp=1)


def said(capsys: pytest.CaptureFixture[str]) -> list[float]:
    return [json.loads(line)["loaded"] for line in capsys.readouterr().out.splitlines()]


def test_progress_is_said_in_few_lines_up_to_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LoadedLines()
    for number in range(1, 1001):
        lines(number / 1000)
    shares = said(capsys)
    assert len(shares) == 20 and shares == sorted(set(shares))
    assert shares[0] == 0.05 and shares[-1] == 1.0


def test_a_single_large_weight_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = LoadedLines()
    for share in (0.01, 0.97, 0.98, 1.0):
        lines(share)
    assert said(capsys) == [0.97, 1.0]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("0.0.0.0", "every address"),
        ("::", "every address"),
        ("192.0.2.1", "must be this node's own"),
        ("", "must be this node's own"),
        ("no such host", "must be this node's own"),
    ],
)
def test_addresses_by_which_nobody_reaches_this_node_are_refused(address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^address: .*{why}"):
        check_address(address)


def test_an_address_of_this_node_has_an_interface() -> None:
    check_address("127.0.0.1")
    check_address("127.0.0.3")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_a_rank_computes_on_the_only_gpu_that_it_sees_or_else_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, devices in ((1, ["cuda:0", "cuda:0"]), (2, ["cuda:0", "cuda:1"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert [str(rank_device(ON_GPUS, rank)) for rank in (0, 1)] == devices
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch sees none where rank 1 is"):
        rank_device(ON_GPUS, 1)
    assert str(rank_device(SETUP, 1)) == "cpu"


def test_placed_ranks_have_one_gpu_each_and_ranks_of_one_process_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, gpu = MeshShape(tp=2), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(gpu, mesh, placed=True)
    with pytest.raises(ConfigError, match="2 ranks need a GPU each, torch sees 1"):
        check_devices(gpu, mesh)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(gpu, mesh)
    with pytest.raises(ConfigError, match="torch sees 2: set CUDA_VISIBLE_DEVICES"):
        check_devices(gpu, mesh, placed=True)
    check_devices(gpu, MeshShape(), placed=True)
