"""Checks of settings, when an object is made."""

from jaxtyping import Array


def check_tolerance(name: str, **tolerances: float | Array | None) -> None:
    """Raise unless every tolerance is `None`, traced, or a number that is not negative."""
    for key, value in tolerances.items():
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name}({key}=...) must not be negative; got {value}.")


def check_count(name: str, *, required: bool = False, **counts: int | None) -> None:
    """Raise unless every count is a positive integer or, if not required, `None`."""
    for key, value in counts.items():
        if value is None and not required:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}({key}=...) must be a positive integer; got {value!r}.")


def check_step_size(name: str, step_size: float | Array | None) -> None:
    """Raise unless the step size is `None`, traced, or a positive number."""
    if isinstance(step_size, (int, float)) and not step_size > 0:
        raise ValueError(f"{name}(step_size=...) must be positive; got {step_size}.")


def check_positive(value: int, name: str) -> None:
    """Raise unless `value` is an integer of at least one."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")
