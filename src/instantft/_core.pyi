"""What native/bind.cpp exports."""

from typing import overload

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
DENSE_BYTES: int

def isas() -> list[str]: ...

class Plan:
    params: int
    workspace: int
    row_width: int
    general: bool
    gain: int
    bias: int
    classes: int
    stride: int
    codec_bytes: int
    def __init__(
        self, layers: NDArray[np.int32], shape: tuple[int, int, int], rank: int, batch: int, codec_id: int
    ) -> None: ...
    def tensors(self) -> list[tuple[int, int, int, int, int, int]]: ...

class Core:
    name: str
    def __init__(self, name: str) -> None: ...
    def fold(self, plan: Plan, params: F32, frozen: F32) -> None: ...
    def records(self, plan: Plan, frozen: F32, x: F32, rows: F32, workspace: F32) -> None: ...
    def fill(
        self,
        plan: Plan,
        frozen: F32,
        x: F32,
        order: NDArray[np.int64],
        slots: NDArray[np.int64],
        store: NDArray[np.uint8],
        workspace: F32,
    ) -> None: ...
    def forward(self, plan: Plan, params: F32, frozen: F32, x: F32, logits: F32, workspace: F32) -> None: ...
    def epochs(
        self,
        plan: Plan,
        params: F32,
        grads: F32,
        velocity: F32,
        frozen: F32,
        x: F32,
        labels: NDArray[np.int32],
        numbers: NDArray[np.int64],
        cached: bool,
        store: NDArray[np.uint8],
        owner: NDArray[np.int64],
        workspace: F32,
        lr: float,
        momentum: float,
        order: NDArray[np.int32],
        loss: NDArray[np.float64],
        correct: NDArray[np.int64],
        targets: F32,
        weights: F32,
        kind: int,
    ) -> tuple[int, int, int]: ...
    def encode(self, plan: Plan, row: F32, out: NDArray[np.uint8], scratch: NDArray[np.uint8]) -> None: ...
    def decode(self, plan: Plan, data: NDArray[np.uint8], row: F32) -> None: ...
    @overload
    def gram(self, x: F32, first: int, last: int, add: bool, g: F32, workspace: NDArray[np.uint8]) -> None: ...
    @overload
    def gram(self, x: F64, first: int, last: int, add: bool, g: F64, workspace: NDArray[np.uint8]) -> None: ...
    @overload
    def inverse_factor(self, g: F32, v: F32, workspace: NDArray[np.uint8]) -> int: ...
    @overload
    def inverse_factor(self, g: F64, v: F64, workspace: NDArray[np.uint8]) -> int: ...
    @overload
    def inverse_blocks(self, v: F32, starts: NDArray[np.int64], out: F32, workspace: NDArray[np.uint8]) -> None: ...
    @overload
    def inverse_blocks(self, v: F64, starts: NDArray[np.int64], out: F64, workspace: NDArray[np.uint8]) -> None: ...
    @overload
    def combine(self, parts: list[F32], w: F32, rows: NDArray[np.int64], d: F32, c: F32, g: F32) -> None: ...
    @overload
    def combine(self, parts: list[F64], w: F64, rows: NDArray[np.int64], d: F64, c: F64, g: F64) -> None: ...
    def fma_loop(self, n: int) -> float: ...
