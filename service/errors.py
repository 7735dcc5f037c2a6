"""Everything that can go wrong in the service. `service.http.problems` turns a RequestError into an answer.

ServiceError
├── StartupError                the service cannot start with its settings
│   └── EngineError             no ONNX Runtime, two of them, or an unavailable device
├── BundleError                 a bundle that must not take traffic
│   ├── NotNow                  it may be loaded later as it is: memory is short, or no process can be started
│   └── RepositoryError         a remote repository cannot be reached or listed, or its cache cannot be used
└── RequestError                one request, or one image of it, cannot be answered; others are not affected
    ├── BadRequest              400 malformed
    ├── InvalidParameter        422 a parameter is unknown, out of its range, or contradicts another one
    ├── UrlTooLong              414 a URL longer than the limit
    ├── HeadTooLarge            431 more bytes or headers than the limits
    ├── HeadTooSlow             408 did not arrive in time
    ├── TooManyConnections      503 all connections are in use
    ├── BodyTooLarge            413 more bytes than the limit
    ├── BodyTooSlow             408 did not arrive in time
    ├── ImageError              one image cannot be used
    │   ├── BadImage            400 damaged
    │   ├── UnsupportedImage    415 not an image, or of a format that is not accepted
    │   └── TooManyPixels       422 larger than the pixel limit
    ├── UnknownModel            404 no such model
    ├── NoSuitableModel         422 no model that may answer reaches the requested accuracy
    ├── NotReady                503 loading or draining, the engine hangs, or memory is short
    ├── Overloaded              429 no room, or no way to finish in time
    │   └── KeyLimited          429 a limit of the request's key
    ├── DeadlineExceeded        504 the deadline passed before the work was done
    ├── ModelFault              500 the model failed, or its outputs are invalid
    ├── ClientDisconnected      408 the client has left before the answer
    ├── Unauthorized            401 no API key, or a wrong one
    └── Forbidden               403 not allowed with this key, or switched off
"""

from typing import ClassVar, Literal


class ServiceError(Exception):
    """Base of all errors of this package. The message is for people and names the fix where there is one."""


class StartupError(ServiceError):
    """The service cannot start with its settings."""


class EngineError(StartupError):
    """No inference engine as requested."""


class BundleError(ServiceError):
    """A bundle that must not take traffic."""


class NotNow(BundleError):
    """A bundle that cannot be loaded at present, through no fault of its own."""

    def __init__(self, message: str, *, needed_bytes: int = 0) -> None:
        """`needed_bytes`: free memory below which it is useless to try again."""
        super().__init__(message)
        self.needed_bytes = needed_bytes


class RepositoryError(BundleError):
    """A remote repository that cannot be reached or listed, or whose cache cannot be used."""


class RequestError(ServiceError):
    """One request, or one image of it, cannot be answered. The docstrings of its kinds are shown in /docs."""

    status: ClassVar[int]
    """HTTP status of the answer."""
    code: ClassVar[str]
    """Name of the error in answers (`urn:stridevit:<code>`) and in metrics. Part of the API: it never changes."""

    def __init_subclass__(cls, *, status: int | None = None, code: str | None = None) -> None:
        if status is not None and code is not None:
            cls.status, cls.code = status, code


class BadRequest(RequestError, status=400, code="bad-request"):
    """The request is malformed."""


class InvalidParameter(RequestError, status=422, code="invalid-parameter"):
    """A parameter of the query, a header, a form field or a JSON member is unknown, out of range, or contradicts
    another one."""


class UrlTooLong(RequestError, status=414, code="url-too-long"):
    """The URL is longer than the limit."""


class HeadTooLarge(RequestError, status=431, code="head-too-large"):
    """The request's head has more bytes or headers than the limits."""


class HeadTooSlow(RequestError, status=408, code="head-too-slow"):
    """The request's head did not arrive in time. Nothing was done: it is safe to retry."""


class TooManyConnections(RequestError, status=503, code="too-many-connections"):
    """All connections are in use. Nothing was done: it is safe to retry."""


class BodyTooLarge(RequestError, status=413, code="body-too-large"):
    """The body exceeds the byte limit."""


class BodyTooSlow(RequestError, status=408, code="body-too-slow"):
    """The body did not arrive in time. Nothing was done: it is safe to retry."""


class ImageError(RequestError):
    """One image cannot be used."""


class BadImage(ImageError, status=400, code="bad-image"):
    """The image is damaged."""


class UnsupportedImage(ImageError, status=415, code="unsupported-image"):
    """Not an image, or in a format that is not accepted."""


class TooManyPixels(ImageError, status=422, code="too-many-pixels"):
    """The image is larger than the pixel limit. It was not decoded."""


class UnknownModel(RequestError, status=404, code="unknown-model"):
    """There is no such model, or it is not loaded."""


class NotReady(RequestError, status=503, code="not-ready"):
    """The service is loading or draining, its engine hangs, or memory is short. It is safe to retry."""


class NoSuitableModel(RequestError, status=422, code="no-suitable-model"):
    """No model that may answer reaches the requested accuracy."""


Reason = Literal["images", "bytes", "deadline", "key-rate", "key-concurrency"]


class Overloaded(RequestError, status=429, code="overloaded"):
    """There is no room, or no way to finish in time. Nothing was done: retry after `Retry-After` seconds."""

    def __init__(self, message: str, *, reason: Reason, retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class KeyLimited(Overloaded, status=429, code="key-limited"):
    """This key has reached its limit of requests per second, or of requests at once. Nothing was done: retry after
    `Retry-After` seconds."""


class DeadlineExceeded(RequestError, status=504, code="deadline-exceeded"):
    """The deadline passed while the request waited or was computed. It is safe to retry."""


class ModelFault(RequestError, status=500, code="model-fault"):
    """The model failed on the image, or its outputs are invalid. Another model may answer; a retry will not help."""

    def __init__(self, message: str, *, kind: Literal["exception", "shape", "not-finite"] = "exception") -> None:
        super().__init__(message)
        self.kind = kind


# Nobody reads this answer. Proxies log 499 for it, which is not a registered status.
class ClientDisconnected(RequestError, status=408, code="client-disconnected"):
    """The client closed its connection."""


class Unauthorized(RequestError, status=401, code="unauthorized"):
    """No API key, or one that is not accepted."""


class Forbidden(RequestError, status=403, code="forbidden"):
    """Not allowed with this key, or switched off."""
