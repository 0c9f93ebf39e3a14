"""How do a few threads work through a stream, in order and with bounded memory?"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """`function` of each item, in order; at most 2 * num_threads are under way or wait to be taken."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class LruBytes:
    """Byte strings by name, the least recently used dropped beyond `max_bytes`; threads may share it."""

    def __init__(self, max_bytes: int):
        self._max_bytes, self._size = max_bytes, 0
        self._items: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        with self._lock:
            data = self._items.get(name)
            if data is not None:
                self._items.move_to_end(name)
            return data

    def drop(self, name: str) -> None:
        with self._lock:
            self._size -= len(self._items.pop(name, b""))

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            if name in self._items or len(data) > self._max_bytes:
                return
            self._items[name] = data
            self._size += len(data)
            while self._size > self._max_bytes:
                self._size -= len(self._items.popitem(last=False)[1])
