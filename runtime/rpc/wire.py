"""What client and server must agree on beside the messages: method names, addresses, limits of the connection."""

from __future__ import annotations

from ...sdk.errors import ConfigError
from .codec import MAX_MESSAGE_BYTES
from .codec_views import MAX_VIEW_BYTES

SERVICE = "slipstream.v1.Engine"
FACTS = "Facts"
SESSION = "Session"
KV_SERVICE = "slipstream.v1.KvTalk"
TALK = "Talk"
INFERENCE_SERVICE = "slipstream.v1.Inference"
GENERATE = "Generate"
INFERENCE_SESSION = "Session"
LIST_MODELS = "ListModels"
CLUSTER_SERVICE = "slipstream.v1.Cluster"
WATCH = "Watch"
SECRET_SERVICE = "slipstream.v1.Secret"
CHALLENGE = "Challenge"

_MAX_SOCKET_PATH_BYTES = 107  # sun_path, less its final zero
_KEEPALIVE_MS = 2_000
_KEEPALIVE_TIMEOUT_MS = 3_000
_SIZES = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

_CLIENT: tuple[tuple[str, int], ...] = (
    # A peer behind a cut link is noticed although the connection stands.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A gateway waits for a driver that is just starting: ask often, it is on the same machine or next to it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to one address are separate connections, or closing one would not end its session.
    ("grpc.use_local_subchannel_pool", 1),
)

_CLIENT_OPTIONS = (*_CLIENT, *_SIZES)
WATCH_OPTIONS = (*_CLIENT, ("grpc.max_receive_message_length", MAX_VIEW_BYTES))

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    # A client also pings to measure the link, after data; on a stream of few words that looks like too many of them.
    ("grpc.http2.max_ping_strikes", 0),
    # Two drivers that were given one port must not share its connections.
    ("grpc.so_reuseport", 0),
)


def target_of(address: str) -> str:
    """Return the gRPC target of a socket's path, or of ``host:port``.

    Raises: ConfigError naming ``address``
    """
    if "/" not in address:
        _, colon, port = address.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError("address", f"must be a socket's path (with a slash) or host:port, got {address!r}")
        return address
    path = address.removeprefix("unix:")
    if len(path.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError("address", f"a socket's path has at most {_MAX_SOCKET_PATH_BYTES} bytes, got {path!r}")
    return f"unix:{path}"


def client_options(target: str) -> tuple[tuple[str, int], ...]:
    """Return the options of a channel to a driver.

    A keepalive is a ping, whose own time-out is a minute: the one above ends only a connection whose bytes nobody
    acknowledges, and the kernel acknowledges those of a stopped process. Over a network others can do what a stopped
    driver was to do, so it is lost as soon; the driver at a socket is its gateway's own, and better waited for than
    started again.
    """
    if is_socket(target):
        return _CLIENT_OPTIONS
    return (*_CLIENT_OPTIONS, ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS))


def is_socket(target: str) -> bool:
    """Return whether a target is a socket's path: as open as its file, and no wire that others could be on."""
    return target.startswith("unix:")


def one_host_of(address: str) -> str:
    """Return the target of an address to listen on that names its host: without one, all networks could reach it.

    Raises: ConfigError naming ``address``
    """
    target = target_of(address)
    if target.startswith(":"):
        raise ConfigError("address", f"{address!r} names no host and would be open to all networks: give one")
    return target
