"""Folders of images: what the pixels are, which class they are of, and every way in which they can be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft import cli
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.data import as_samples, load_samples, pictures
from instantft.engine import get_engine
from instantft.errors import DataError, UsageError
from instantft.spec import lenet5

from .samples import write_npz

Image = pytest.importorskip("PIL.Image", reason="the extra [images] is not installed")

RNG = np.random.default_rng(0)

JPEG_LOSS = 12
"""Largest mean difference, in steps of 255, of a smooth picture from what JPEG (95) or WebP (90) makes of it."""


def smooth(height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """A picture that compresses well, different in every corner and channel."""
    row, column = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [200 * row * column + 40 * (k + 1) * row / 4 + 10 * k for k in range(channels)]
    return np.stack(planes, -1).astype(np.uint8).squeeze()


def folder(path: Path, **classes: list[Any]) -> Path:
    for name, images in classes.items():
        (path / name).mkdir(parents=True)
        for k, image in enumerate(images):
            Image.fromarray(image).save(path / name / f"{k}.png")
    return path


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 6, 5)), (3, (3, 6, 5)), (4, (4, 6, 5))])
def test_pixels_are_those_of_an_npz(tmp_path: Path, channels: int, shape: tuple[int, int, int]) -> None:
    """PNGs of the network's size come through bit for bit, channels first, mean and std as elsewhere."""
    spec = lenet5((channels, 20, 24), 3)
    images = [RNG.integers(0, 256, (20, 24, channels)).astype(np.uint8).squeeze() for _ in range(5)]
    path = folder(tmp_path, b=images[:2], a=images[2:], c=[])
    mean, std = (0.25,), tuple(0.5 + k for k in range(channels))
    got = load_samples(path, spec, mean, std)
    planes = np.stack([i.reshape(20, 24, channels).transpose(2, 0, 1) for i in (*images[2:], *images[:2])])
    np.testing.assert_array_equal(got.x, as_samples(planes, spec, mean, std)[0])
    assert got.labels.tolist() == [0, 0, 0, 1, 1]
    assert got.classes == ("a", "b", "c")
    assert got.names[0] == os.path.join("a", "0.png")
    assert got.x.flags.c_contiguous


@pytest.mark.parametrize(("kind", "options"), [("jpg", {"quality": 95}), ("webp", {"quality": 90}), ("bmp", {})])
def test_other_formats(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    image = smooth(24, 24, 3)
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / f"X.{kind.upper()}", **options)
    got = load_samples(tmp_path, lenet5((3, 24, 24), 2), size=24)
    off = np.abs(got.x.reshape(3, 24, 24).transpose(1, 2, 0) * 255 - image).mean()
    assert off <= (0 if kind == "bmp" else JPEG_LOSS) + 1e-4


def test_exif_orientation(tmp_path: Path) -> None:
    image = smooth(32, 32, 3)
    (tmp_path / "a").mkdir()
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(image)))  # a camera held sideways says 6: turn clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "0.jpg", quality=95, exif=exif)
    got = load_samples(tmp_path, lenet5((3, 32, 32), 2)).x.reshape(3, 32, 32).transpose(1, 2, 0) * 255
    assert np.abs(got - image).mean() < JPEG_LOSS / 4
    assert np.abs(got - np.rot90(image)).mean() > JPEG_LOSS


def test_scaled_and_cut_out_of_the_middle(tmp_path: Path) -> None:
    """60×100 for 20×24: as much as fits; with --size 30 only two thirds of the height."""
    marked = np.zeros((60, 100), np.uint8)
    marked[:, 14:86] = 100  # 72 = 60·24/20 columns are seen
    marked[20:40, 38:62] = 200  # and of them, of a size of 60, a third
    path, spec = folder(tmp_path, a=[marked]), lenet5((1, 20, 24), 2)
    whole = load_samples(path, spec).x.reshape(20, 24) * 255
    assert whole[:, 1:-1].min() >= 99  # the filter reaches a pixel beyond the edge
    assert whole.min() > 50
    np.testing.assert_allclose(load_samples(path, spec, size=20).x.reshape(20, 24) * 255, whole, atol=1e-4)
    close = load_samples(path, spec, size=60).x.reshape(20, 24) * 255
    np.testing.assert_allclose(close, 200, atol=1)
    np.testing.assert_allclose(whole[8:12, 10:14], 200, atol=1)


