from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_MIXED: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_MIXED: Role

class WatchRequest(_message.Message):
    __slots__ = ("after_epoch",)
    AFTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    after_epoch: int
    def __init__(self, after_epoch: _Optional[int] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("epoch", "begun", "pools", "replicas")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    begun: bool
    pools: _containers.RepeatedCompositeFieldContainer[PoolView]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaView]
    def __init__(self, epoch: _Optional[int] = ..., begun: _Optional[bool] = ..., pools: _Optional[_Iterable[_Union[PoolView, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaView, _Mapping]]] = ...) -> None: ...

class PoolView(_message.Message):
    __slots__ = ("name", "role", "wanted")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    wanted: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., wanted: _Optional[int] = ...) -> None: ...

class ReplicaView(_message.Message):
    __slots__ = ("replica", "pool", "role", "generation", "degrees", "address")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    pool: str
    role: Role
    generation: Generation
    degrees: Degrees
    address: str
    def __init__(self, replica: _Optional[str] = ..., pool: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., generation: _Optional[_Union[Generation, _Mapping]] = ..., degrees: _Optional[_Union[Degrees, _Mapping]] = ..., address: _Optional[str] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("model", "cut")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    model: int
    cut: int
    def __init__(self, model: _Optional[int] = ..., cut: _Optional[int] = ...) -> None: ...

class Degrees(_message.Message):
    __slots__ = ("pp", "ep", "tp", "experts_over_tp")
    PP_FIELD_NUMBER: _ClassVar[int]
    EP_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_OVER_TP_FIELD_NUMBER: _ClassVar[int]
    pp: int
    ep: int
    tp: int
    experts_over_tp: bool
    def __init__(self, pp: _Optional[int] = ..., ep: _Optional[int] = ..., tp: _Optional[int] = ..., experts_over_tp: _Optional[bool] = ...) -> None: ...
