"""Everything that can go wrong in the service, without HTTP in it (`service.http.problems` maps it once).

ServiceError
├── StartupError              the service cannot start as it was asked to
│   └── EngineError         no or two ONNX Runtimes, or a device that cannot be had
├── BundleError             a bundle that must not take traffic
└── RequestError            one request cannot be answered; nobody else's is lost
    ├── BadRequest          malformed in itself
    ├── InvalidParameter    a parameter of the query or a header is out of its range
    ├── BodyTooLarge
    ├── BodyTooSlow         safe to retry: nothing was done
    ├── ImageError
    │   ├── BadImage        damaged
    │   ├── UnsupportedImage
    │   └── TooManyPixels
    ├── UnknownModel
    ├── NoSuitableModel     no model of the family meets the caller's floor
    ├── NotReady            loading or draining; safe to retry
    ├── Overloaded                no room, or no way to finish in time; safe to retry after `retry_after_s`
    ├── DeadlineExceeded             the deadline passed before the work was done; safe to retry
    ├── ClientDisconnected              the caller has left: nobody reads the answer
    ├── Unauthorized        no key, or a wrong one
    └── Forbidden           not with this key, or switched off
"""

from typing import Literal


class ServiceError(Exception):
    """Base of all errors of this package. The message is for people and names the fix where there is one."""


class StartupError(ServiceError):
    """The service cannot start as it was asked to."""


class EngineError(StartupError):
    """No inference engine as asked for."""


class BundleError(ServiceError):
    """A bundle that must not take traffic."""


class RequestError(ServiceError):
    """One request, or one image of it, cannot be answered."""


class BadRequest(RequestError):
    """The request is malformed."""


class InvalidParameter(RequestError):
    """A parameter of the query, or a header, is out of its range."""


class BodyTooLarge(RequestError):
    """The body exceeds the byte limit."""


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""


class ImageError(RequestError):
    """One image cannot be used."""


class BadImage(ImageError):
    """The image is damaged."""


class UnsupportedImage(ImageError):
    """Not an image, or of a format that is not accepted."""


class TooManyPixels(ImageError):
    """The image is larger than the pixel limit. Nothing of it was decoded."""


class UnknownModel(RequestError):
    """No such model."""


class NotReady(RequestError):
    """The service is loading or draining."""


class NoSuitableModel(RequestError):
    """The family has no model that meets the caller's floor."""


class Overloaded(RequestError):
    """There is no room for the request, or it could not finish in time. Nothing was done for it."""

    def __init__(self, message: str, *, reason: Literal["images", "bytes", "deadline"], retry_after_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):
    """The deadline passed before the work was done."""


class ClientDisconnected(RequestError):
    """The caller has left."""


class Unauthorized(RequestError):
    """No key, or one that is not accepted."""


class Forbidden(RequestError):
    """Not with this key, or switched off."""