def test_modes_are_made_to_the_networks_channels(tmp_path: Path) -> None:
    grey = smooth(20, 20, 1)
    (tmp_path / "a").mkdir()
    picture = Image.fromarray(grey)
    for name, made in {
        "0-L": picture,
        "1-RGB": picture.convert("RGB"),
        "2-RGBA": picture.convert("RGBA"),
        "3-LA": picture.convert("LA"),
        "4-I16": Image.fromarray(grey.astype(np.uint16) * 257),
        "5-P": picture.convert("P"),
    }.items():
        made.save(tmp_path / "a" / f"{name}.png")
    for channels in (1, 3, 4):
        got = load_samples(tmp_path, lenet5((channels, 20, 20), 2)).x.reshape(6, channels, 400) * 255
        for k in range(6):
            for c in range(min(channels, 3)):
                np.testing.assert_allclose(got[k, c], grey.ravel(), atol=1.01)  # weights of grey are rounded
        assert (got[:, 3:] == 255).all()
    assert load_samples(tmp_path, size=20).shape == (3, 20, 20)
    for name in ("1-RGB", "2-RGBA", "5-P"):
        (tmp_path / "a" / f"{name}.png").unlink()
    assert load_samples(tmp_path, size=20).shape == (1, 20, 20)


def test_a_network_of_vectors_needs_a_size(tmp_path: Path) -> None:
    path = folder(tmp_path, a=[smooth(20, 20, 3)])
    from instantft.spec import dnn

    assert load_samples(path, dnn(3 * 64, 2), size=8).x.shape == (1, 192)
    with pytest.raises(UsageError, match="--size must say how many pixels"):
        load_samples(path, dnn(192, 2))
    with pytest.raises(UsageError, match="--size must give the network's 192 values"):
        load_samples(path, dnn(192, 2), size=9)


def test_numbers_as_names_are_the_labels(tmp_path: Path) -> None:
    image = smooth(20, 20, 1)
    got = load_samples(folder(tmp_path, **{"10": [image], "2": [image], "0": [image]}), lenet5((1, 20, 20), 11))
    assert got.labels.tolist() == [0, 10, 2]
    assert got.classes == ()


def test_files_that_are_none_are_left_out_and_said_so(tmp_path: Path) -> None:
    path = folder(tmp_path, a=[smooth(20, 20, 1)])
    (path / "a" / ".DS_Store").write_bytes(b"")
    (path / "a" / "deeper").mkdir()
    Image.fromarray(smooth(20, 20, 1)).save(path / "a" / "deeper" / "1.png")
    (path / "a" / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match="1 file is left out, which is no .jpg"):
        assert len(load_samples(path, lenet5((1, 20, 20), 2)).x) == 2


def png_of(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("bomb.png", png_of(60_000, 60_000), "exceeds limit .* could be decompression bomb"),
        ("large.png", png_of(9_000, 9_000), "must have at most 67,108,864 pixels, but .* has 9000×9000"),
        ("cut.png", png_of(500, 500), "must be readable"),
        ("empty.jpg", b"", "must be readable"),
        ("text.webp", b"hello", "must be readable"),
        ("other.png", b"GIF89a" + bytes(40), "must be readable"),
        ("head.bmp", b"BM" + bytes(60), "must be readable"),
    ],
    ids=["bomb", "large", "cut", "empty", "text", "other", "head"],
)
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    path = folder(tmp_path, a=[smooth(20, 20, 1)])
    (path / "a" / name).write_bytes(raw)
    with pytest.raises(DataError, match=words) as e:
        load_samples(path, lenet5((1, 20, 20), 2))
    assert str(path / "a" / name) in str(e.value)
    assert "\n" not in str(e.value)


