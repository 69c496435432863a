"""What runs inside PyTorch: a module watched while it runs, its taps read, and the modules that an adapter becomes.

The only file that imports torch; `backbones.torch` imports it when it is needed.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine import Tensors
from ..errors import UsageError
from .foreign import Tap, shares
from .graph import LINEAR, PASSING

__all__ = ["WHAT", "Adapted", "Head", "Operation", "Place", "Reader", "Trace", "frozen", "scores_of"]

WHAT = "a PyTorch module"

OPERATORS = {
    "Reshape": "view _unsafe_view reshape expand clone alias detach lift_fresh",
    "Transpose": "permute transpose t",
    "Squeeze": "squeeze unsqueeze",
    "Cast": "_to_copy",
    "Slice": "select slice narrow",
    "Gather": "index index_select gather",
    "ReduceMean": "mean",
    "AveragePool": "avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool1d",
    "MaxPool": "max_pool2d_with_indices max_pool2d _adaptive_max_pool2d adaptive_max_pool2d amax",
    "Add": "add",
    "Mul": "mul div",
    "Relu": "relu clamp_min",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "hardsigmoid",
    "Softplus": "softplus",
    "Softmax": "_softmax",
    "LogSoftmax": "_log_softmax",
    "Conv": "convolution",
    "MatMul": "mm linear",
    "Gemm": "addmm",
}
"""Operators of PyTorch by the names that ONNX has for what they do; in-place ones are the same."""

NAMES = {name: op for op, names in OPERATORS.items() for name in names.split()}


@dataclass(frozen=True)
class Place:
    """Where a value can be met: at the first input or at the output of a module.

    Attributes:
        module: its name.
        call: which of its calls, from 0.
        output: whether at the output.
    """

    module: str
    call: int
    output: bool = False

    @property
    def name(self) -> str:
        """module, or module#N for its N-th call."""
        return self.module + (f"#{self.call + 1}" if self.call else "")


