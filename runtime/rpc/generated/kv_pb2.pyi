from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvFromSender(_message.Message):
    __slots__ = ("facts", "reserve", "finish", "end", "heartbeat")
    FACTS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    facts: KvFacts
    reserve: KvReserve
    finish: KvFinish
    end: KvEnd
    heartbeat: KvHeartbeat
    def __init__(self, facts: _Optional[_Union[KvFacts, _Mapping]] = ..., reserve: _Optional[_Union[KvReserve, _Mapping]] = ..., finish: _Optional[_Union[KvFinish, _Mapping]] = ..., end: _Optional[_Union[KvEnd, _Mapping]] = ..., heartbeat: _Optional[_Union[KvHeartbeat, _Mapping]] = ...) -> None: ...

class KvFromReceiver(_message.Message):
    __slots__ = ("facts", "granted", "deferred", "acknowledged", "end", "heartbeat")
    FACTS_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    DEFERRED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    facts: KvFacts
    granted: KvGranted
    deferred: KvDeferred
    acknowledged: KvAcknowledged
    end: KvEnd
    heartbeat: KvHeartbeat
    def __init__(self, facts: _Optional[_Union[KvFacts, _Mapping]] = ..., granted: _Optional[_Union[KvGranted, _Mapping]] = ..., deferred: _Optional[_Union[KvDeferred, _Mapping]] = ..., acknowledged: _Optional[_Union[KvAcknowledged, _Mapping]] = ..., end: _Optional[_Union[KvEnd, _Mapping]] = ..., heartbeat: _Optional[_Union[KvHeartbeat, _Mapping]] = ...) -> None: ...

class KvFacts(_message.Message):
    __slots__ = ("protocol_version", "replica", "incarnation", "layout", "ends", "host_id", "offer")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    replica: str
    incarnation: int
    layout: KvLayout
    ends: _containers.RepeatedCompositeFieldContainer[KvRankEnds]
    host_id: str
    offer: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., replica: _Optional[str] = ..., incarnation: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., ends: _Optional[_Iterable[_Union[KvRankEnds, _Mapping]]] = ..., host_id: _Optional[str] = ..., offer: _Optional[bytes] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("layers", "kv_heads", "block_size", "tp", "pp", "copies")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    block_size: int
    tp: int
    pp: int
    copies: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., block_size: _Optional[int] = ..., tp: _Optional[int] = ..., pp: _Optional[int] = ..., copies: _Optional[int] = ...) -> None: ...

class KvRankEnds(_message.Message):
    __slots__ = ("addresses",)
    class AddressesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.ScalarMap[str, str]
    def __init__(self, addresses: _Optional[_Mapping[str, str]] = ...) -> None: ...

class KvTransfer(_message.Message):
    __slots__ = ("replica", "incarnation", "number", "generation")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    replica: str
    incarnation: int
    number: int
    generation: int
    def __init__(self, replica: _Optional[str] = ..., incarnation: _Optional[int] = ..., number: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class KvReserve(_message.Message):
    __slots__ = ("transfer", "tokens", "timeout_s", "hint")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    tokens: int
    timeout_s: float
    hint: bytes
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., tokens: _Optional[int] = ..., timeout_s: _Optional[float] = ..., hint: _Optional[bytes] = ...) -> None: ...

class KvGranted(_message.Message):
    __slots__ = ("transfer", "blocks", "first_token")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    blocks: _containers.RepeatedScalarFieldContainer[int]
    first_token: int
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., blocks: _Optional[_Iterable[int]] = ..., first_token: _Optional[int] = ...) -> None: ...

class KvDeferred(_message.Message):
    __slots__ = ("transfer",)
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ...) -> None: ...

class KvFinish(_message.Message):
    __slots__ = ("transfer", "hand_off")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    HAND_OFF_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    hand_off: bytes
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., hand_off: _Optional[bytes] = ...) -> None: ...

class KvAcknowledged(_message.Message):
    __slots__ = ("transfer",)
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ...) -> None: ...

class KvEnd(_message.Message):
    __slots__ = ("transfer", "ending")
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    transfer: KvTransfer
    ending: str
    def __init__(self, transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., ending: _Optional[str] = ...) -> None: ...

class KvHeartbeat(_message.Message):
    __slots__ = ("alive",)
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    alive: _containers.RepeatedCompositeFieldContainer[KvTransfer]
    def __init__(self, alive: _Optional[_Iterable[_Union[KvTransfer, _Mapping]]] = ...) -> None: ...
