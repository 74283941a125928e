"""Every error that swarmcpp raises on purpose, in one tree.

    SwarmError                     500  internal
    ├── BadRequest                 400  invalid_request      the client's input; `param` names the field
    │   ├── UnsupportedField       400  unsupported_field    a field that exists elsewhere and not here
    │   ├── PromptTooLong          400  context_length_exceeded
    │   └── BodyTooLarge           413  body_too_large
    ├── Unauthorized               401  invalid_api_key
    ├── UnknownModel               404  model_not_found
    ├── UnknownRoute               404  not_found
    ├── MethodNotAllowed           405  method_not_allowed
    ├── RequestTimeout             408  request_timeout      the client was too slow to send its request
    ├── QueueFull                  429  queue_full           `retry_after` in seconds
    ├── Cancelled                  499  cancelled            the client left or the deadline passed
    ├── EngineFailed               500  engine_failed        an engine died and the request cannot go on
    │   └── DecodeFailed           500  decode_failed        llama_decode failed for good; its context is unusable
    ├── DecodeAborted              500  decode_aborted       the abort flag stopped a step; internal to an engine
    ├── NotReady                   503  not_ready            no engine is ready yet, or none will be
    ├── StartupError               exit code 2               what the user must change before `serve` can start
    │   ├── BadModel                    damaged, wrong or unsupported GGUF
    │   ├── BadConfig                   a value, its key and where it came from
    │   ├── NotEnoughMemory             what is needed, what is free
    │   ├── PortInUse                   address, and how to choose another
    │   ├── DownloadFailed              URL, and what to do about it
    │   ├── BadToken                    text that is no join token, or one of another swarm
    │   └── SwarmUnreachable            whom was tried, and what to check
    ├── SnapshotError              500  snapshot             KV state or a block that is not what it should be
    ├── PeerError                  502  peer                 another node of the swarm failed this one
    │   ├── PeerLost               502  peer_lost            the link broke, or the peer ended
    │   ├── PeerTimeout            502  peer_timeout         it did not answer in time
    │   ├── IdentityTaken          502  identity_taken       two nodes have the same keys
    │   ├── StageLost              502  stage_lost           a stage lost its KV, or does not know what it is asked for
    │   └── StageFailed            502  stage_failed         a pass failed at the stage of `node`; `reason` is a code
    └── WireError                  502  wire                 a message that cannot be decoded or is over its limit

A class carries its HTTP status and wire code, so that each is mapped once and nowhere else.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of the tree. `str(error)` is one line for the user: the input, the limit, the remedy."""

    status = 500
    code = "internal"
    kind = "server_error"
    """OpenAI's `error.type`."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(SwarmError):
    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class UnsupportedField(BadRequest):
    code = "unsupported_field"


class PromptTooLong(BadRequest):
    code = "context_length_exceeded"


class BodyTooLarge(BadRequest):
    status = 413
    code = "body_too_large"


class Unauthorized(SwarmError):
    status = 401
    code = "invalid_api_key"
    kind = "authentication_error"


class UnknownModel(SwarmError):
    status = 404
    code = "model_not_found"
    kind = "invalid_request_error"


class UnknownRoute(SwarmError):
    status = 404
    code = "not_found"
    kind = "invalid_request_error"


class MethodNotAllowed(SwarmError):
    status = 405
    code = "method_not_allowed"
    kind = "invalid_request_error"


class RequestTimeout(SwarmError):
    status = 408
    code = "request_timeout"
    kind = "invalid_request_error"


class QueueFull(SwarmError):
    status = 429
    code = "queue_full"
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Cancelled(SwarmError):
    status = 499
    code = "cancelled"


class EngineFailed(SwarmError):
    code = "engine_failed"


class DecodeFailed(EngineFailed):
    code = "decode_failed"


class DecodeAborted(SwarmError):
    code = "decode_aborted"


class NotReady(SwarmError):
    status = 503
    code = "not_ready"
    kind = "unavailable_error"


class StartupError(SwarmError):
    """The command cannot start. The CLI prints the message on one line and exits with `exit_code`."""

    exit_code = 2
    code = "startup"


class BadModel(StartupError):
    code = "bad_model"


class BadConfig(StartupError):
    code = "bad_config"


class NotEnoughMemory(StartupError):
    code = "not_enough_memory"


class PortInUse(StartupError):
    code = "port_in_use"


class DownloadFailed(StartupError):
    code = "download_failed"


class BadToken(StartupError):
    code = "bad_token"


class SwarmUnreachable(StartupError):
    code = "swarm_unreachable"


class SnapshotError(SwarmError):
    code = "snapshot"


class PeerError(SwarmError):
    status = 502
    code = "peer"


class PeerLost(PeerError):
    code = "peer_lost"


class PeerTimeout(PeerError):
    code = "peer_timeout"


class IdentityTaken(PeerError):
    code = "identity_taken"


class StageLost(PeerError):
    code = "stage_lost"


class StageFailed(PeerError):
    code = "stage_failed"

    def __init__(self, message: str, *, node: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.reason = reason


class WireError(SwarmError):
    status = 502
    code = "wire"


def by_code() -> dict[str, type[SwarmError]]:
    """Wire code -> class, over the whole tree; used to rebuild an error that another process reported."""
    found: dict[str, type[SwarmError]] = {}
    todo: list[type[SwarmError]] = [SwarmError]
    while todo:
        cls = todo.pop()
        found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return found


def revive(code: str, message: str) -> SwarmError:
    """The error that `code` names, with `message`; an unknown code (a newer peer) becomes a SwarmError."""
    cls = by_code().get(code, SwarmError)
    if cls is QueueFull:
        return QueueFull(message, retry_after=1.0)
    return cls(message)
