"""Values as people read them, in tables of the command line and of the report."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """A value as people read it: thousands separated, two decimals, nothing for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else "" if value is None else str(value)
