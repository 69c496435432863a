"""The public surface: what `__all__` says is there, and nothing else is promised."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import instantft as ift

SURFACE = {
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
}
MODULES = [
    m.name for m in pkgutil.walk_packages(ift.__path__, "instantft.") if not m.name.endswith(("_core", "__main__"))
]


def test_surface() -> None:
    assert set(ift.__all__) == SURFACE
    assert set(dir(ift)) >= SURFACE
    for name in ift.__all__:
        assert getattr(ift, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ift.nonsense


@pytest.mark.parametrize("name", MODULES)
def test_every_module_keeps_its_promise(name: str) -> None:
    if name == "instantft.backbones.torch_modules":
        pytest.importorskip("torch", reason="PyTorch is an extra: pip install 'instantft[torch]'")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} must say what it is for"
    for public in getattr(module, "__all__", []):
        thing = getattr(module, public)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == name:
            assert thing.__doc__, f"{name}.{public} must be documented"
