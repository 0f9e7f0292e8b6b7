"""How a configuration field is declared."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any


def option(
    default: Any,
    doc: str,
    *,
    choices: Iterable | None = None,
    low: float | None = None,
    high: float | None = None,
    derived: str | None = None,
    shapes: bool = False,
    items: type = int,
) -> Any:
    """Declare one field: default, one-line meaning, and accepted values (choices, or bounds included).

    derived: how the default follows from other fields. shapes: whether networks, process, data or what is minimised
    would be others with another value; then it cannot change when a run is continued or used. items: the type of the
    entries of a tuple, all above 0.
    """
    rule = {
        "doc": doc,
        "choices": choices and tuple(choices),
        "low": low,
        "high": high,
        "derived": derived,
        "shapes": shapes,
        "items": items,
    }
    return field(default=default, metadata=rule)
