"""Where a walk has found a value that may be another one at the next call."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._tokens import Content

CONTAINERS = (list, dict, set, collections.deque)


class Place(NamedTuple):
    """Where a value was found: `read()` finds it again, and `is_same` compares."""

    owner: Any  # alive, so that no other object gets its address
    address: tuple[int, Any]
    read: Callable[[], Any]
    value: Any
    is_same: Callable[[Any, Any], bool]


def is_container(value: Any) -> bool:
    return isinstance(value, (*CONTAINERS, np.ndarray))


def flat_items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value)


def is_it(now: Any, old: Any) -> bool:
    return now is old


def has_content(now: np.ndarray, old: Content) -> bool:
    return old.is_of(now)


def are_all_same(now: list, old: list) -> bool:
    return len(now) == len(old) and all(a is b for a, b in zip(now, old, strict=True))
