"""What workers have to say: their events travel home with a shard's record and are told by the run.

A worker may be another process, another rank or an actor on another host, whose stderr nobody reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from prerank_tools.engines import worker_number
from prerank_tools.errors import PrerankError


class Events:
    """The log of a worker: keeps events, with their time and the worker, until a shard is done."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        """Keep one event; its fields become what JSON can hold."""
        plain = json.loads(json.dumps(fields, default=str))
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.kept.append({"event": event, "at": at, "fields": {**plain, "worker": worker_number()}})

    def take(self, shard: int) -> list[dict[str, Any]]:
        """The events since the last call, each with the shard it belongs to."""
        kept, self.kept = self.kept, []
        return [{**event, "fields": {**event["fields"], "shard": shard}} for event in kept]


def tell(events: Iterable[Mapping[str, Any]], log: Callable[..., None]) -> None:
    """Log what a worker said, at the time it said it."""
    for event in events:
        log(event["event"], at=datetime.fromisoformat(event["at"]), **event["fields"])


@contextmanager
def told_of_faults(log: Callable[..., None]) -> Iterator[None]:
    """Log what a worker said before the error that ends the run."""
    try:
        yield
    except PrerankError as fault:
        tell(fault.events, log)
        raise
