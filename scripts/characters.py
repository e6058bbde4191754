"""Show answers of `mach query --json` over the embedded set as the characters that they are (reads standard input)."""

from __future__ import annotations

import json
import sys
import unicodedata


def main() -> None:
    for line in sys.stdin:
        answer = json.loads(line)
        found = [f"{unicodedata.lookup(name)}  {name.lower()}" for name in answer["names"]]
        print(f"{answer['query']:<30} {'   '.join(f'{text:<38}' for text in found)}".rstrip())


if __name__ == "__main__":
    main()
