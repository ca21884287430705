"""Two engines and an imagined way for KV between them: requests are computed at one, and go on at the other.

The KV that crosses is the oracle's, position by position, from and into the blocks that the two schedulers say; it
crosses whenever the seed wants, as far as steps have computed it. So a block that is given up too early, at either
side, or lent while a step still touches it, shows as a wrong token.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.messages import EngineRequest, FinishReason, StepPlan, StepResult
from slipstream.tests.engine.builders import Bench
from slipstream.tests.fakes.oracle_executor import LateOracleExecutor


class SendingOracle(LateOracleExecutor):
    """Notes how far the KV of each transfer is computed, and where it stands."""

    def __init__(self, *, num_blocks: int, block_size: int, max_slots: int, max_length: int) -> None:
        super().__init__(num_blocks=num_blocks, block_size=block_size, max_slots=max_slots, max_length=max_length)
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def compute(self, plan: StepPlan) -> StepResult:
        result = super().compute(plan)
        for row, number in zip(plan.sending_rows.tolist(), plan.sending_transfers.tolist(), strict=True):
            stop = int(plan.starts[row] + plan.counts[row])
            self.computed[number] = stop
            self.blocks[number] = self.table[plan.slots[row], : -(-stop // self.block_size)].tolist()
        return result


@dataclass
class Transfer:
    """A request's KV on its way; ``over``: nothing is copied any more, blocks are given back when the seed wants."""

    number: int
    request: EngineRequest
    tokens: int
    blocks: list[int] | None = None
    copied: int = 0
    token: int | None = None
    over: bool = False


@dataclass
class SplitWorld:
    """A prefill and a decode engine. ``tokens`` and ``endings`` are what a client of each request gets."""

    draw: random.Random
    prefill: Bench
    decode: Bench
    refusals: float = 0.1
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    aborted: set[str] = field(default_factory=set)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    committed: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        self.prefill.scheduler.attach(self)

    # ------------------------------------------------------------------ KvSending

    def start(self, sequence: Sequence) -> int | None:
        assert sequence.slot >= 0 and sequence.blocks, "its blocks are known when a transfer begins"
        if self.draw.random() < self.refusals:
            return None
        self.number += 1
        assert isinstance(sequence.send, EngineRequest)
        self.transfers[self.number] = Transfer(self.number, sequence.send, len(sequence.tokens))
        return self.number

    def stop(self, number: int) -> None:
        self.transfers[number].over = True
        if self.draw.random() < 0.5:
            self.let_go(self.transfers[number])

    # ------------------------------------------------------------------ clients

    def submit(self, request: EngineRequest) -> None:
        """Send a request on its way over both engines."""
        self.requests[request.request_id] = request
        drawn = request.generated[0] if request.generated else None
        first = replace(request, max_tokens=(0 if drawn is None else len(drawn)) + 1)
        self.prefill.engine.submit(first, send=request)

    def abort(self, name: str) -> None:
        """Abort a request wherever it is."""
        self.aborted.add(name)
        self.prefill.engine.abort(name)
        self.decode.engine.abort(name)
        for transfer in list(self.transfers.values()):
            if transfer.request.request_id == name:
                transfer.over = True

    # ------------------------------------------------------------------ time

    @property
    def is_busy(self) -> bool:
        return bool(self.transfers) or self.prefill.engine.has_work or self.decode.engine.has_work

    def tick(self) -> None:
        """Let one thing happen, whatever the seed wants."""
        act = self.draw.choice([self.step_prefill, self.step_decode, self.step_decode, self.move, self.move])
        act()
        self.prefill.scheduler.check_integrity()
        self.decode.scheduler.check_integrity()

    def run(self, limit: int = 20_000) -> None:
        """Go on until nothing is left to do."""
        while self.is_busy:
            self.tick()
            limit -= 1
            assert limit > 0, f"no end in sight: {self.prefill.scheduler.load} {self.decode.scheduler.load}"

    def step_prefill(self) -> None:
        if not self.prefill.engine.has_work:
            return
        outputs = self.prefill.step()
        for sequence, token in zip(outputs.sequences, outputs.token_ids, strict=True):
            transfer = self.transfers.get(sequence.transfer or 0)
            ends = sequence.finish_reason is FinishReason.STOP or len(sequence.tokens) >= self._length(sequence)
            if sequence.transfer is None or transfer is None or transfer.over or ends:
                if transfer is not None:
                    transfer.over = True
                self._took_first(sequence, token, ends)
            else:
                transfer.token = token

    def step_decode(self) -> None:
        if not self.decode.engine.has_work:
            return
        outputs = self.decode.step()
        for sequence, token in zip(outputs.sequences, outputs.token_ids, strict=True):
            self.tokens[sequence.request_id].append(token)
        for sequence in outputs.finished:
            self.endings[sequence.request_id] += 1

    def move(self) -> None:
        """Do something for a transfer."""
        if not self.transfers:
            return
        transfer = self.transfers[self.draw.choice(sorted(self.transfers))]
        if transfer.over:
            self.let_go(transfer)
        elif self.draw.random() < 0.03:
            self._lose(transfer)
        elif transfer.blocks is None:
            lent = self.decode.scheduler.lend(transfer.request, transfer.number)
            if lent is not None:
                transfer.blocks, transfer.copied = lent
        else:
            self._copy(transfer, transfer.blocks)
            if transfer.copied == transfer.tokens and transfer.token is not None:
                self._commit(transfer, transfer.token)

    # ------------------------------------------------------------------ inside

    def _copy(self, transfer: Transfer, blocks: list[int]) -> None:
        source, target = self.prefill.oracle, self.decode.oracle
        assert isinstance(source, SendingOracle)
        stop = min(source.computed.get(transfer.number, 0), transfer.copied + self.draw.randint(1, 12))
        for position in range(transfer.copied, stop):
            block = source.blocks[transfer.number][position // source.block_size]
            value = source.kv[block, position % source.block_size]
            target.kv[blocks[position // target.block_size], position % target.block_size] = value
        transfer.copied = max(stop, transfer.copied)

    def _commit(self, transfer: Transfer, token: int) -> None:
        self.committed += 1
        transfer.over = True
        self.decode.scheduler.adopt(transfer.request, transfer.number, token)

    def _lose(self, transfer: Transfer) -> None:
        """The transfer breaks; if its token was drawn the request goes on from there, else it goes on at prefill."""
        transfer.over = True
        if transfer.token is not None:
            self._go_on_whole(transfer.request, transfer.token)

    def let_go(self, transfer: Transfer) -> None:
        """Give both sides' blocks back: nothing reads or writes them any longer."""
        del self.transfers[transfer.number]
        if transfer.blocks is not None:
            self.decode.scheduler.return_loan(transfer.number)
        self.prefill.scheduler.release_sent(transfer.number)

    def _took_first(self, sequence: Sequence, token: int, ends: bool) -> None:
        name = sequence.request_id
        if name in self.aborted:
            return
        if ends:
            self.tokens[name].append(token)
            self.endings[name] += 1
        else:
            self._go_on_whole(self.requests[name], token)

    def _go_on_whole(self, request: EngineRequest, token: int) -> None:
        """Replay a request at the decode engine, with the token that its client has."""
        self.tokens[request.request_id].append(token)
        drawn = [] if not request.generated or request.generated[0] is None else request.generated[0].tolist()
        again = replace(request, generated=(np.array([*drawn, token], dtype=np.int32),))
        self.decode.engine.submit(again)

    def _length(self, sequence: Sequence) -> int:
        return sequence.prompt_length + self.requests[sequence.request_id].max_tokens
