"""Architectures that are adapted with no code written for them.

    python -m benchmarks.families [NAME …] [--variants]

Small networks of transformers' families, built from their configurations with random weights, are exported by
torch.onnx (by the older exporter where the newer refuses) and adapted to 200 made-up samples: which taps `auto`
finds, their bytes a sample, the time of `fit` with the opening of the session, how far the exported adapted model is
from `decision_function`, and how far frozen logits are from PyTorch's, each relative to the largest logit. It says
nothing of accuracy. `--variants` does the same with each network quantised to int8 (QDQ, by onnxruntime's
quantize_static), with images that have their channels last, and with external data. Needs torch, transformers,
onnxscript; variants need onnx.
"""

from __future__ import annotations

import argparse
import logging
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
from .networks import export

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


def build(name: str, path: Path) -> Logits:
    """The network of a family with random weights, written to `path`."""
    import transformers

    torch.manual_seed(0)
    side, settings = FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(num_labels=C, **settings)
    model = Logits(getattr(transformers, f"{name}ForImageClassification")(config)).eval()
    for p in model.parameters():
        if p.ndim > 1:  # with their own start, signals of some vanish on the way
            torch.nn.init.kaiming_normal_(p)
    export(model, made_up_images(side, 2), path)
    return model


def made_up_images(side: int, n: int) -> NDArray[np.float32]:
    """Made-up images (n, 3, side, side)."""
    return np.random.default_rng(0).normal(size=(n, 3, side, side)).astype(np.float32)


def adapt(path: Path, x: NDArray[np.float32], channels_last: bool = False) -> tuple[FineTuner, float, float]:
    """The adapted network, seconds, and how far its export is from it, relative to the largest logit."""
    import onnxruntime

    y = np.random.default_rng(1).integers(0, C, len(x))
    base = from_onnx(path)
    began = time.perf_counter()
    tuner = FineTuner(base, method="skip-ridge").fit(x, y)
    seconds = time.perf_counter() - began
    adapted = path.with_name("adapted.onnx")
    export_onnx(base, tuner.adapter, adapted)
    session = onnxruntime.InferenceSession(str(adapted), providers=["CPUExecutionProvider"])
    some = x[:50].transpose(0, 2, 3, 1) if channels_last else x[:50]
    found = session.run(None, {session.get_inputs()[0].name: some})[0]
    wanted = tuner.decision_function(x[:50])
    return tuner, seconds, float(np.abs(found - wanted).max() / np.abs(wanted).max())


def measure(name: str, folder: Path) -> tuple[object, ...]:
    """A row of the table; in place of numbers, what the exporter or this package says against it."""
    path = folder / f"{name}.onnx"
    model = build(name, path)
    x = made_up_images(FAMILIES[name][0], T)
    try:
        tuner, seconds, difference = adapt(path, x)
    except InstantFTError as e:
        return name, str(e), "", "", "", "", ""
    base: Any = tuner.base
    with torch.no_grad():
        frozen = model(torch.from_numpy(x[:50])).numpy()
    c = base.spec.record.segments[-1]
    mine = base.records(x[:50].reshape(50, -1))[:, c.offset : c.offset + c.size]
    return (
        name, len(base.candidates), " ".join(map(str, base.spec.tap_widths)), 4 * base.spec.record.size,
        f"{seconds:.2f}", f"{difference:.0e}", f"{np.abs(mine - frozen).max() / np.abs(frozen).max():.0e}",
    )  # fmt: skip


def variants(name: str, folder: Path) -> tuple[object, ...]:
    """How far the export of each variant is from `decision_function`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    path, x = folder / f"{name}.onnx", made_up_images(FAMILIES[name][0], 64)
    build(name, path)
    entry = onnx.load(str(path)).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(x[:16])

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {entry: row[None]}

    quantised, last, outside = (folder / f"{kind}.onnx" for kind in ("int8", "last", "outside"))
    quantize_static(str(path), str(quantised), Reader(), quant_format=QuantFormat.QDQ)
    model = onnx.load(str(path))
    image = model.graph.input[0]
    sizes = image.type.tensor_type.shape.dim
    sizes.append(sizes.pop(1))
    turned = onnx.helper.make_node("Transpose", [f"{entry}_nhwc"], [entry], perm=[0, 3, 1, 2])
    image.name = f"{entry}_nhwc"
    model.graph.node.insert(0, turned)
    onnx.save(model, str(last))
    onnx.save(onnx.load(str(path)), str(outside), save_as_external_data=True, location="weights.bin")
    row: list[object] = [name]
    for kind in (quantised, last, outside):
        try:
            row.append(f"{adapt(kind, x, kind is last)[2]:.0e}")
        except InstantFTError as e:
            row.append(str(e))
    return tuple(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(FAMILIES)}; none: all")
    parser.add_argument("--variants", action="store_true", help="int8, channels last, and external data instead")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in options.names or FAMILIES:
        announce(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append((variants if options.variants else measure)(name, Path(folder)))
    head: tuple[str, ...] = ("family", "int8, QDQ", "channels last", "external data")
    if not options.variants:
        head = ("family", "candidates", "widths of the taps", "B a sample, fp32", "fit, s", "export", "against PyTorch")
    print("\n" + table(head, rows))


if __name__ == "__main__":
    main()
