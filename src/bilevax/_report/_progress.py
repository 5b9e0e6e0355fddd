"""What a person sees while it runs."""

import dataclasses
import os
import sys
from typing import Any

from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is told: the last evaluation.

    `x` and `value` belong to `theta`, which is the outer variable before the step that
    followed.
    """

    num_steps: int
    theta: PyTree[Array]
    x: PyTree[Array]
    aux: PyTree
    value: float
    hypergradient_norm: float
    seconds: float


def progress_bar(total: int, progress: bool | None) -> Any:
    """A bar with `update(n, value, norm)` and `close()`.

    `None` shows one on a terminal and keeps quiet in pipes and in CI; tqdm is optional.
    """
    wanted = progress
    if wanted is None:
        wanted = sys.stderr.isatty() and not os.environ.get("CI")
    if not wanted:
        return _Quiet()
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress is None:
            return _Quiet()
        raise ImportError(
            "A progress bar needs tqdm: pip install 'bilevax[progress]', or progress=False."
        ) from error
    return _Bar(tqdm(total=total, unit="step", dynamic_ncols=True, leave=False))


class _Quiet:
    """No bar."""

    def update(self, num_steps: int, value: float, hypergradient_norm: float) -> None:
        del num_steps, value, hypergradient_norm

    def close(self) -> None:
        """Nothing to close."""


class _Bar:
    """A tqdm bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, num_steps: int, value: float, hypergradient_norm: float) -> None:
        self._bar.set_postfix_str(
            f"value={value:.5g}, hypergradient={hypergradient_norm:.2g}", refresh=False
        )
        self._bar.update(num_steps)

    def close(self) -> None:
        self._bar.refresh()  # a short run ends before the bar would be drawn again
        self._bar.close()
