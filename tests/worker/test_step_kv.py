"""What ranks say of KV that is sent while it is computed, and prompts of one model that go on in another's cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.runtime.config import SchedulerConfig
from slipstream.runtime.engine.engine import Engine
from slipstream.runtime.engine.scheduler import Scheduler
from slipstream.runtime.engine.sequence import Sequence
from slipstream.runtime.messages import EngineRequest, FinishReason
from slipstream.runtime.models.decoder import Decoder, load_decoder
from slipstream.runtime.models.kv_cache import KvCache
from slipstream.runtime.models.registry import read_model_spec
from slipstream.runtime.worker.executor import ModelExecutor, step_thread
from slipstream.runtime.worker.grammar import GrammarCompiler
from slipstream.runtime.worker.step_batch import StepRows
from slipstream.runtime.worker.step_forward import StepForward
from slipstream.runtime.worker.step_kv import StepKv
from slipstream.tests.engine.builders import request
from slipstream.tests.kernels.native_ways import torch_alone
from slipstream.tests.models.checkpoints import VOCABULARY, make_checkpoint

CPU = torch.device("cpu")
LENGTH = 96


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path: Path = make_checkpoint("qwen3", tmp_path_factory.mktemp("checkpoints") / "qwen3")
    return load_decoder(path, read_model_spec(path), dtype=torch.float32, device=CPU)


@dataclass
class Replica:
    """An engine over a cache of its own; whatever is not written there is not a number."""

    engine: Engine
    cache: KvCache
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def make(cls, decoder: Decoder, *, block_size: int = 8, chunk: int = 16, kv: StepKv | None = None) -> Replica:
        config = SchedulerConfig(
            max_model_len=LENGTH,
            num_blocks=2 * LENGTH // block_size,
            block_size=block_size,
            max_num_seqs=4,
            max_num_batched_tokens=chunk,
        )
        cache = KvCache.allocate(decoder.spec, config.num_blocks, block_size, decoder.dtype, CPU)
        for layer in cache.layers:
            layer.fill_(float("nan"))
        executor = ModelExecutor(
            model=decoder,
            layers=StepForward(decoder, cache, block_size=block_size, deterministic=False),
            cache=cache,
            block_size=block_size,
            max_slots=config.max_num_seqs,
            max_length=LENGTH,
            device=CPU,
            # No request here has a grammar.
            grammars=GrammarCompiler(Path("none"), vocab_size=VOCABULARY, eos_token_ids=()),
            thread=step_thread(),
            kv=kv,
        )
        engine = Engine(Scheduler(config), executor, clock=lambda: 0.0, ahead=True, step_timeout_s=30.0)
        return cls(engine, cache)

    def run(self) -> list[Sequence]:
        """Step until nothing is left to do; return the sequences that ended."""
        ended: list[Sequence] = []
        while self.engine.has_work:
            outputs = self.engine.step()
            for sequence, token in zip(outputs.sequences, outputs.token_ids, strict=True):
                self.tokens.setdefault(sequence.request_id, []).append(token)
            ended += outputs.finished
            self.engine.scheduler.check_integrity()
        return ended


@dataclass
class CopyingKv:
    """Carries KV from one replica's cache to another's: of each layer as soon as it is done, and no sooner."""

    source: Replica | None = None
    target: Replica | None = None
    lent: dict[int, tuple[list[int], int]] = field(default_factory=dict)
    step: list[tuple[int, list[int], int]] = field(default_factory=list)
    said: list[object] = field(default_factory=list)

    def start(self, sequence: Sequence) -> int:
        number = len(self.lent) + 1
        assert self.target is not None and isinstance(sequence.send, EngineRequest)
        lent = self.target.engine.scheduler.lend(sequence.send, number)
        assert lent is not None
        self.lent[number] = lent
        return number

    def stop(self, number: int) -> None:
        raise AssertionError(f"{number} was stopped")

    def begin_step(self, numbers: list[int], blocks: list[list[int]], stops: list[int]) -> None:
        self.step = list(zip(numbers, blocks, stops, strict=True))
        self.said.append((numbers, stops))

    def layer_done(self, layer: int) -> None:
        self.said.append(layer)
        assert self.source is not None and self.target is not None
        source, target = self.source.cache, self.target.cache
        for number, blocks, stop in self.step:
            to, first = self.lent[number]
            assert len(blocks) == -(-stop // source.block_size)
            for position in range(first, stop):
                at, offset = blocks[position // source.block_size], position % source.block_size
                value = source.layers[layer][:, at, :, offset]
                target.layers[layer][:, to[position // target.block_size], :, position % target.block_size] = value

    def end_step(self) -> None:
        self.said.append("end")


def ask(name: str, length: int, **options: Any) -> EngineRequest:
    draw = np.random.default_rng(length)
    return request(name, draw.integers(0, VOCABULARY, length).tolist(), max_tokens=8, seed=length, **options)


@pytest.mark.parametrize("sizes", [(8, 8), (4, 8), (8, 4)], ids=str)
def test_prompts_go_on_in_another_replica_with_the_same_tokens(decoder: Decoder, sizes: tuple[int, int]) -> None:
    check_going_on(decoder, sizes)


def test_the_same_without_compiled_kernels(decoder: Decoder) -> None:
    # They read keys by the block: what stands behind the last one must be a number.
    with torch_alone():
        check_going_on(decoder, (8, 8))


def check_going_on(decoder: Decoder, sizes: tuple[int, int]) -> None:
    asks = [ask("a", 1), ask("b", 8), ask("c", 30, temperature=1.0), ask("d", 37, temperature=0.7, top_p=0.9)]
    # Begins as c does, so that the decode side has some of it when it comes.
    asks.append(replace(ask("e", 33), prompt_token_ids=np.append(asks[2].prompt_token_ids[:20], np.arange(13))))
    whole = Replica.make(decoder, chunk=64)
    for asked in asks:
        whole.engine.submit(asked)
        whole.run()
    kv = CopyingKv()
    kv.source, kv.target = Replica.make(decoder, block_size=sizes[0], kv=kv), Replica.make(decoder, block_size=sizes[1])
    kv.source.engine.scheduler.attach(kv)
    for asked in asks:
        kv.source.engine.submit(replace(asked, max_tokens=1), send=asked)
        [sequence] = kv.source.run()
        assert sequence.finish_reason is FinishReason.LENGTH and sequence.transfer is not None
        first = kv.source.tokens[asked.request_id][0]
        kv.target.engine.scheduler.adopt(asked, sequence.transfer, first)
        kv.target.engine.scheduler.return_loan(sequence.transfer)
        kv.source.engine.scheduler.release_sent(sequence.transfer)
        kv.target.run()
    assert kv.target.tokens == whole.tokens
    assert [first for _, first in kv.lent.values()] == [0, 0, 0, 0, 20 // sizes[1] * sizes[1]]
    for replica in (whole, kv.source, kv.target):
        pool = replica.engine.scheduler.pool
        assert pool.available == pool.num_blocks
        replica.engine.close()


def test_a_step_says_each_layer_once_in_order_and_one_that_sends_nothing_is_silent(decoder: Decoder) -> None:
    kv = CopyingKv()
    kv.source, kv.target = Replica.make(decoder, kv=kv), Replica.make(decoder)
    kv.source.engine.scheduler.attach(kv)
    kv.source.engine.submit(ask("own", 20))
    kv.source.run()
    assert kv.said == []
    asked = ask("sent", 30)
    kv.source.engine.submit(replace(asked, max_tokens=1), send=asked)
    kv.source.run()
    layers = list(range(decoder.spec.num_layers))
    assert kv.said == [([1], [16]), *layers, "end", ([1], [30]), *layers, "end"]
    kv.source.engine.close()
    kv.target.engine.close()


@torch.inference_mode()
def test_a_step_in_parts_says_a_layer_when_all_parts_have_passed_it(decoder: Decoder) -> None:
    tokens, block_size = 24, 8
    cache = KvCache.allocate(decoder.spec, 3, block_size, decoder.dtype, CPU)
    for each in cache.layers:
        each.fill_(float("nan"))
    layers = StepForward(decoder, cache, block_size=block_size, deterministic=False)
    rows = StepRows(
        token_ids_T=torch.arange(tokens),
        starts=np.zeros(1, np.int32),
        counts=np.full(1, tokens, np.int32),
        prompt_lengths=np.full(1, tokens, np.int32),
        block_tables=np.arange(3, dtype=np.int32).reshape(1, -1),
    )
    done: list[int] = []

    def layer_done(layer: int) -> None:
        assert not cache.layers[layer].isnan().any(), "a part's keys and values are missing"
        done.append(layer)

    layers.run_cut(rows, None, (9,), None, layer_done)
    assert done == list(range(decoder.spec.num_layers))


def test_blocks_entered_in_their_middle_are_cleared_behind_it(decoder: Decoder) -> None:
    cache = KvCache.allocate(decoder.spec, 3, 8, decoder.dtype, CPU)
    for layer in cache.layers:
        layer.fill_(float("nan"))
    cache.clear_from(1, 5)
    for layer in cache.layers:
        assert (layer[:, 1, :, 5:] == 0).all() and layer[:, 1, :, :5].isnan().all()
        assert layer[:, 0].isnan().all() and layer[:, 2].isnan().all()
