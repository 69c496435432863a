"""What a foreign network's graph tells before anything runs: its logits, and what may be tapped on the way to them.

A graph is a row of nodes in the order they run. Those of ONNX files are there to be read (onnx_file.py), those of
PyTorch modules are seen while they run (torch_modules.py); operators have ONNX's names here either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from ..errors import InstantFTError

__all__ = ["LINEAR", "PASSING", "Graph", "Step"]

SHAPING = frozenset(("Identity", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Dropout", "Cast", "Transpose"))
PASSING = SHAPING | {"QuantizeLinear", "DequantizeLinear"}
"""Operators that change how values lie, not what they are."""

MEANS = frozenset(("GlobalAveragePool", "AveragePool", "ReduceMean"))
PICKING = frozenset(("Slice", "Gather"))
"""Operators that take some of the values of their first input."""

SCORES = frozenset(("Softmax", "LogSoftmax", "Sigmoid"))
LINEAR = frozenset(("Conv", "Gemm", "MatMul"))
POSITIVE = frozenset(("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Softplus"))
KEEP_SIGN = PASSING | MEANS | PICKING | {"MaxPool", "GlobalMaxPool", "ZeroPad"}


class Step(Protocol):
    """A node: an operator, the names of the values it reads, and of those it makes."""

    @property
    def op(self) -> str: ...
    @property
    def inputs(self) -> Sequence[str]: ...
    @property
    def outputs(self) -> Sequence[str]: ...


S = TypeVar("S", bound=Step)


class Graph:
    """Who makes which value, and what follows from that.

    Args:
        nodes: in the order they run.
        constants: names of values that are the same for every sample.
        entries: names of the network's inputs.
        what, where, error: how a refusal begins ("an ONNX model"), whom it names, and of which kind it is.
    """

    def __init__(
        self,
        nodes: Sequence[Step],
        constants: Iterable[str],
        entries: Iterable[str],
        what: str,
        where: str,
        error: type[InstantFTError],
    ) -> None:
        self.nodes, self.fixed, self.entries = nodes, set(constants), frozenset(entries)
        self.what, self.where, self.error = what, where, error
        self.makers: dict[str, Step] = {}
        for n in nodes:
            for name in n.outputs:
                if name in self.makers:
                    raise self.refused("make each value once", f"makes {name[:60]!r} twice")
                self.makers[name] = n
            if all(name in self.fixed for name in n.inputs if name):  # a Constant has no inputs
                self.fixed.update(n.outputs)

    def refused(self, rule: str, fact: str) -> InstantFTError:
        """The error to raise where a rule is broken."""
        return self.error(f"{self.what} must {rule}, but {self.where} {fact}")

    def ending(self, result: str) -> tuple[str, Step]:
        """The logits, which are `result` or what a softmax or sigmoid before it reads, and the linear map they are of.

        Raises:
            InstantFTError: there are none.
        """
        logits = result
        while (n := self.makers.get(logits)) is not None and n.inputs and (n.op in PASSING or n.op in SCORES):
            if n.op in SCORES:
                return n.inputs[0], self._linear(n.inputs[0])
            logits = n.inputs[0]
        return result, self._linear(result)

    def _linear(self, value: str) -> Step:
        """The linear map that yields `value`, but for constants and means; of a sum of such maps, the first."""
        found: list[Step] = []
        waiting, seen = [value], {value}
        while waiting:
            n = self.makers.get(waiting.pop())
            free = [] if n is None else [name for name in n.inputs if name and name not in self.fixed]
            if n is None or not free:
                raise self.refused("end in a linear layer with weights of its own", "has none")
            if n.op in LINEAR and len(n.inputs) > 1 and n.inputs[1] in self.fixed:
                found.append(n)
                continue
            if n.op in PICKING:
                free = free[:1]
            single = n.op in PASSING or n.op in MEANS or n.op in PICKING or (n.op == "Mul" and len(free) == 1)
            if not single and n.op not in ("Add", "Sum"):
                raise self.refused(
                    "end in a linear layer (Gemm, MatMul or Conv; then at most means, softmax, sigmoid)",
                    f"ends in {n.op[:40]!r}: let it end in its logits",
                )
            waiting += [name for name in reversed(free) if name not in seen]
            seen.update(free)
        return found[0]

    def candidates(self, logits: str, last: Step) -> dict[str, Step]:
        """Inputs of linear maps and convolutions on the way to the logits, in the order of the graph, and the first
        node that reads each; the input of the last linear map comes last."""
        waiting = [self.makers[logits]]
        needed = set(waiting[0].outputs)
        while waiting:
            for name in waiting.pop().inputs:
                n = self.makers.get(name)
                if n is not None and not needed.issuperset(n.outputs):
                    needed.update(n.outputs)
                    waiting.append(n)
        found: dict[str, Step] = {}
        for n in self.nodes:
            if n.op in LINEAR and needed.intersection(n.outputs) and len(n.inputs) > 1:
                value, weight = n.inputs[:2]
                if weight in self.fixed and value not in self.fixed:
                    found.setdefault(self.entry(value), n)
        final = self.entry(last.inputs[0])
        found[final] = found.pop(final, last)
        return found

    def entry(self, value: str) -> str:
        """The network's input, where `value` is that laid out otherwise; else the value."""
        at = value
        for _ in range(len(self.nodes)):
            n = self.makers.get(at)
            if n is None or n.op not in PASSING:
                break
            at = n.inputs[0]
        return at if at in self.entries else value

    def nonnegative(self, value: str) -> bool:
        """Whether no value can be below zero."""
        for _ in range(len(self.nodes)):
            n = self.makers.get(value)
            if n is None or not n.inputs or (n.op not in KEEP_SIGN and n.op not in POSITIVE):
                return False
            if n.op in POSITIVE:
                return True
            value = n.inputs[0]
        return False