def test_damaged_images_raise_only_our_errors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    kinds = {"png": {}, "jpg": {"quality": 90}, "bmp": {}, "webp": {}}
    for kind, options in kinds.items():
        target = tmp_path / "a" / f"x.{kind}"
        Image.fromarray(smooth(24, 24, 3)).save(target, **options)
        good = target.read_bytes()
        for _ in range(60):
            raw = bytearray(good)
            for at in RNG.integers(0, len(raw), 3):
                raw[at] = RNG.integers(0, 256)
            target.write_bytes(bytes(raw[: RNG.integers(1, len(raw) + 1)]))
            with contextlib.suppress(DataError):
                assert np.isfinite(load_samples(tmp_path, lenet5((3, 24, 24), 2)).x).all()
        target.unlink()


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = lenet5((1, 20, 20), 2)
    with pytest.raises(DataError, match="one subfolder a class"):
        load_samples(tmp_path, spec)
    path = folder(tmp_path / "set", a=[smooth(20, 20, 1)], b=[])
    with pytest.raises(UsageError, match="--size must be at least the network's 20 pixels, not 10"):
        load_samples(path, spec, size=10)
    with pytest.raises(UsageError, match="--size must be 1 to 8192"):
        load_samples(path, size=0)
    with pytest.raises(UsageError, match="--label must go with a CSV file"):
        load_samples(path, spec, label="y")
    with pytest.raises(UsageError, match=r"must go with \.npz or CSV"):
        load_samples(path, spec, groups="g")
    with pytest.raises(UsageError, match="--size must go with a folder"):
        load_samples(write_npz(tmp_path / "a.npz", x=np.zeros((1, 20, 20), np.uint8), y=[0]), spec, size=20)
    with pytest.raises(DataError, match="1, 3 or 4 channels, not to the network's 2"):
        load_samples(path, lenet5((2, 20, 20), 2))
    with pytest.raises(DataError, match="those known already, b, c, but there is 'a'"):
        load_samples(path, spec, classes=("b", "c"))
    monkeypatch.setattr("instantft.data.MAX_BYTES", 1599)
    with pytest.raises(DataError, match=r"1 images of 1×20×20 must take at most 1,599 bytes of memory, but take 1,600"):
        load_samples(path, spec)
    Image.fromarray(smooth(20, 20, 1)).save(path / "stray.png")
    with pytest.raises(DataError, match=r"must be in the subfolders of their classes, but .* holds 'stray.png'"):
        load_samples(path, spec)
    (path / "stray.png").unlink()
    (path / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="holds none"):
        load_samples(path, spec)