@dataclass(frozen=True)
class Operation:
    """What the module did: a node of a `Graph`; `place` is where the input of a linear map can be met."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    place: Place | None


class Trace(TorchDispatchMode):  # type: ignore[misc]
    """Watches a module run once.

    Attributes:
        operations: what it did, in order.
        constants: names of values that it had before.
        shapes: shape and type of values that are the first input of a module.
        places: where values can be met.
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.constants: set[str] = set()
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.places: dict[str, Place] = {}
        self._where, self._module = where, module
        self._names: Any = WeakTensorKeyDictionary()
        self._makers: dict[str, Operation] = {}
        self._computed: set[str] = set()
        self._running: list[tuple[Place, str]] = []
        self._count = 0
        for name, value in inputs.items():
            self._names[value] = name

    def run(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Run the module, and return what it returns."""
        calls: Counter[str] = Counter()

        def before(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                place = Place(name, calls[name])
                calls[name] += 1
                first = _first(args, kwargs)
                value = "" if first is None else self.name(first)
                if first is not None:
                    self.shapes.setdefault(value, (tuple(first.shape), first.dtype))
                    self.places.setdefault(value, place)
                self._running.append((place, value))

            return hook

        def after(_: nn.Module, __: Any, result: Any) -> None:
            place, _value = self._running.pop()
            if isinstance(result, Tensor):
                self.places.setdefault(self.name(result), Place(place.module, place.call, output=True))

        with _hooks() as handles:
            for name, m in self._module.named_modules():
                handles.append(m.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(m.register_forward_hook(after))
            with self:
                return self._module(*arguments, **named)

    def name(self, value: Tensor) -> str:
        """What a tensor is called; one that nothing here has made is a constant."""
        found = self._names.get(value)
        if found is None:
            found = self._new(value)
            self.constants.add(found)
        return str(found)

    def _new(self, value: Tensor) -> str:
        self._count += 1
        name = f"%{self._count}"
        self._names[value] = name
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        known = func._schema.arguments
        given = {a.name: a.default_value for a in known if a.has_default_value()}
        given |= {a.name: v for a, v in zip(known, args, strict=False)} | kwargs
        self._check(func, name, given)
        read = [self.name(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        computed = not self._computed.isdisjoint(read)
        if name == "_local_scalar_dense" and computed:
            raise UsageError(
                f"{WHAT} must go the same way for every sample, but {self._where} ({self._at()}) takes a number out of "
                "what it computes, to decide by it: use torch.where, or leave that part out"
            )
        result = func(*args, **kwargs)
        plain = name.removesuffix("_")
        op = NAMES.get(plain, name)
        lowest = given.get("min_val" if plain == "hardtanh" else "min")
        if plain in ("hardtanh", "clamp") and isinstance(lowest, (int, float)) and lowest >= 0:
            op = "Relu"
        if plain == "constant_pad_nd" and given["value"] == 0:
            op = "ZeroPad"
        if op == "Gemm":
            read = [read[1], read[2], read[0]]
        place = None
        if op in LINEAR and self._running:
            place = self._tapped(read)
        made = tuple(self._new(t) for t in tree_leaves(result) if isinstance(t, Tensor))
        operation = Operation(op, tuple(read), made, place)
        self.operations.append(operation)
        self._makers.update(dict.fromkeys(made, operation))
        if computed or op in LINEAR:
            self._computed.update(made)
        return result

    def _tapped(self, read: list[str]) -> Place | None:
        """Where the input of a linear map can be met, if it is the first input of the module that runs; it is called
        by that name from now on."""
        place, wanted = self._running[-1]
        value = read[0]
        while value != wanted:
            maker = self._makers.get(value)
            if maker is None or maker.op not in PASSING or maker.op == "Transpose":
                return None
            value = maker.inputs[0]
        read[0] = value
        return place

    def _check(self, func: Any, name: str, given: Mapping[str, Any]) -> None:
        """See that a sample's result depends on nothing but the sample.

        Raises:
            UsageError: batch norm uses the batch, or random numbers are drawn.
        """
        if "batch_norm" in name and (given.get("training") or given.get("train") or "with_update" in name):
            values = given["input"]
            if values.shape[0] > 1:  # of one, it is an instance norm, which PyTorch makes of it
                raise UsageError(
                    f"{WHAT} must use running statistics in eval mode, but {self._where} has a batch norm "
                    f"({self._at()}) that uses the batch's: build it with track_running_stats=True"
                )
        if torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p", 1.0) != 0.0:
            raise UsageError(
                f"{WHAT} must give the same result each time, but {self._where} draws random numbers ({name} in "
                f"{self._at()}) even in eval mode: switch its dropout or noise off"
            )

    def _at(self) -> str:
        return self._running[-1][0].module or "its forward" if self._running else "its forward"


def scores_of(result: Any) -> Tensor | None:
    """The one tensor that a module returns, or the one that it calls logits; None: there is none."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor):
        return result["logits"]
    values = list(result.values()) if isinstance(result, Mapping) else result
    tensors = [v for v in values if isinstance(v, Tensor)] if isinstance(values, (list, tuple)) else []
    return tensors[0] if len(tensors) == 1 else None


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor that a module is given."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    """A list of hooks that are taken off in the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and afterwards each part of it in the mode that it was in.

    Flags are set, and `eval` is not called: modules of some libraries change their weights in it.
    """
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = False
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


class Reader(nn.Module):  # type: ignore[misc]
    """x^1 … x^{L-1} and c of whatever a module is given.

    Args:
        taps: what to read, and where each is met.
        scores: where c is met; None: it is what the module returns.
        positions: P.
    """

    def __init__(self, taps: Sequence[tuple[Tap, Place]], scores: Place | None, positions: int) -> None:
        super().__init__()
        self.taps, self.scores, self.positions = tuple(taps), scores, positions
        for k, (tap, _) in enumerate(taps):
            if tap.cells != tap.shape:
                places = slice(0, -1) if tap.last else slice(1, None)
                for i, (n, cells) in enumerate(zip(tap.shape[places], tap.cells[places], strict=True)):
                    self.register_buffer(f"shares_{k}_{i}", torch.from_numpy(shares(n, cells)), persistent=False)

    def forward(self, module: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> list[Tensor]:
        """The values, (n·P, size) float32 each; the last as the module has it."""
        found: dict[int | Place, Tensor] = {}
        wanted = [(k, place) for k, (_, place) in enumerate(self.taps)]
        calls: Counter[tuple[str, bool]] = Counter()

        def before(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                place = Place(name, calls[name, False])
                calls[name, False] += 1
                value = _first(args, kwargs)
                assert value is not None
                for k, met in wanted:
                    if met == place:
                        found[k] = self.read(k, value)  # at once: it may be changed in place
                if place == self.scores:
                    found[place] = value.clone()

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, result: Tensor) -> None:
                place = Place(name, calls[name, True], output=True)
                calls[name, True] += 1
                if place == self.scores:
                    found[place] = result.clone()

            return hook

        with _hooks() as handles:
            places = [place for _, place in self.taps] + ([] if self.scores is None else [self.scores])
            for name in {p.module for p in places if not p.output}:
                handles.append(module.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True))
            for name in {p.module for p in places if p.output}:
                handles.append(module.get_submodule(name).register_forward_hook(after(name)))
            result = module(*arguments, **named)
        c = scores_of(result) if self.scores is None else found.get(self.scores)
        if c is None or len(found) != len(places):
            raise UsageError(f"{WHAT} must do the same for every sample, but this one skipped some of its parts")
        return [*(found[k] for k, _ in wanted), c]

    def read(self, k: int, value: Tensor) -> Tensor:
        """x^{k+1} out of the value it is read from: the means of its cells, laid flat."""
        tap = self.taps[k][0]
        value = value.to(torch.float32)
        if tap.cells == tap.shape:
            return value.flatten(0, 1).clone() if self.positions > 1 else value.flatten(1).clone()
        rows = getattr(self, f"shares_{k}_0").to(value.device)
        if len(tap.shape) == 2:
            return (rows @ value if tap.last else value @ rows.T).flatten(1)
        columns = getattr(self, f"shares_{k}_1").to(value.device)
        if tap.last:
            return torch.einsum("gh,vw,bhwc->bgvc", rows, columns, value).flatten(1)
        return (rows @ value @ columns.T).flatten(1)


class Head(nn.Module):  # type: ignore[misc]
    """y = gain·c + Σ x^k·A_k·B_k + bias, with the adapter's tensors under the names they have in its file.

    Args:
        tensors: the adapter's.
        L, C: number of layers and of outputs.
    """

    def __init__(self, tensors: Tensors, L: int, C: int) -> None:
        super().__init__()
        self.L = L
        self.output, self.lora = nn.Module(), nn.ModuleDict()
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            owner = self.output
            key = rest
            if group == "lora":
                pair, _, key = rest.partition(".")
                if pair not in self.lora:
                    self.lora[pair] = nn.Module()
                owner = self.lora[pair]
            owner.register_parameter(key, nn.Parameter(torch.from_numpy(value.copy()), requires_grad=False))
        self.C = C

    def forward(self, c: Tensor, *taps: Tensor) -> Tensor:
        """y (n, C).

        Args:
            c: (n, C), what the frozen network yields.
            taps: x^0 … x^{L-1}, (n, N_k) each; an x^0 that is no tap may be anything, say c.
        """
        y = c.to(torch.float32)
        if hasattr(self.output, "gain"):
            y = y * self.output.gain
        for k, x in enumerate(taps):
            pair = f"{k}-{self.L}"
            if pair in self.lora:
                y = y + (x.to(torch.float32) @ self.lora[pair].A) @ self.lora[pair].B
        if hasattr(self.output, "bias"):
            y = y + self.output.bias
        return y


class Adapted(nn.Module):  # type: ignore[misc]
    """A module with an adapter: takes what the module takes, returns the adapted logits.

    The module is inside as it is, and stays in eval mode while it runs here. Another head on the same module is another
    adapter: ``adapted.head = network.head(other)``.

    Args:
        module: the frozen one.
        reader: of its taps.
        head: the adapter.
        input_tap: whether the input is x^0.
    """

    def __init__(self, module: nn.Module, reader: Reader, head: Head, input_tap: bool) -> None:
        super().__init__()
        self.module, self.reader, self.head, self.input_tap = module, reader, head, input_tap
        self.training = False
        self.__class__ = _called_like(module)

    def train(self, mode: bool = True) -> Adapted:
        """Changes nothing: the module is frozen, and so is the head."""
        return self

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Logits (n, C), or (n, P, C) of a network that scores positions."""
        with frozen(self.module):
            *behind, c = self.reader(self.module, arguments, named)
        flat = c.flatten(0, 1) if self.reader.positions > 1 else c.flatten(1)
        entry = flat
        if self.input_tap:
            first = _first(arguments, named)
            assert first is not None
            entry = first.flatten(1)
        return self.head(flat, entry, *behind).to(c.dtype).reshape(c.shape)


def _called_like(module: nn.Module) -> type[Adapted]:
    """`Adapted` with the signature of a module's `forward`, by which torch.export finds the names of arguments."""

    def forward(self: Adapted, *arguments: Any, **named: Any) -> Tensor:
        return Adapted.forward(self, *arguments, **named)

    own = inspect.signature(Adapted.forward).parameters["self"]
    asked = inspect.signature(module.forward).parameters.values()
    forward.__signature__ = inspect.Signature([own, *asked])  # type: ignore[attr-defined]
    return type("Adapted", (Adapted,), {"forward": forward, "__doc__": Adapted.__doc__})
