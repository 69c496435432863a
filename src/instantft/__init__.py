"""Adapt a trained network on the device it runs on, in milliseconds, from about a thousand labelled samples.

    import instantft as ift

    base = ift.load("base.safetensors")
    tuner = ift.FineTuner(base, method="skip2-lora", cache="nf4").fit(x, y)
    tuner.score(x_test, y_test)
    tuner.adapter.save("adapter/")

Names are looked up when they are first used, so that importing the package takes next to no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import DataError, DivergedError, EngineError, FileError, InstantFTError, MismatchError, UsageError
from .spec import LayerSpec, NetSpec, dnn, lenet5

if TYPE_CHECKING:
    from .adapters import Adapter
    from .backbones.builtin import Network, embeddings
    from .backbones.onnx import from_onnx
    from .backbones.torch import from_torch
    from .tuner import FineTuner, load

    __version__: str

__all__ = [
    "Adapter",
    "DataError",
    "DivergedError",
    "EngineError",
    "FileError",
    "FineTuner",
    "InstantFTError",
    "LayerSpec",
    "MismatchError",
    "NetSpec",
    "Network",
    "UsageError",
    "__version__",
    "dnn",
    "embeddings",
    "from_onnx",
    "from_torch",
    "lenet5",
    "load",
]

_LATER = {
    "Adapter": "adapters",
    "FineTuner": "tuner",
    "Network": "backbones.builtin",
    "embeddings": "backbones.builtin",
    "from_onnx": "backbones.onnx",
    "from_torch": "backbones.torch",
    "load": "tuner",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _LATER:
        value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("instantft")
    except PackageNotFoundError:
        return "0+source"  # run from a checkout that was never installed