def test_memory_is_that_of_the_rows(tmp_path: Path) -> None:
    """No second copy of the images: decoding them one by one adds one image to the rows."""
    import tracemalloc

    path = folder(tmp_path, a=[smooth(64, 64, 3)] * 40)
    load_samples(path, size=64)  # what is imported stays
    tracemalloc.start()
    got = load_samples(path, size=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * got.x.nbytes


# -- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.run([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


def corners(T: int, seed: int) -> dict[str, list[Any]]:
    """Bright corners, one a class."""
    rng, classes = np.random.default_rng(seed), ("left", "right", "top")
    made: dict[str, list[Any]] = {name: [] for name in classes}
    for t in range(T):
        image = rng.integers(0, 60, (20, 20)).astype(np.uint8)
        image[10 * (t % 3 // 2) :, 10 * (t % 3 % 2) :][:10, :10] += 150
        made[classes[t % 3]].append(image)
    return made


def test_from_pictures_to_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "train", **corners(60, 0))
    folder(tmp_path / "new", **corners(60, 1))
    flat = corners(9, 2)
    folder(tmp_path / "test", right=flat["right"])  # not all classes: the adapter knows the names
    rest = ("--data", "new", "--eval", "test", "--out", "adapter", "--force", "--json")
    train = ("--data", "train", "--size", 20, "--eval", "new", "--out", "b.safetensors", "--json", "--epochs", 20)
    status, out, err = run("pretrain", "lenet5", *train)
    assert (status, err) == (0, "")
    assert json.loads(out)["classes"] == 3
    status, out, err = run("finetune", "b.safetensors", *rest)
    assert (status, json.loads(out)["accuracy_after"]) == (0, 1.0), err
    assert Adapter.load("adapter").config["classes"] == ["left", "right", "top"]
    status, out, _ = run("evaluate", "b.safetensors", "--adapter", "adapter", "--data", "test", "--json")
    got = json.loads(out)
    assert (status, got["accuracy"]) == (0, 1.0)
    assert [(p["name"], p["n"]) for p in got["per_class"]] == [("left", 0), ("right", 3), ("top", 0)]
    assert "1 right" in run("evaluate", "b.safetensors", "--adapter", "adapter", "--data", "test")[1]
    # Without the adapter nobody knows which class "right" is.
    status, _, err = run("evaluate", "b.safetensors", "--data", "test")
    assert status == 2
    assert "must show all of the network's 3 classes" in err
    (tmp_path / "flat").mkdir()
    for k, name in enumerate(("top", "left")):
        Image.fromarray(flat[name][0]).save(tmp_path / "flat" / f"{k}.png")
    predict = ("predict", "b.safetensors", "--adapter", "adapter", "--data", "flat", "--out", "p.npz", "--json")
    status, out, _ = run(*predict)
    assert (status, json.loads(out)["classes"]) == (0, ["left", "right", "top"])
    with np.load("p.npz") as p:
        assert p["label"].tolist() == [2, 0]
        assert p["classes"].tolist() == ["left", "right", "top"]
        assert p["image"].tolist() == ["0.png", "1.png"]
    # Other classes do not slip into an adapter that knows these.
    (tmp_path / "new" / "top").rename(tmp_path / "new" / "bottom")
    status, _, err = run("finetune", "b.safetensors", *rest)
    assert (status, err.count("\n")) == (2, 1)
    assert "but there is 'bottom'" in err


def test_predictions_replace_predictions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Network.init(lenet5((1, 20, 20), 3), 0).save("b.safetensors")
    x = np.zeros((4, 20, 20), np.uint8)
    write_npz(tmp_path / "x.npz", x=x)
    write_npz(tmp_path / "other.npz", x=x, label=[0])
    (tmp_path / "text").write_text("dear to me")
    predict = ("predict", "b.safetensors", "--data", "x.npz", "--out")
    for out in ("other.npz", "text"):
        before = Path(out).read_bytes()
        status, _, err = run(*predict, out)
        assert (status, err.count("\n")) == (2, 1)
        assert "--out must be a new file or earlier predictions" in err
        assert Path(out).read_bytes() == before
    for _ in range(2):
        assert run(*predict, "new.npz")[0] == 0


def test_float_images_that_look_like_bytes_are_warned_of() -> None:
    x = np.full((2, 1, 20, 20), 200.0, np.float32)
    with pytest.warns(UserWarning, match="values up to 200: networks want 0 to 1 mostly; divide by 255"):
        as_samples(x, name="x")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_samples(x / 255)
        as_samples(x, std=(255.0,))
        as_samples(x.reshape(2, 400))
        as_samples(x.astype(np.uint8))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"needs Pillow: pip install 'instantft\[images\]'"):
        load_samples(tmp_path)
    assert pictures.FORMATS


def test_a_network_that_wants_channels_last(tmp_path: Path) -> None:
    """Its input shape has channels first, as everywhere; onnxruntime gets them as the graph wants them."""
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx, with which the tests make models, is not installed")
    from instantft import from_onnx

    rng, helper = np.random.default_rng(0), onnx.helper
    weight = rng.normal(size=(16 * 12 * 3, 4)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Relu", ["flat"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16, 12, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    onnx.save(made, tmp_path / "m.onnx")
    network = from_onnx(tmp_path / "m.onnx")
    image = rng.integers(0, 256, (16, 12, 3)).astype(np.uint8)
    got = load_samples(folder(tmp_path / "set", a=[image]), network.spec)
    wanted = (image / np.float32(255)).reshape(1, -1).astype(np.float32) @ weight
    said = network.bind(get_engine("reference")).forward(network.spec, network.tensors, got.x)
    np.testing.assert_allclose(said, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
