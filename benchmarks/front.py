"""Every effort of ours and every peer on four data sets, in turns: P@1 over processor seconds, bytes and query time.

    .venv/bin/python benchmarks/peers.py --install                      # once: the peers' own environment
    .venv/bin/python benchmarks/front.py                                # all four, an hour and more
    .venv/bin/python benchmarks/front.py tate-leaf --only fast balanced omikuji-parabel
    .venv/bin/python benchmarks/front.py go-gene2pubmed --only fast     # or debfiles-name2dir: only where named

`peers.py` measures, with the features of the data set and no names of classes, and writes
benchmarks/results/peers-NAME-DATE. Ours are `mach train` with `training.effort` and nothing else said. What follows
--only is measured anew and the rest kept from the newest file. Which points of a peer lie above the curve of ours
is printed; `report.py` draws the plots.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import OURS, median, newest

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared/data"
SHORT = HERE / "data/shapes/short"
EFFORTS = ("fast", "balanced", "best")
PEERS = (
    "omikuji-parabel",
    "omikuji-parabel-1",
    "omikuji-bonsai",
    "pecos-xrlinear",
    "pecos-xrlinear-beam-50",
    "pecos-xrlinear-3-trees",
    "libmultilabel-tree",
)
USUAL = ("gnd-core", "tate-leaf", "tib-gnd", "short")
DATA_SETS = {name: DATA / name for name in (*USUAL, "go-gene2pubmed", "debfiles-name2dir")} | {"short": SHORT}


def measure(name: str, chosen: list[str], rest: list[str]) -> None:
    """Let `peers.py` measure what was chosen of one data set."""
    data = Path(os.path.relpath(DATA_SETS[name]))  # the table names it
    source = DATA / ("gnd-core" if name == "short" else name)
    if not (source.is_dir() or data.exists()):
        sys.exit(f"front.py: there is no folder {source}: put the data sets there")
    if name == "short" and not data.exists():
        data.mkdir(parents=True)
        subprocess.run([sys.executable, str(HERE / "shapes.py"), "short", str(source), str(data)], check=True)
    command = [sys.executable, str(HERE / "peers.py"), "--data", str(data), *rest, "--only"]
    command += [OURS + one if one in EFFORTS else one for one in chosen]
    for effort in EFFORTS:
        config = HERE / f"data/front/{name}-{effort}.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        train, test = (next(data.glob(f"{part}.txt*")) for part in ("train", "test"))
        config.write_text(f'[data]\ntrain = "{train}"\ntest = "{test}"\n\n[training]\neffort = "{effort}"\n')
        command += ["--config", f"{effort}={os.path.relpath(config)}"]
    subprocess.run(command, check=True)


def above(entrants: dict[str, Any], cost: str) -> list[str]:
    """Peers that have more P@1 than each of ours that costs no more.

    With no point of ours as cheap, a peer is above only if it beats the cheapest of ours.
    """
    points = {
        name: (median(found, cost) or 0.0, 100 * (median(found, "P@1") or 0.0))
        for name, found in entrants.items()
        if found["rounds"]
    }
    ours = [point for name, point in points.items() if name.startswith(OURS)]
    if not ours:
        return ["ours was not measured"]
    found = []
    for name, (spent, precision) in points.items():
        best = max((p for s, p in ours if s <= spent), default=min(ours)[1])
        if not name.startswith(OURS) and precision > best:
            found.append(f"{name} ({precision:.1f} for {spent:.3g}, ours {best:.1f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data_sets", nargs="*", metavar="NAME", help=f"some of {', '.join(DATA_SETS)}; by default the first four"
    )
    parser.add_argument("--only", nargs="+", default=[*EFFORTS, *PEERS], metavar="ENTRANT")
    options, rest = parser.parse_known_args()
    for name in options.data_sets or USUAL:
        if name not in DATA_SETS:
            sys.exit(f"front.py: there is no data set {name}: choose among {', '.join(DATA_SETS)}")
        measure(name, options.only, rest)
        found = newest("peers", name)
        assert found is not None
        for cost in ("train_cpu_seconds", "model_bytes", "single_ms"):
            print(f"{name}, {cost}: {'; '.join(above(found['entrants'], cost)) or 'no peer above ours'}", flush=True)


if __name__ == "__main__":
    main()
