"""Architectures that are adapted with no code written for them.

    python -m benchmarks.families [NAME …]

Small networks of transformers' families, built from their configurations with random weights, are exported by
torch.onnx (by the older exporter where the newer refuses) and adapted to 200 made-up samples: which taps `auto`
finds, their bytes a sample, the time of `fit` with the opening of the session, how far the exported adapted model is
from `decision_function`, and how far frozen logits are from PyTorch's, each relative to the largest logit. It says
nothing of accuracy. Needs torch, transformers, onnxscript.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from instantft import FineTuner, InstantFTError, from_onnx
from instantft.export.onnx import export_onnx

from .common import announce, table

C, T = 10, 200
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ResNet": (64, {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [2] * 4, "layer_type": "basic"}),
    "MobileNetV2": (64, {"depth_multiplier": 0.35, "image_size": 64}),
    "ViT": (32, {**SMALL, "image_size": 32, "patch_size": 4}),
    "ConvNext": (64, {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1], "image_size": 64}),
    "RegNet": (
        64,
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
    "EfficientNet": (
        64,
        {"image_size": 64, "width_coefficient": 0.35, "depth_coefficient": 0.35, "hidden_dim": 448},
    ),
    "Swin": (
        64,
        {"image_size": 64, "embed_dim": 24, "depths": [1, 1, 2], "num_heads": [2, 4, 4], "window_size": 4},
    ),
    "MobileViT": (
        64,
        {"image_size": 64, "hidden_sizes": [36, 48, 60], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 80]},
    ),
    "PoolFormer": (64, {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 2, 1]}),
    "DeiT": (32, {**SMALL, "image_size": 32, "patch_size": 8}),
    "Beit": (32, {**SMALL, "image_size": 32, "patch_size": 8}),
    "Levit": (
        64,
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1] * 3,
            "key_dim": [8] * 3,
        },
    ),
}


class Logits(torch.nn.Module):
    """Images in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(pixel_values=x).logits


def measure(name: str, folder: Path) -> tuple[object, ...]:
    """A row of the table; in place of numbers, what the exporter or this package says against it."""
    import onnxruntime
    import transformers

    torch.manual_seed(0)
    side, settings = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(num_labels=C, **settings)
    model = Logits(getattr(transformers, f"{name}ForImageClassification")(config)).eval()
    for p in model.parameters():
        if p.ndim > 1:  # with their own start, signals of some vanish on the way
            torch.nn.init.kaiming_normal_(p)
    path, batch = folder / f"{name}.onnx", torch.export.Dim("batch", min=1, max=4096)
    images = (torch.randn(2, 3, side, side),)
    try:
        torch.onnx.export(model, images, str(path), dynamo=True, dynamic_shapes=[{0: batch}], external_data=False)
    except Exception:  # the older exporter takes what the newer does not
        axes = {"x": {0: "batch"}}
        torch.onnx.export(model, images, str(path), dynamo=False, input_names=["x"], dynamic_axes=axes)
    rng = np.random.default_rng(0)
    x: NDArray[np.float32] = rng.normal(size=(T, 3, side, side)).astype(np.float32)
    y = rng.integers(0, C, T)
    try:
        base = from_onnx(path)
        began = time.perf_counter()
        tuner = FineTuner(base, method="skip-ridge").fit(x, y)
        seconds = time.perf_counter() - began
    except InstantFTError as e:
        return name, str(e), "", "", "", "", ""
    export_onnx(base, tuner.adapter, folder / "adapted.onnx")
    session = onnxruntime.InferenceSession(str(folder / "adapted.onnx"), providers=["CPUExecutionProvider"])
    wanted = tuner.decision_function(x[:50])
    found = session.run(None, {session.get_inputs()[0].name: x[:50]})[0]
    with torch.no_grad():
        frozen = model(torch.from_numpy(x[:50])).numpy()
    c = base.spec.record.segments[-1]
    mine = base.records(x[:50].reshape(50, -1))[:, c.offset : c.offset + c.size]
    return (
        name, len(base.candidates), " ".join(map(str, base.spec.tap_widths[1:])), 4 * base.spec.record.size,
        f"{seconds:.2f}", f"{np.abs(found - wanted).max() / np.abs(wanted).max():.0e}",
        f"{np.abs(mine - frozen).max() / np.abs(frozen).max():.0e}",
    )  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or FAMILIES:
            announce(name)
            rows.append(measure(name, Path(folder)))
    head = ("family", "candidates", "widths of the taps", "B a sample, fp32", "fit, s", "export", "against PyTorch")
    print("\n" + table(head, rows))


if __name__ == "__main__":
    main()
