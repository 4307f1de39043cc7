"""What can go wrong, and how each kind behaves.

* TierkvError
  - InvariantError          a bug in tierkv: loud, never caught
  - ConfigError             a bad engine option (names option, value and fix)
    + UnsupportedModelError an architecture that cannot be served exactly
  - RequestError            a bad request (names field, value and fix); the engine keeps serving
    + CapacityError         a request that can never fit (with the numbers)
    + QueueFullError        the waiting queue is at its bound; try again later
    + ConflictError         it cannot be done as things stand (with the numbers)
    + NotFoundError         it names something that is not there
  - EngineDeadError         the engine process ended; nothing more will be answered
  - DeviceError             the GPU failed; this process can do nothing more with it

A sick tier is none of these: it is a miss, counted, and the block is recomputed.
"""

from __future__ import annotations


class TierkvError(Exception):
    """Base of every error that tierkv raises on purpose."""


class InvariantError(TierkvError):
    """A law of the engine does not hold: a bug in tierkv, please report it."""


class ConfigError(TierkvError, ValueError):
    """An engine option is wrong.

    Args:
        option: the option's name as in `EngineConfig` (underscores).
        value: what was given.
        fix: a sentence that says what to do instead.
    """

    def __init__(self, option: str, value: object, fix: str) -> None:
        self.option, self.value, self.fix = option, value, fix
        super().__init__(f"{option}={value!r}: {fix}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.option, self.value, self.fix)


class UnsupportedModelError(ConfigError):
    """The model's architecture cannot be served exactly; `fix` says why."""


class RequestError(TierkvError, ValueError):
    """A field of a request is wrong.

    Args:
        field: the request field (`prompt`, `temperature`, ...).
        value: what was given.
        fix: a sentence that says what to do instead.
    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field, self.value, self.fix = field, value, fix
        shown = repr(value)
        super().__init__(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {fix}")


class CapacityError(RequestError):
    """The request can never fit into the KV pool, not even alone."""


class QueueFullError(RequestError):
    """The waiting queue is full; the request was not accepted."""


class ConflictError(RequestError):
    """What is asked for cannot be done as things stand; `fix` says what stands in the way."""


class NotFoundError(RequestError):
    """The request names something that is not there."""


class EngineDeadError(TierkvError):
    """The engine process is gone; the message carries its last words."""


class DeviceError(TierkvError):
    """The GPU refused or failed.

    Args:
        doing: what was being done.
        reason: the driver's words.
    """

    def __init__(self, doing: str, reason: object) -> None:
        self.doing, self.reason = doing, str(reason)
        super().__init__(
            f"the GPU failed while it was to {doing} ({self.reason}); nothing more can be done on"
            " it in this process: restart the engine"
        )

    def __reduce__(self) -> tuple[type[DeviceError], tuple[str, str]]:
        return type(self), (self.doing, self.reason)
