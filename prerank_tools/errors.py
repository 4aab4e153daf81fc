"""The errors a shell script can act on: each carries its exit code, one sentence and one hint."""

from __future__ import annotations

from typing import Any


class PrerankError(Exception):
    """A failure that is reported as `error: ...` and `hint: ...`, never as a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.events: list[dict[str, Any]] = []  # what the worker that raised it had to say before

    def __reduce__(self) -> tuple[type, tuple[str, str], dict[str, Any]]:
        # Workers are other processes: hint and events must survive pickling.
        return type(self), (self.message, self.hint), {"events": self.events}


class UsageError(PrerankError):
    """The command line or the config file asks for something that does not exist (exit 2)."""

    exit_code = 2


class ContractError(PrerankError):
    """An input table breaks its contract; a retry will not help (exit 3)."""

    exit_code = 3


class GateError(PrerankError):
    """A quality gate failed, so nothing was published (exit 3)."""

    exit_code = 3


class ConflictError(PrerankError):
    """The output exists and comes from different work (exit 4)."""

    exit_code = 4


class RetryError(PrerankError):
    """Unfinished or locked: run the same line again (exit 75, EX_TEMPFAIL)."""

    exit_code = 75
