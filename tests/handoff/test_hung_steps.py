"""Steps that hang on either side for longer than a lease: what keeps transfers alive does not depend on them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from slipstream.runtime.clock import monotonic_clock
from slipstream.runtime.rpc.in_process import InProcessEngineClient
from slipstream.tests.engine.builders import request
from slipstream.tests.fakes.oracle_executor import expected_tokens
from slipstream.tests.fakes.split_bench import QUICK, SplitBench
from slipstream.tests.handoff.split_ways import PATIENCE_S, all_free, send_from, until, wait_at

PROMPT = [(5 * place) % 80 for place in range(30)]
LEASES = 3


def test_a_transfer_outlives_steps_that_hang() -> None:
    async def test(bench: SplitBench) -> None:
        prefill = bench.start("p", role="prefill", gate_open=False)
        decode = bench.start("d", role="decode", gate_open=False)
        clients = [InProcessEngineClient(each.loop) for each in (prefill, decode)]
        for client in clients:
            await client.connect(timeout_s=PATIENCE_S)
        to_prefill, to_decode = clients
        # A step that hangs at the one that will go on; the prompt's own hangs at the other.
        busy = wait_at(to_decode, request("busy", [1, 2, 3], seed=1, max_tokens=4), "")
        wanted = request("r", PROMPT, seed=7, max_tokens=9)
        waits = wait_at(to_decode, wanted, "t")
        sent = send_from(to_prefill, wanted, decode.send_to("t"))
        await until(lambda: bool(decode.scheduler.loans))
        begun_s = monotonic_clock()
        await until(lambda: monotonic_clock() > begun_s + LEASES * QUICK.lease_s)
        assert decode.scheduler.loans and prefill.scheduler.loans, "the lease ran out"
        for replica in (prefill, decode):
            replica.gate.open()
        ended = await sent
        assert ended.report is not None and ended.report.ending == "committed"
        assert (await waits).tokens == expected_tokens(PROMPT, 7, 9)
        assert (await busy).tokens == expected_tokens([1, 2, 3], 1, 4)
        for client in clients:
            await all_free(client)
            await client.close()

    async def bounded(bench: SplitBench) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test(bench)

    with ExitStack() as stack:
        asyncio.run(bounded(SplitBench(stack)))
