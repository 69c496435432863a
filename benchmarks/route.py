"""What nextpnr came to, from the folders of `instantft hw route`, and a picture of where wires meet.

    python -m benchmarks.route "HeAP=build/a" "static=build/b" --picture docs/images/congestion.png

A folder needs nextpnr.log and, for the picture, the heat_congestion_by_coordinate_*.csv beside it, of which the router
writes one a round. The picture has the wires that more nets ask for than they can carry, by place on the chip, in the
router's first round, when every net takes its best way, and in the sixth or last. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import save_json, table

LATER = 6
"""The second round that is drawn."""


def read(folder: Path) -> dict[str, Any]:
    """Wirelength of the placement, what was left open round by round, and Fmax where it was routed."""
    log = (folder / "nextpnr.log").read_text()
    lengths = re.findall(r"wirelen = (\d+)|HPWL after legalise: (\d+)|legal = (\d+)", log)
    rounds = re.findall(r"iter=\d+ wires=(\d+) overused=(\d+)", log)
    open_arcs = re.findall(r"^Info: +\d+ \| +\d+ +\d+ \| +\d+ +\d+ \| +(\d+)\|", log, re.MULTILINE)
    clocks = re.findall(r"Max frequency for clock \S+ ([\d.]+) MHz", log)
    done = "Program finished normally" in log
    return {
        "wirelength": int(next(filter(None, lengths[-1]))) if lengths else None,
        "wires": int(rounds[-1][0]) if rounds else None,
        "overused": [int(n) for _, n in rounds],
        "connections_left": int(open_arcs[-1]) if open_arcs else None,
        "fmax_mhz": float(clocks[-1]) if done and clocks else None,
    }


def heat(path: Path) -> NDArray[np.int64]:
    """Users too many of the wires at each (column, row)."""
    with path.open() as file:
        return np.array([[int(v) for v in row if v] for row in csv.reader(file) if any(row)])


def picture(folders: dict[str, Path], out: Path) -> None:
    """Two rounds of each folder's router."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(folders), 2, figsize=(8.4, 3.3 * len(folders)), dpi=80, squeeze=False, constrained_layout=True
    )
    for row, (title, folder) in zip(axes, folders.items(), strict=True):
        rounds = {int(p.stem.rsplit("_", 1)[1]): p for p in folder.glob("heat_congestion_by_coordinate_*.csv")}
        later = min(LATER, max(rounds))
        maps = {n: heat(rounds[n]) for n in (1, later)}
        top = float(np.quantile(maps[1][maps[1] > 0], 0.98))
        for ax, (n, values) in zip(row, maps.items(), strict=False):
            drawn = ax.imshow(values.T, cmap="magma_r", vmin=0, vmax=top, interpolation="nearest")
            ax.set_title(f"{title}, round {n}: {values.sum():,}", fontsize=9)
            ax.set_xlabel("column", fontsize=8)
            ax.set_ylabel("row", fontsize=8)
        figure.colorbar(drawn, ax=list(row), shrink=0.8, label="users too many")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    folders = {name: Path(path) for name, _, path in (folder.partition("=") for folder in given.folders)}
    result = {name: read(folder) for name, folder in folders.items()}
    rows = [
        [name, r["wirelength"], " ".join(map(str, r["overused"][:6])), r["connections_left"], r["fmax_mhz"]]
        for name, r in result.items()
    ]
    print(table(["", "wirelength", "overused wires, rounds 1 to 6", "connections left", "Fmax MHz"], rows))
    save_json(given.json, result)
    if given.picture:
        picture(folders, given.picture)


if __name__ == "__main__":
    main()
