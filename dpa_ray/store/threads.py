"""How several transfers run at once: a few threads, the first failure ends the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")


def each(function: Callable[[Item], Any], items: Iterable[Item], num_threads: int) -> None:
    """Call `function` on every item, `num_threads` at once; what has not begun when one fails is left out.

    Raises: what the first failing call (in the order of `items`) raised.
    """
    todo = list(items)
    if len(todo) <= 1 or num_threads <= 1:
        for item in todo:
            function(item)
        return
    with ThreadPoolExecutor(min(num_threads, len(todo))) as pool:
        futures = [pool.submit(function, item) for item in todo]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
