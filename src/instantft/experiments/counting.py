"""InstantFT, Table 1 and §5.5: what can be counted and need not be run."""

from __future__ import annotations

from ..cache.codecs import codec
from ..cost import cost
from ..data.protocols import RANK
from ..methods import METHODS
from ..spec import NetSpec, lenet5
from .core import Results, Section, Settings, Table, Target, Trial

__all__ = ["CACHE", "TABLE_1"]

NETS: dict[str, NetSpec] = {"MNIST": lenet5((1, 28, 28)), "SVHN": lenet5((3, 32, 32))}
COLUMNS = ("parameters", "forward", "backward", "memory")

PAPER_1: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "ft-all": {"MNIST": ("61706", "0.851", "1.444", "567.8"), "SVHN": ("62006", "1.321", "1.914", "579.4")},
    "ft-last": {"MNIST": ("850", "0.851", "0.002", "285.8"), "SVHN": ("850", "1.321", "0.002", "296.1")},
    "ft-bias": {"MNIST": ("236", "0.851", "0.611", "322.0"), "SVHN": ("236", "1.321", "0.611", "332.3")},
    "lora-all": {"MNIST": ("36328", "0.923", "0.743", "611.8"), "SVHN": ("45480", "1.412", "0.762", "695.4")},
    "lora-last": {"MNIST": ("376", "0.852", "0.001", "285.4"), "SVHN": ("376", "1.322", "0.001", "295.8")},
    "skip-lora": {"MNIST": ("10456", "0.872", "0.036", "366.2"), "SVHN": ("19608", "1.360", "0.054", "449.8")},
}
"""As printed: parameters, MFLOPs forward and backward, kB."""


def counted(method: str, net: str) -> tuple[str, str, str, str]:
    """A row of the table from the cost model, to the printed digits."""
    c = cost(NETS[net], METHODS[method], RANK)
    return (
        str(c.parameters),
        f"{c.forward / 1e6:.3f}",
        f"{c.backward_printed / 1e6:.3f}",
        f"{c.memory / 1000:.1f}",
    )


def _none(_: Settings) -> list[Trial]:
    return []


def _section_1(_: Settings, __: Results) -> Section:
    paper = {f"{net}, {m}": dict(zip(COLUMNS, cells[net], strict=True)) for m, cells in PAPER_1.items() for net in NETS}
    ours = {
        f"{net}, {m}": dict(zip(COLUMNS, counted(m, net), strict=True)) for m in PAPER_1 for net in NETS
    }  # fmt: skip
    differing = [f"{row}: {c}" for row in paper for c in COLUMNS if paper[row][c] != ours[row][c]]
    cells = len(paper) * len(COLUMNS)
    tables = []
    for net in NETS:
        rows = [
            [METHODS[m].title, *(t for p, o in zip(PAPER_1[m][net], counted(m, net), strict=True) for t in (p, o))]
            for m in PAPER_1
        ]
        head = [net]
        for c in ("parameters", "forward, MFLOP", "backward, MFLOP", "memory, kB"):
            head += [f"{c}: paper", "ours"]
        tables.append(Table(head, rows))
    verdict = (
        f"All {cells} cells agree to the printed digits."
        if not differing
        else f"{len(differing)} of {cells} cells differ: {'; '.join(differing)}."
    )
    note = (
        f"{verdict} Counted by cost.py, nothing is run. InstantFT stands in the row of Skip-LoRA; its backward FLOPs"
        " count gradients with respect to the adapters' inputs, which nothing needs (14,240 of 35,552 on MNIST). Our"
        " copy of the paper has “366 2KB” for its memory, a lost point."
    )
    return Section(_floats(paper), _floats(ours), "parameters; MFLOP; MFLOP; kB", 0, note, tables)


def _floats(side: dict[str, dict[str, str]]) -> dict[str, dict[str, float]]:
    return {row: {c: float(v) for c, v in cells.items()} for row, cells in side.items()}


TABLE_1 = Target("Parameters, FLOPs and memory of every method", "InstantFT, Table 1", _none, _section_1)

IMAGES = {"RotMNIST": 1024, "SVHN": 73257}
NET_OF = {"RotMNIST": "MNIST", "SVHN": "SVHN"}
PAPER_CACHE = {"RotMNIST": {"fp32": 7.33, "nf4": 1.02}, "SVHN": {"fp32": 524.52, "nf4": 72.89}}


def _section_cache(_: Settings, __: Results) -> Section:
    ours = {
        name: {
            c: round(codec(c).bytes_per_sample(NETS[NET_OF[name]].record) * T / 1e6, 2)
            for c in ("fp32", "nf4", "relu4")
        }
        for name, T in IMAGES.items()
    }
    sizes = {c: codec(c).bytes_per_sample(NETS["MNIST"].record) for c in ("fp32", "nf4", "relu4")}
    rows = [
        [f"{name}, {T:,} images", *(f"{v:.2f}" for c in ("fp32", "nf4") for v in (PAPER_CACHE[name][c], ours[name][c])),
         f"{ours[name]['relu4']:.2f}"]
        for name, T in IMAGES.items()
    ]  # fmt: skip
    agree = all(ours[name][c] == v for name, cells in PAPER_CACHE.items() for c, v in cells.items())
    verdict = "All four sizes agree to the printed digits" if agree else "Not all four sizes agree"
    note = (
        f"{verdict}: {sizes['fp32']:,} bytes a sample in fp32, {sizes['nf4']} in NF4 with one fp32 scale a channel or"
        f" vector, {sizes['fp32'] / sizes['nf4']:.2f} times fewer (paper: 7.20). Flags and padding are not counted."
        f" relu4, our own 4-bit codec, needs {sizes['relu4']}. The paper fine-tunes SVHN on “the test split”, but"
        " counts the 73,257 images of the train split; the size is that of 73,257."
    )
    head = ["", "fp32, paper", "fp32, ours", "NF4, paper", "NF4, ours", "relu4, ours"]
    return Section(PAPER_CACHE, ours, "MB (10^6 bytes)", 0, note, [Table(head, rows)])


CACHE = Target("Size of the forward cache", "InstantFT, §5.5", _none, _section_cache)
