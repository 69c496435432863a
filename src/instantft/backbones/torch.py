"""PyTorch modules as they are (extra ``[torch]``): `foreign` says what such a network is.

The module runs once while every operation is watched, as the graph of an ONNX file would be read; from then on hooks
that are put on before each batch and taken off after it read the taps. Nothing in the module is changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..engine import Floats
from ..errors import DataError, EngineError, UsageError
from ..spec import MAX_WIDTH, NetSpec
from .builtin import check_preprocessing
from .foreign import PROBED, ForeignNetwork, Input, Tap, choose, positions_of, row_shape, taps_of, usable
from .graph import Graph

if TYPE_CHECKING:
    from ..adapters import Adapter
    from .torch_modules import Adapted, Head, Operation, Place

__all__ = ["TOLERANCE", "TorchNetwork", "from_torch"]

TOLERANCE = 1e-4
"""How far `TorchNetwork.adapted` may be from `decision_function`, relative to the largest logit: both compute in
float32, and sums of some thousand products in another order differ by less."""


@dataclass(frozen=True, eq=False, repr=False)
class TorchNetwork(ForeignNetwork):
    """A PyTorch module, with the taps that were chosen. Made by `from_torch`.

    Attributes:
        module: it; never changed here.
        places: where each tap is met.
        scores: where the logits are met; None: the module returns them.
        dtypes: PyTorch's types of the inputs.
        named: whether inputs are given by name.
    """

    module: Any = field(kw_only=True)
    places: tuple[Place, ...] = field(kw_only=True)
    scores: Place | None = field(kw_only=True)
    dtypes: tuple[Any, ...] = field(kw_only=True)
    named: bool = field(kw_only=True)

    FORMAT = "instantft-torch"
    WHAT = "a PyTorch module"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_known", (None, ""))
        object.__setattr__(self, "_reader", self._read())

    @property
    def digest(self) -> str:
        """SHA-256 of the module's parts, and of name, shape, type and bytes of its parameters and buffers.

        Computed anew when one of them was changed by anything that PyTorch counts as a change.
        """
        state = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()]
        stamp = [(name, id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for name, t in state]
        known: tuple[Any, str] = self._known  # type: ignore[attr-defined]
        if known[0] != stamp:
            known = stamp, _digest(self.module, state)
            object.__setattr__(self, "_known", known)
        return known[1]

    def save(self, path: str | PathLike[str]) -> None:
        """Not possible.

        Raises:
            UsageError: always.
        """
        raise UsageError("a PyTorch module must be saved by who made it; torch.export takes adapted(adapter)")

    def as_array(self, value: Any) -> NDArray[Any]:
        """See ForeignNetwork.as_array; tensors of any device are taken too."""
        torch = _torch()
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return super().as_array(value)

    def run(self, x: Floats, threads: int) -> list[NDArray[Any]]:
        """See ForeignNetwork.run."""
        from .torch_modules import frozen

        torch, device = _torch(), _device(self.module)
        values = self.unpack(x).values()
        tensors = [torch.from_numpy(v).to(device, d) for v, d in zip(values, self.dtypes, strict=True)]
        try:
            with _threads(threads), frozen(self.module), torch.no_grad():
                *behind, c = self._reader(self.module, *self._call(tensors))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as e:
            raise DataError(f"a PyTorch module must run on these samples, but does not: {_reason(e)}") from None
        c = (c.flatten(0, 1) if self.spec.positions > 1 else c.flatten(1)).float()
        return [v.cpu().numpy() for v in (*behind, c)]

    def head(self, adapter: Adapter) -> Head:
        """The adapter as a module: y from c and the taps (see `torch_modules.Head`).

        Raises:
            MismatchError: it was made on another network.
            UsageError: it has a lift.
        """
        from .torch_modules import Head

        adapter.check_base(self)
        lift.check_none(adapter.tensors)
        made: Head = Head(adapter.tensors, self.spec.L, self.spec.C).to(_device(self.module))
        return made

    def adapted(self, adapter: Adapter) -> Adapted:
        """The module with an adapter, as a module that takes what it takes and returns adapted logits, no further from
        `decision_function` than TOLERANCE. ``torch.export.export`` takes it.

        Inputs are those of the module: where `mean` and `std` are given, samples after these.

        Raises:
            as `head`.
        """
        from .torch_modules import Adapted

        return Adapted(self.module, self._read(), self.head(adapter), self.spec.input_tap)

    def _read(self) -> Any:
        from .torch_modules import Reader

        made = Reader(list(zip(self.taps, self.places, strict=True)), self.scores, self.spec.positions)
        return made.to(_device(self.module))

    def _call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the module."""
        if self.named:
            return (), {i.name: t for i, t in zip(self.inputs, tensors, strict=True)}
        return tuple(tensors), {}


