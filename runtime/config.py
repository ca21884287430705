"""What an engine is set up with: one frozen object, checked once.

Owns the options' names, defaults and limits. Names follow vLLM's where the meaning is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..placement.expert_plan import POLICIES as EPLB_POLICIES
from ..sdk.errors import ConfigError

SCHEDULING_POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits and switches of the scheduler.

    - ``max_model_len``: tokens of prompt and output together that a sequence may have.
    - ``max_num_seqs``: sequences that run at once. ``max_num_batched_tokens``: token budget of one step.
    - ``long_prefill_token_threshold``: most prompt tokens of one sequence in one step; 0 is no limit of its own.
    - ``max_queued_requests``: requests that may wait; one more is refused as ``Overloaded``.
    - ``micro_batches``: steps on their way at once, each with other sequences: as many as pipeline stages. With 1, a
      sequence's next token is planned before its last one is known.
    - ``even_chunks``: make steps equally long rather than full, by what their tokens take; ``attention_ratio`` of the
      model (``ModelFacts``) says by how much that grows with context.

    Raises: ConfigError, naming the option.
    """

    max_model_len: int
    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    max_queued_requests: int = 4096
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    micro_batches: int = 1
    even_chunks: bool = False
    attention_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            require_positive(name, getattr(self, name))
        require_positive("micro_batches", self.micro_batches)
        require_positive("max_queued_requests", self.max_queued_requests)
        if not 0.0 <= self.attention_ratio < math.inf:
            raise ConfigError("attention_ratio", f"must be a finite number of at least 0, got {self.attention_ratio!r}")
        if self.long_prefill_token_threshold != 0:
            require_positive("long_prefill_token_threshold", self.long_prefill_token_threshold)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "max_num_batched_tokens",
                f"{self.max_num_batched_tokens} is less than max_num_seqs={self.max_num_seqs}: "
                "a step could not give every running sequence its token",
            )
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            known = ", ".join(SCHEDULING_POLICIES)
            raise ConfigError("scheduling_policy", f"must be one of {known}, got {self.scheduling_policy!r}")
        if self.max_model_len > self.num_blocks * self.block_size:
            raise ConfigError(
                "max_model_len",
                f"{self.max_model_len} tokens do not fit in the KV cache of {self.num_blocks} blocks of "
                f"{self.block_size}: lower max_model_len or give the cache more memory (kv_cache_memory_bytes)",
            )


