from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_GRAMMAR: _ClassVar[FinishReason]

class ErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_KIND_UNSPECIFIED: _ClassVar[ErrorKind]
    ERROR_KIND_INVALID_REQUEST: _ClassVar[ErrorKind]
    ERROR_KIND_OVERLOADED: _ClassVar[ErrorKind]
    ERROR_KIND_DEADLINE_EXCEEDED: _ClassVar[ErrorKind]
    ERROR_KIND_UNAVAILABLE: _ClassVar[ErrorKind]
    ERROR_KIND_ENGINE_ERROR: _ClassVar[ErrorKind]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_GRAMMAR: FinishReason
ERROR_KIND_UNSPECIFIED: ErrorKind
ERROR_KIND_INVALID_REQUEST: ErrorKind
ERROR_KIND_OVERLOADED: ErrorKind
ERROR_KIND_DEADLINE_EXCEEDED: ErrorKind
ERROR_KIND_UNAVAILABLE: ErrorKind
ERROR_KIND_ENGINE_ERROR: ErrorKind

class FactsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FactsReply(_message.Message):
    __slots__ = ("protocol_version", "epoch", "model", "vocab_size", "max_model_len", "max_num_seqs", "eos_token_ids", "dtype", "device", "replica", "role", "block_size", "rope_threshold", "sends_kv", "receives_kv")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROPE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    SENDS_KV_FIELD_NUMBER: _ClassVar[int]
    RECEIVES_KV_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    epoch: str
    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    device: str
    replica: str
    role: str
    block_size: int
    rope_threshold: int
    sends_kv: bool
    receives_kv: bool
    def __init__(self, protocol_version: _Optional[int] = ..., epoch: _Optional[str] = ..., model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., replica: _Optional[str] = ..., role: _Optional[str] = ..., block_size: _Optional[int] = ..., rope_threshold: _Optional[int] = ..., sends_kv: _Optional[bool] = ..., receives_kv: _Optional[bool] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("submit", "abort", "abort_sample", "drain", "go_on")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    ABORT_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    GO_ON_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    abort_sample: AbortSample
    drain: Drain
    go_on: GoOn
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., abort_sample: _Optional[_Union[AbortSample, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., go_on: _Optional[_Union[GoOn, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "request_id", "prompt_token_ids", "params", "seed", "stop_ids", "max_tokens", "priority", "cache_salt", "timeout_s", "generated", "send_to", "ticket", "trace_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    SEND_TO_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    key: int
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: SamplingParams
    seed: int
    stop_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    priority: int
    cache_salt: str
    timeout_s: float
    generated: _containers.RepeatedCompositeFieldContainer[Generated]
    send_to: SendTo
    ticket: str
    trace_id: str
    def __init__(self, key: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., stop_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., timeout_s: _Optional[float] = ..., generated: _Optional[_Iterable[_Union[Generated, _Mapping]]] = ..., send_to: _Optional[_Union[SendTo, _Mapping]] = ..., ticket: _Optional[str] = ..., trace_id: _Optional[str] = ...) -> None: ...

class Generated(_message.Message):
    __slots__ = ("token_ids", "over")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    over: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., over: _Optional[bool] = ...) -> None: ...

class SendTo(_message.Message):
    __slots__ = ("replica", "address", "ticket")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    replica: str
    address: str
    ticket: str
    def __init__(self, replica: _Optional[str] = ..., address: _Optional[str] = ..., ticket: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens", "include_stop_str_in_output", "bias_token_ids", "bias_amounts", "structured_outputs")
    N_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DETOKENIZE_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    BIAS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_AMOUNTS_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    n: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    max_tokens: int
    min_tokens: int
    logprobs: int
    prompt_logprobs: int
    detokenize: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    bias_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bias_amounts: _containers.RepeatedScalarFieldContainer[float]
    structured_outputs: StructuredOutputs
    def __init__(self, n: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., detokenize: _Optional[bool] = ..., skip_special_tokens: _Optional[bool] = ..., include_stop_str_in_output: _Optional[bool] = ..., bias_token_ids: _Optional[_Iterable[int]] = ..., bias_amounts: _Optional[_Iterable[float]] = ..., structured_outputs: _Optional[_Union[StructuredOutputs, _Mapping]] = ...) -> None: ...

class StructuredOutputs(_message.Message):
    __slots__ = ("json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace")
    JSON_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    DISABLE_ANY_WHITESPACE_FIELD_NUMBER: _ClassVar[int]
    json: str
    regex: str
    choice: Choices
    grammar: str
    json_object: bool
    disable_any_whitespace: bool
    def __init__(self, json: _Optional[str] = ..., regex: _Optional[str] = ..., choice: _Optional[_Union[Choices, _Mapping]] = ..., grammar: _Optional[str] = ..., json_object: _Optional[bool] = ..., disable_any_whitespace: _Optional[bool] = ...) -> None: ...

class Choices(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class AbortSample(_message.Message):
    __slots__ = ("key", "index")
    KEY_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    key: int
    index: int
    def __init__(self, key: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class GoOn(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "step", "rejected", "load", "drained", "closed", "hand_off_ended", "blocks_changed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_ENDED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    step: StepNews
    rejected: Rejected
    load: Load
    drained: Drained
    closed: Closed
    hand_off_ended: HandOffEnded
    blocks_changed: BlocksChanged
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., step: _Optional[_Union[StepNews, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., drained: _Optional[_Union[Drained, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., hand_off_ended: _Optional[_Union[HandOffEnded, _Mapping]] = ..., blocks_changed: _Optional[_Union[BlocksChanged, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("epoch", "load")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    load: Load
    def __init__(self, epoch: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class StepNews(_message.Message):
    __slots__ = ("keys", "sample_indices", "token_ids", "logprobs", "prompt_scores", "endings", "load")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDICES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SCORES_FIELD_NUMBER: _ClassVar[int]
    ENDINGS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[int]
    sample_indices: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: LogprobColumns
    prompt_scores: _containers.RepeatedCompositeFieldContainer[PromptScores]
    endings: _containers.RepeatedCompositeFieldContainer[Ending]
    load: Load
    def __init__(self, keys: _Optional[_Iterable[int]] = ..., sample_indices: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[LogprobColumns, _Mapping]] = ..., prompt_scores: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ..., endings: _Optional[_Iterable[_Union[Ending, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class LogprobColumns(_message.Message):
    __slots__ = ("counts", "token_ids", "logprobs", "ranks")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("key", "position", "scores")
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    key: int
    position: int
    scores: LogprobColumns
    def __init__(self, key: _Optional[int] = ..., position: _Optional[int] = ..., scores: _Optional[_Union[LogprobColumns, _Mapping]] = ...) -> None: ...

class Ending(_message.Message):
    __slots__ = ("key", "sample_index", "reason", "stop_token_id", "cached_tokens", "preemptions", "queue_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    key: int
    sample_index: int
    reason: FinishReason
    stop_token_id: int
    cached_tokens: int
    preemptions: int
    queue_s: float
    def __init__(self, key: _Optional[int] = ..., sample_index: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., queue_s: _Optional[float] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "field", "problem", "retryable")
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    kind: ErrorKind
    field: str
    problem: str
    retryable: bool
    def __init__(self, kind: _Optional[_Union[ErrorKind, str]] = ..., field: _Optional[str] = ..., problem: _Optional[str] = ..., retryable: _Optional[bool] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("key", "error")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    key: int
    error: Error
    def __init__(self, key: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class HandOffEnded(_message.Message):
    __slots__ = ("key", "report")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    key: int
    report: HandOffReport
    def __init__(self, key: _Optional[int] = ..., report: _Optional[_Union[HandOffReport, _Mapping]] = ...) -> None: ...

class HandOffReport(_message.Message):
    __slots__ = ("ending", "bytes_moved", "prefill_s", "wire_s", "hidden_s", "wait_s")
    ENDING_FIELD_NUMBER: _ClassVar[int]
    BYTES_MOVED_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    ending: str
    bytes_moved: int
    prefill_s: float
    wire_s: float
    hidden_s: float
    wait_s: float
    def __init__(self, ending: _Optional[str] = ..., bytes_moved: _Optional[int] = ..., prefill_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., hidden_s: _Optional[float] = ..., wait_s: _Optional[float] = ...) -> None: ...

class BlocksChanged(_message.Message):
    __slots__ = ("stored", "removed", "reset")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    stored: bytes
    removed: bytes
    reset: bool
    def __init__(self, stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ..., reset: _Optional[bool] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "queue_room", "blocks_total", "blocks_available", "preemptions", "prefix_hits", "prefix_misses", "draining", "stages", "queued_tokens", "prefill_tokens_per_s", "token_s", "awaiting", "sending", "receiving", "kv_bytes_out", "kv_bytes_in")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ROOM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_MISSES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    AWAITING_FIELD_NUMBER: _ClassVar[int]
    SENDING_FIELD_NUMBER: _ClassVar[int]
    RECEIVING_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    queue_room: int
    blocks_total: int
    blocks_available: int
    preemptions: int
    prefix_hits: int
    prefix_misses: int
    draining: bool
    stages: _containers.RepeatedCompositeFieldContainer[StageTime]
    queued_tokens: int
    prefill_tokens_per_s: float
    token_s: float
    awaiting: int
    sending: int
    receiving: int
    kv_bytes_out: int
    kv_bytes_in: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., queue_room: _Optional[int] = ..., blocks_total: _Optional[int] = ..., blocks_available: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., prefix_misses: _Optional[int] = ..., draining: _Optional[bool] = ..., stages: _Optional[_Iterable[_Union[StageTime, _Mapping]]] = ..., queued_tokens: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., token_s: _Optional[float] = ..., awaiting: _Optional[int] = ..., sending: _Optional[int] = ..., receiving: _Optional[int] = ..., kv_bytes_out: _Optional[int] = ..., kv_bytes_in: _Optional[int] = ...) -> None: ...

class StageTime(_message.Message):
    __slots__ = ("stage", "busy_s", "waiting_s", "wire_s", "wire_hidden_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    stage: int
    busy_s: float
    waiting_s: float
    wire_s: float
    wire_hidden_s: float
    def __init__(self, stage: _Optional[int] = ..., busy_s: _Optional[float] = ..., waiting_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., wire_hidden_s: _Optional[float] = ...) -> None: ...

class Drained(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Closed(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: Error
    def __init__(self, error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...