def from_torch(
    module: Any,
    example_input: Any,
    taps: str | Sequence[str] | None = None,
    *,
    like: NetSpec | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> TorchNetwork:
    """A PyTorch module, to be adapted as one of our own networks. It is left as it is, and run in eval mode.

    Args:
        module: an `nn.Module` on any device, of any float type.
        example_input: a batch it takes: a tensor or array (T, …), a dict of such by the names of its arguments, or a
            tuple in their order. Samples must have the same shape, so sequences are to be padded to its length.
        taps, like, mean, std: as in `from_onnx`; a tap is called like the module that it is the input of.

    Raises:
        EngineError: PyTorch is not installed.
        UsageError: it is no module that ends in a linear layer with one score a class (or a class and position), it
            draws random numbers or uses statistics of the batch even in eval mode, or no candidate has such a name.
        DataError: it does not run on the example.
    """
    torch = _torch()
    from .torch_modules import WHAT, Trace, frozen, scores_of

    if isinstance(module, torch.jit.ScriptModule) or not isinstance(module, torch.nn.Module):
        raise UsageError(f"{WHAT} must be an nn.Module, uncompiled, not {type(module).__name__}")
    if isinstance(module, torch._dynamo.eval_frame.OptimizedModule):
        raise UsageError(f"{WHAT} must be an nn.Module, uncompiled: give the one that torch.compile was given")
    where, device = type(module).__name__, _device(module)
    if device.type == "meta":
        raise UsageError(f"{WHAT} must have its weights, but {where} has none yet (device meta)")
    named = isinstance(example_input, Mapping)
    given = _given(torch, module, example_input)
    inputs = tuple(Input(name, tuple(t.shape[1:]), _type(torch, name, t)) for name, t in given.items())
    probe = {name: t.detach()[torch.arange(PROBED, device=t.device) % len(t)].to(device) for name, t in given.items()}
    trace = Trace(module, probe, where)
    try:
        with frozen(module), torch.no_grad():
            result = trace.run(() if named else tuple(probe.values()), probe if named else {})
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as e:
        if isinstance(e, UsageError):
            raise
        raise DataError(f"{WHAT} must run on example_input, but {where} does not: {_reason(e)}") from None
    scores = scores_of(result)
    if scores is None:
        names = ", ".join(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
        raise UsageError(f"{WHAT} must return one tensor, or one called logits, but {where} returns {names:.120}")
    graph = Graph(trace.operations, trace.constants, given, WHAT, where, UsageError)
    returned = trace.name(scores)
    logits, last = graph.ending(returned)
    place = None if logits == returned else trace.places.get(logits)
    if logits != returned and place is None:
        raise UsageError(f"{WHAT} must return its logits, or have a module that does, but {where} has only scores")
    shape = tuple(scores.shape)
    if shape[:1] != (PROBED,):
        raise UsageError(f"{WHAT} must keep the batch in front, but of {PROBED} samples {where} yields {list(shape)}")
    wrong = UsageError(f"{WHAT} must end in one score a class, but {where} ends in {list(shape[1:])} a sample")
    positions = positions_of(shape[1:], inputs, wrong)
    rows = row_shape(inputs, positions)
    found, places = _found(trace, graph, graph.candidates(logits, last), inputs, positions)
    candidates = usable(found, positions)
    entry, name = inputs[0].name, "logits" if place is None else place.name
    if like is not None:
        taps = taps_of(like, entry)
    C = int(np.prod(shape[1:])) // positions
    spec, behind = choose(candidates, taps, entry, rows, name, C, positions)
    means, stds = check_preprocessing(tuple(mean), tuple(std), rows)
    return TorchNetwork(
        spec, {}, means, stds,
        inputs=inputs, taps=behind, candidates=candidates, logits=name,
        module=module, places=tuple(places[tap.value] for tap in behind), scores=place,
        dtypes=tuple(t.dtype for t in given.values()), named=named,
    )  # fmt: skip


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise EngineError(
            "PyTorch must be installed to run its modules, but is not: pip install 'instantft[torch]'"
        ) from None
    return torch


def _given(torch: Any, module: Any, example: Any) -> dict[str, Any]:
    """The example's tensors by the names of the module's arguments."""
    if isinstance(example, Mapping):
        named = {str(name): value for name, value in example.items()}
    else:
        values = example if isinstance(example, tuple) else (example,)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
        known += [f"input{i}" for i in range(len(known), len(values))]
        named = dict(zip(known, values, strict=False))
    made = {}
    for name, value in named.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise UsageError(f"example_input must hold tensors only, but {name!r:.60} is {type(value).__name__}")
        made[name] = torch.as_tensor(value)
    sizes = {len(t) if t.ndim > 1 else 0 for t in made.values()}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in made.items())
        raise UsageError(f"example_input must be a batch, each input with the samples in front, not {shapes:.120}")
    return made


def _type(torch: Any, name: str, t: Any) -> str:
    """NumPy's name of the type that an input's values are unpacked to."""
    if t.dtype.is_complex or t[0].numel() > MAX_WIDTH:
        raise UsageError(f"{name} must be at most {MAX_WIDTH} real numbers a sample, not {t[0].numel()} of {t.dtype}")
    if t.dtype.is_floating_point:
        return "float32"
    return "bool" if t.dtype == torch.bool else "int64"


def _found(
    trace: Any, graph: Graph, values: Mapping[str, Any], inputs: Sequence[Input], positions: int
) -> tuple[list[Tap], dict[str, Place]]:
    """Values that can be met at a module and keep the batch in front; and where."""
    from .torch_modules import Place

    found: list[Tap] = []
    places: dict[str, Place] = {}
    plain = len(inputs) == 1 and not inputs[0].whole and positions == 1
    for value, reader in values.items():
        operation: Operation = reader
        if value in graph.entries:
            if not plain:
                continue  # x^0 is not what the linear map reads
            name, place, shape, dtype = value, Place("", 0), (PROBED, *inputs[0].shape), "float32"
        elif operation.place is None or value not in trace.shapes:
            continue
        else:
            name, place = operation.place.name, operation.place
            shape, kind = trace.shapes[value]
            dtype = str(kind).removeprefix("torch.")
        if len(shape) > 1 and shape[0] == PROBED:
            found.append(Tap(name, shape[1:], 0, graph.nonnegative(value), dtype, operation.op != "Conv"))
            places[name] = place
    return found, places


def _device(module: Any) -> Any:
    """Where its first parameter or buffer is."""
    torch = _torch()
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """PyTorch with n threads, and afterwards as many as it had."""
    torch = _torch()
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digest(module: Any, state: Sequence[tuple[str, Any]]) -> str:
    torch = _torch()
    parts = [(name, type(m).__name__, m.extra_repr()) for name, m in module.named_modules()]
    h = hashlib.sha256(json.dumps(parts).encode())
    for name, t in state:
        h.update(json.dumps([name, list(t.shape), str(t.dtype)]).encode())
        h.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _reason(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:200]