def require_positive(name: str, value: object) -> None:
    """Raise ConfigError unless an option is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(name, f"must be an integer of at least 1, got {value!r}")


QUANTIZATIONS = ("none", "int8", "int4", "fp8")
EXPERT_EXCHANGES = ("auto", "all_to_all", "gather")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
DTYPE_ALIASES = {"float": "float32", "half": "float16", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Everything that a person can say about an engine; None means that it is worked out from the model and the device.

    - ``model``: a Hugging Face directory; ``tokenizer``: another one for the text side.
    - ``dtype``: ``auto`` is the checkpoint's own. ``device``: ``auto`` is a GPU when torch sees one.
    - ``seed``: makes requests without a seed of their own repeat from run to run; None draws them.
    - ``max_model_len``: prompt and output tokens of a sequence; None is the model's length, or less when the KV cache
      is smaller than that (a warning says so).
    - ``kv_cache_memory_bytes`` or ``num_gpu_blocks_override`` (blocks, on any device) size the KV cache; otherwise
      ``gpu_memory_utilization`` of the device's free memory is the limit, and on a CPU 4 GiB.
    - ``quantization``: how weights are kept: ``none``, as ``dtype`` says, or on a GPU as a quantized checkpoint (AWQ,
      GPTQ, float8) has them; ``int8`` and on GPUs ``fp8``, with activations quantized token by token; ``int4``, in
      groups of 32. Any checkpoint can be quantized while it is read.
    - ``deterministic``: the same bits for a position whatever else is in the batch, however its prompt is cut, whatever
      of it the prefix cache has, and whether 1, 2, 4 or 8 tensor-parallel ranks compute it. What cannot keep that is
      refused. It takes some time.
    - ``kernels``: what carries out operations: ``auto``, the fastest for each on the device; ``torch`` or ``triton``
      for all; or, with commas, ``operation=backend`` (``kernels.backends`` has the table).
    - ``kv_cache_dtype``: of keys and values in the cache: ``auto`` is ``dtype``; ``fp8`` (e4m3), half as large as
      bfloat16, is for Triton's kernels and models in bfloat16.
    - ``num_threads``: threads that compute on a CPU; None is a core each, and one for a model so small that it would
      wait for them.
    - ``async_scheduling``: plan a step while the last one computes.
    - ``tensor_parallel_size`` ranks share every layer, ``pipeline_parallel_size`` stages have some layers each, and
      experts are spread over ``expert_parallel_size`` ranks; their product is the number of processes, which ``LLM``
      and ``slipstream serve`` start on this host. ``enable_expert_parallel`` spreads experts over the tensor-parallel
      ranks instead of cutting each of them.
    - ``sequence_parallel_size``: ranks that have the same weights, times the others, and share the tokens of long
      prompts; experts may then not be spread.
    - ``enable_eplb``: while serving, every ``eplb_step_interval`` steps, move experts between ranks so that each has as
      much to do; ``num_redundant_experts`` are further slots in every layer, over all ranks, for replicas.
      ``eplb_policy``: ``affinity`` also brings experts together that the same tokens choose; ``balance`` does not ask.
    - ``expert_exchange``: how experts on several ranks get their tokens, ``all_to_all`` or by ``gather``-ing what each
      rank's experts make of all tokens; ``auto`` tries at the start up to how many tokens a step the latter is faster.
      The results have the same bits.
    - ``ranks_per_host``: how many ranks, in their order, share a host, or what else is near to one another; None is all
      of them. Tokens then cross to each host once, and experts' replicas stay on one host.
    - ``overlap``: with several ranks, cut a step's tokens where one part's exchange hides behind the other's
      arithmetic; what passes and exchanges take is measured at the start.
    - ``sharded_norm``: with several tensor-parallel ranks, keep the residual in shares, so that each rank normalizes
      its share of the tokens only; None does so for steps of as many tokens as were found to gain at the start.
    - ``even_chunks``: with several stages, cut prompts so that steps are equally long and stages do not wait for one
      another; false fills each step to ``max_num_batched_tokens``.
    - ``enforce_eager``: on a GPU, launch a decoding step's kernels one by one in place of captured graphs. A CPU has
      no graphs.
    - ``trust_remote_code`` is refused when true, because code from a checkpoint is never run.

    Units: kv_cache_memory_bytes, bytes; step_timeout_s, seconds
    Raises: ConfigError, naming the option.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    scheduling_policy: str = "fcfs"
    quantization: str = "none"
    kernels: str = "auto"
    kv_cache_dtype: str = "auto"
    num_threads: int | None = None
    deterministic: bool = False
    async_scheduling: bool = True
    long_prefill_token_threshold: int = 0
    max_queued_requests: int = 4096
    step_timeout_s: float = 600.0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    sequence_parallel_size: int = 1
    enable_expert_parallel: bool = False
    overlap: bool = False
    sharded_norm: bool | None = None
    enable_eplb: bool = False
    num_redundant_experts: int = 0
    eplb_step_interval: int = 3000
    eplb_policy: str = "balance"
    expert_exchange: str = "auto"
    ranks_per_host: int | None = None
    even_chunks: bool = True
    trust_remote_code: bool = False
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError("quantization", f"must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")
        if not isinstance(self.kernels, str):
            raise ConfigError("kernels", f"must be a name, or operation=backend with commas, got {self.kernels!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            known = ", ".join(KV_CACHE_DTYPES)
            raise ConfigError("kv_cache_dtype", f"must be one of {known}, got {self.kv_cache_dtype!r}")
        whole = ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override", "num_threads", "ranks_per_host")
        for name in whole:
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise ConfigError("num_gpu_blocks_override", "give this or kv_cache_memory_bytes, not both")
        for name in ("gpu_memory_utilization", "step_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(name, f"must be a number above 0, got {value!r}")
        if self.gpu_memory_utilization > 1:
            raise ConfigError("gpu_memory_utilization", f"is a share, at most 1, got {self.gpu_memory_utilization!r}")
        self._check_ranks()
        self._check_experts()
        for name in ("deterministic", "enforce_eager"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, f"must be true or false, got {getattr(self, name)!r}")
        if self.trust_remote_code:
            raise ConfigError("trust_remote_code", "must be false: code that comes with a checkpoint is never run")
        # The scheduler's options are checked here too, so that a bad one is refused before the model is read.
        length = self.max_model_len or 1
        self.scheduler_config(max_model_len=length, num_blocks=length)

    def _check_ranks(self) -> None:
        for name in ("tensor", "pipeline", "expert", "sequence"):
            require_positive(f"{name}_parallel_size", getattr(self, f"{name}_parallel_size"))
        for name in ("enable_expert_parallel", "overlap", "even_chunks", "enable_eplb"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(name, f"must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.sharded_norm, bool | None):
            raise ConfigError("sharded_norm", f"must be true, false or None, got {self.sharded_norm!r}")
        if self.enable_expert_parallel and self.expert_parallel_size != 1:
            raise ConfigError("expert_parallel_size", "give this or enable_expert_parallel, not both")
        if self.sequence_parallel_size > 1 and (self.expert_parallel_size > 1 or self.enable_expert_parallel):
            spread = "enable_expert_parallel" if self.enable_expert_parallel else "expert_parallel_size"
            raise ConfigError(
                "sequence_parallel_size",
                f"{self.sequence_parallel_size} ranks cannot share prompts whose experts are spread ({spread}): "
                "use one of the two; tensor_parallel_size alone cuts every expert",
            )

    def _check_experts(self) -> None:
        require_positive("eplb_step_interval", self.eplb_step_interval)
        if isinstance(self.num_redundant_experts, bool) or self.num_redundant_experts < 0:
            raise ConfigError("num_redundant_experts", f"must be 0 or more, got {self.num_redundant_experts!r}")
        for name, known in (("eplb_policy", EPLB_POLICIES), ("expert_exchange", EXPERT_EXCHANGES)):
            if getattr(self, name) not in known:
                raise ConfigError(name, f"must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        asked = {
            "enable_eplb": self.enable_eplb,
            "num_redundant_experts": self.num_redundant_experts > 0,
            "expert_exchange": self.expert_exchange != "auto",
        }
        if not (self.enable_expert_parallel or self.expert_parallel_size > 1):
            for name in (name for name, is_asked in asked.items() if is_asked):
                raise ConfigError(name, "is for experts over several ranks: see expert_parallel_size")
        if self.eplb_policy != "balance" and not self.enable_eplb:
            raise ConfigError("eplb_policy", f"{self.eplb_policy!r} says how enable_eplb moves experts: give that too")

    def scheduler_config(self, *, max_model_len: int, num_blocks: int, attention_ratio: float = 0.0) -> SchedulerConfig:
        """Return the scheduler's part, with what was worked out from model and device."""
        return SchedulerConfig(
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_queued_requests=self.max_queued_requests,
            enable_prefix_caching=self.enable_prefix_caching,
            scheduling_policy=self.scheduling_policy,
            micro_batches=self.pipeline_parallel_size,
            even_chunks=self.even_chunks and self.pipeline_parallel_size > 1,
            attention_ratio=attention_ratio,
        )


def prefix_cache_key(prompt_length: int, rope_threshold: int | None) -> str | None:
    """Return what the KV of a prompt depends on besides its tokens, None when on nothing.

    With dynamic rope the keys of a prompt longer than the threshold are rotated by an angle that depends on the
    prompt's length: only prompts of equal length may share blocks. Engines and those who look for their blocks agree.
    """
    return None if rope_threshold is None or prompt_length <= rope_threshold else f"rope-length-{prompt_length}"
