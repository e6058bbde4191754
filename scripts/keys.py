"""Print docs/keys.md, the page of all keys, from the configuration's own source.

.venv/bin/python scripts/keys.py > docs/keys.md
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from mach.config import Config

HEAD = """# Every key

A run's configuration is a TOML file with the sections below. Only `data.train` must be given. `--set section.key=value`
overrides a key on the command line, and the `config.toml` in a run's folder says what every key was. A default of
*by the data* is the recipe's choice, from the number of rows, classes and features.

This page is made from `mach/config/keys.py` by `scripts/keys.py`.
"""
TABLE = ["| key | default | what it does | when to touch it |", "|---|---|---|---|"]


def page() -> str:
    parts = [HEAD]
    for title, user in (("## Keys that most users set", True), ("## Keys for special cases", False)):
        parts.append(title + "\n")
        for name, section in Config.model_fields.items():
            kind: Any = section.annotation
            rows = [row(name, key, field) for key, field in kind.model_fields.items() if about(field)["user"] == user]
            if rows:
                parts.append(f"### `[{name}]`\n\n{kind.__doc__.splitlines()[0]}\n")
                parts.append("\n".join([*TABLE, *rows, ""]))
    return "\n".join(parts)


def row(section: str, key: str, field: Any) -> str:
    default = "none" if field.is_required() or field.default is None else f"`{json.dumps(field.default)}`"
    if about(field)["chosen"]:
        default = f"by the data, else {default}"
    does = field.description
    if get_origin(field.annotation) is Literal:
        does += f" One of {', '.join(f'`{value}`' for value in get_args(field.annotation))}."
    cells = (f"`{section}.{key}`", default, does, about(field)["when"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def about(field: Any) -> Any:
    return field.json_schema_extra


if __name__ == "__main__":
    print(page(), end="")
