"""Numbers, records and pictures as people and files get them."""

import dataclasses
import math
from typing import Any


def as_json(record: Any) -> Any:
    """A dataclass, a container or a number as JSON has them; NaN and infinity become `None`."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        record = dataclasses.asdict(record)
    if isinstance(record, dict):
        return {key: as_json(entry) for key, entry in record.items()}
    if isinstance(record, (list, tuple)):
        return [as_json(entry) for entry in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def duration(seconds: float) -> str:
    """With a unit, two digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return (
                f"{seconds / scale:.2g} {unit}"
                if seconds < 100 * scale
                else (f"{seconds / scale:.0f} {unit}")
            )
    return "0" if not math.isnan(seconds) else "-"


def size(num_bytes: float) -> str:
    """With a unit, two digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def import_pyplot() -> Any:
    """matplotlib.pyplot, or a message that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'bilevax[plot]'.") from error
    return plt
