"""What all sections of the configuration are, and how a key is described."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field


def key(default: Any, does: str, when: str, *, user: bool = False, chosen: bool = False, **limits: Any) -> Any:
    """A key: what it does, when to touch it, whether it is a user's, and whether the recipe chooses it by the data."""
    about: dict[str, Any] = {"when": when, "user": user, "chosen": chosen}
    return Field(default, description=does, json_schema_extra=about, **limits)


class Section(BaseModel):
    """Base of all sections: immutable, strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which nothing checks; those of a section within it come as a dictionary."""
        mine = {name: getattr(self, name) for name in values}
        return self.model_copy(
            update={
                name: mine[name].changed(**value)
                if isinstance(mine[name], Section) and isinstance(value, dict)
                else value
                for name, value in values.items()
            }
        )
