"""`export c`: the folder computes what the Python package computes, fits what it says, and is written with care."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from instantft import cli
from instantft.adapters import Adapter, initial
from instantft.backbones.builtin import Network
from instantft.cache.codecs import CODECS
from instantft.cache.store import memory_store
from instantft.data import Samples, as_samples
from instantft.engine.native import NativeEngine, isas
from instantft.errors import FileError, InstantFTError, UsageError
from instantft.export import c as export
from instantft.export.c import CODE, FIXED_CODE, STACK, coded, export_c
from instantft.methods import METHODS
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.sgd import fit
from instantft.spec import LayerSpec, NetSpec, RecordSpec, Segment, dnn, lenet5, pad

from . import samples
from .device import WARNINGS, Device, constants

TOOLS = Path(__file__).parent.parent / "tools" / "embedded"

IMAGES = NetSpec(
    (2, 10, 9),
    (
        LayerSpec("conv", 7, (3, 2), (1, 0), relu=True, pool=2),
        LayerSpec("conv", 3, (3, 3), batch_norm=True, relu=True),
        LayerSpec("fc", 9, batch_norm=True, relu=True),
        LayerSpec("fc", 4),
    ),
)

RIDGE_TOLERANCE = 1e-3
"""Of A beside Python's, relative to its largest value, once both have Python's temperature: the device factorises in
float32 where Python takes float64, and rounding grows by the condition of the system, about 1/λ."""

NEON_TOLERANCE = 0.02
"""Of logits, relative to the largest: fused multiply-adds move a record by one rounding, and now and then a value over
the threshold to the next 4-bit code, after which training goes another way by as much."""


def network(spec: NetSpec, seed: int = 0, **preprocessing: Any) -> Network:
    """A network whose batch norm is not the identity."""
    made, rng = Network.init(spec, seed), np.random.default_rng(seed)
    tensors = {
        name: value + (0.3 * rng.random(value.shape)).astype(np.float32) if ".bn." in name else value
        for name, value in made.tensors.items()
    }
    return Network(spec, tensors, **preprocessing)


@pytest.fixture
def scalar(monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    """The engine whose sums are those of the exported plain C."""
    try:
        isas()
    except InstantFTError as e:
        pytest.skip(str(e))
    if os.uname().machine != "x86_64":
        pytest.skip(
            "the package's own scalar core uses fused multiply-adds on this machine, the exported code does not"
        )
    monkeypatch.setenv("INSTANTFT_ISA", "scalar")
    return NativeEngine()


def drawn(spec: NetSpec, T: int, inputs: str, seed: int = 1) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Samples as the device gets them, classes that differ, and labels."""
    rng = np.random.default_rng(seed)
    y = (np.arange(T) % spec.C).astype(np.int32)
    x = rng.random((T, spec.geometry[0].N), np.float32)
    x += 0.7 * rng.random((spec.C, spec.geometry[0].N), np.float32)[y]
    return (x * 140).astype(np.uint8) if inputs == "uint8" else x, y


def kept(x: NDArray[Any], base: Network) -> NDArray[np.float32]:
    """What the device keeps of samples: bytes, or normalised floats in the codec int8."""
    rows, _ = as_samples(x, base.spec, base.mean, base.std)
    if x.dtype == np.uint8:
        return rows
    T, N = rows.shape
    record = RecordSpec((Segment("x0", N, 1, False, 0),))
    padded = np.zeros((T, pad(N)), np.float32)
    padded[:, :N] = rows
    return np.ascontiguousarray(CODECS["int8"].decode(CODECS["int8"].encode(padded, record), record)[:, :N])


def flat(base: Network, adapter: Adapter, **settings: Any) -> NDArray[np.float32]:
    """An adapter as it lies in the arena."""
    arguments = {"method": "skip2-lora", "rank": 4, **settings}
    given = {"samples": 1, "cache": "nf4", "weights": "fp32", "inputs": "float32", "batch_size": 1, "epochs": 1}
    s = export._check(base, None, **{**given, **arguments}, lr=0.1, momentum=0.0, seed=0, lanes=1)
    return export._flat_adapter(s, adapter.tensors)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (dnn(21, 3, hidden=18), {}),
        (dnn(21, 3, hidden=18), {"cache": "int8", "momentum": 0.8, "epochs": 3, "mean": (0.4,), "std": (0.3,)}),
        (dnn(21, 3, hidden=18), {"cache": "fp32", "weights": "int8", "batch_size": 7, "rank": 3}),
        (IMAGES, {"inputs": "uint8", "cache": "relu4", "mean": (0.4, 0.1), "std": (0.3, 0.2)}),
        (IMAGES, {"inputs": "uint8", "cache": "nf4-block64", "weights": "int8", "seed": 5}),
        (IMAGES, {"inputs": "uint8", "cache": "nf4-hw"}),
    ],
)
def test_sgd_is_python_to_the_bit(tmp_path: Path, scalar: NativeEngine, spec: NetSpec, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"inputs": "float32", "weights": "fp32", "cache": "nf4", "epochs": 2, "lr": 0.05, **options}
    base = network(spec, mean=given.pop("mean", ()), std=given.pop("std", ()))
    T = 33
    export_c(base, None, tmp_path / "c", samples=T, **given)
    device = Device(tmp_path / "c")
    x, y = drawn(spec, T, given["inputs"])
    asked, _ = drawn(spec, 5, given["inputs"], seed=2)
    inputs, weights, cache = (given.pop(name) for name in ("inputs", "weights", "cache"))
    assert inputs == ("uint8" if x.dtype == np.uint8 else "float32")
    computed = coded(base) if weights == "int8" else base
    spec = computed.spec
    rows = kept(x, base)
    store = memory_store(cache, spec.record, T)
    result = fit(scalar, computed, "skip2-lora", rows, y, store=store, space="primal", **{"momentum": 0.0, **given})

    before = scalar.forward(spec, computed.tensors, as_samples(asked, spec, base.mean, base.std)[0])
    np.testing.assert_array_equal(device.logits(asked), before)
    assert device.add(x, y) == 0
    np.testing.assert_array_equal(device.records(T), store.data)
    assert device.train() == 0
    assert device.commit() == 0
    want = flat(computed, result.adapter, rank=given.get("rank", 4))
    np.testing.assert_array_equal(device.adapter(1).view(np.uint32), want.view(np.uint32))
    tensors = {**computed.tensors, **result.adapter.tensors}
    after = scalar.forward(spec, tensors, as_samples(asked, spec, base.mean, base.std)[0])
    np.testing.assert_array_equal(device.logits(asked), after)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(("spec", "T"), [(dnn(21, 3, hidden=18), 45), (IMAGES, 26)])
def test_ridge_is_python_within_its_tolerance(tmp_path: Path, scalar: NativeEngine, spec: NetSpec, T: int) -> None:
    inputs = "uint8" if spec is IMAGES else "float32"
    base = network(spec)
    export_c(base, None, tmp_path / "c", samples=T, method="skip-ridge", inputs=inputs)
    device = Device(tmp_path / "c")
    x, y = drawn(spec, T, inputs)
    y[::5] = (y[::5] + 1) % spec.C  # noise, so that λ is worth choosing
    store = memory_store("nf4", spec.record, T)
    result = fit_ridge(scalar, base, kept(x, base), y, store=store, taps="all")
    assert device.add(x, y) == 0
    np.testing.assert_array_equal(device.records(T), store.data)
    assert device.train() == 0
    assert device.commit() == 0
    want, got = flat(base, result.adapter, method="skip-ridge").astype(np.float64), device.adapter(1).astype(np.float64)
    n = -(-spec.C // 4) * 4 * sum(pad(g.N) for g in spec.geometry)
    # temperatures differ: the device leaves samples out one by one, Python in blocks
    ratio = (want[:n] @ got[:n]) / (got[:n] @ got[:n])
    assert 0.5 < ratio < 2
    assert np.abs(want[:n] - ratio * got[:n]).max() < RIDGE_TOLERANCE * np.abs(want[:n]).max()
    bias = slice(len(want) - pad(spec.C), None)
    assert np.abs(want[bias] - ratio * got[bias]).max() < RIDGE_TOLERANCE * np.abs(want[bias]).max()


def test_an_exported_adapter_is_live_from_the_start(tmp_path: Path, scalar: NativeEngine) -> None:
    base = network(samples.SPEC)
    adapter = samples.adapter(base)
    export_c(base, adapter, tmp_path / "c", samples=3)
    x, _ = drawn(base.spec, 4, "float32")
    want = scalar.forward(base.spec, {**base.tensors, **adapter.tensors}, x)
    np.testing.assert_array_equal(Device(tmp_path / "c").logits(x), want)


@pytest.mark.parametrize(
    ("compiler", "method", "spec"),
    [
        ("gcc", "skip2-lora", dnn(21, 3, hidden=18)),
        *(
            pytest.param(compiler, method, spec, marks=pytest.mark.slow)
            for compiler in ("gcc", "clang")
            for method, spec in (
                ("skip2-lora", dnn(21, 3, hidden=18)),
                ("skip2-lora", IMAGES),
                ("skip-ridge", dnn(21, 3, hidden=18)),
            )
            if compiler == "clang" or spec is IMAGES or method == "skip-ridge"
        ),
    ],
)
def test_its_own_tests_pass_with_sanitizers(tmp_path: Path, compiler: str, method: str, spec: NetSpec) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not here")
    inputs = "uint8" if spec is IMAGES else "float32"
    export_c(network(spec), None, tmp_path / "c", samples=11, method=method, inputs=inputs, weights="int8")
    flags = "-O1 -g -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    done = subprocess.run(
        ["make", "-s", "-C", tmp_path / "c", "test", f"CC={compiler}", f"CFLAGS={flags}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search("cannot find.*san", done.stderr):
        pytest.skip(f"{compiler} has no sanitizers here")
    assert (done.returncode, done.stdout.splitlines()[-1:], done.stderr) == (0, ["all passed"], "")


def test_the_same_bytes_again(tmp_path: Path) -> None:
    base = network(IMAGES)
    for name in ("one", "two"):
        export_c(base, samples.adapter(base), tmp_path / name, samples=9, inputs="uint8", weights="int8")
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in tmp_path.iterdir()]
    assert files[0] == files[1]
    assert {p.as_posix() for p in files[0]} >= {
        "Makefile",
        "CMakeLists.txt",
        "library.properties",
        "zephyr/module.yml",
        "include/instantft_device.h",
        "src/instantft_model.c",
        "tests/test_device.c",
    }
    native = export.sources()
    for name in export.CORE:
        assert (tmp_path / "one" / "src" / name).read_bytes() == (native / name).read_bytes()


def test_what_must_fit_fits(tmp_path: Path) -> None:
    """x^0 in 8 bits, records in 4, two adapters, scratch and stack, for SGD."""
    lenet = export_c(network(lenet5((1, 28, 28))), None, tmp_path / "l", samples=192, inputs="uint8", ram=512 << 10)
    fan = export_c(network(dnn(256, 3)), None, tmp_path / "f", samples=100, ram=64 << 10)
    for takes, T, x, record in ((lenet, 192, 784, 1000), (fan, 100, 260, 112)):
        assert takes.ram["samples (x^0)"] == T * x
        assert takes.ram["records"] == T * record
        assert takes.ram["stack"] == STACK["skip2-lora"]
    assert constants(tmp_path / "l")["INSTANTFT_ARENA"] + STACK["skip2-lora"] == sum(lenet.ram.values()) <= 512 << 10
    with pytest.raises(UsageError, match=r"^RAM must hold .*; optimiser 8,064; .*: at most \d+ samples fit$"):
        export_c(network(dnn(256, 3)), None, tmp_path / "m", samples=100, momentum=0.8, ram=64 << 10)
    assert constants(tmp_path / "f")["INSTANTFT_ARENA"] + STACK["skip2-lora"] == sum(fan.ram.values()) <= 64 << 10


@pytest.mark.parametrize(("samples", "batch", "epochs"), [(60, 20, 167), (192, 20, 50), (1024, 20, 10), (3000, 20, 10)])
def test_epochs_nobody_asked_for_make_500_steps(tmp_path: Path, samples: int, batch: int, epochs: int) -> None:
    """30 steps, 10 epochs of 60 samples, would leave the network worse than it was."""
    export_c(network(dnn(12, 3, hidden=8)), None, tmp_path / "c", samples=samples, batch_size=batch)
    assert constants(tmp_path / "c")["INSTANTFT_EPOCHS"] == epochs


@pytest.mark.parametrize("compiler", [("aarch64-linux-gnu-gcc",), ("clang", "--target=aarch64-linux-gnu")])
@pytest.mark.parametrize(
    ("method", "weights"), [("skip2-lora", "fp32"), ("skip2-lora", "int8"), ("skip-ridge", "fp32")]
)
def test_vectors_of_four_compile_without_a_warning(
    tmp_path: Path, compiler: tuple[str, ...], method: str, weights: str
) -> None:
    if not shutil.which(compiler[0]) or not shutil.which("aarch64-linux-gnu-gcc"):
        pytest.skip(f"needs {compiler[0]} and the headers of aarch64-linux-gnu-gcc")
    export_c(network(lenet5((1, 28, 28))), None, tmp_path / "c", samples=40, method=method, weights=weights, lanes=4)
    for source in sorted((tmp_path / "c" / "src").glob("*.c")):
        flags = [*compiler, "-mcpu=cortex-a53", "-std=c11", "-O1", *WARNINGS, "-I", str(tmp_path / "c" / "include")]
        subprocess.run([*flags, "-fsyntax-only", str(source)], check=True)


def test_limits(tmp_path: Path) -> None:
    base, out = network(dnn(256, 3)), tmp_path / "c"
    takes = export_c(base, None, out, samples=10, method="skip-ridge", ram=1 << 16)
    assert takes.largest is not None
    largest = takes.largest
    assert largest > 10
    assert sum(export_c(base, None, out, samples=largest, method="skip-ridge", ram=1 << 16).ram.values()) <= 1 << 16
    before = (out / "README.md").read_bytes()
    with pytest.raises(UsageError, match=rf"^RAM must hold .* but --ram is 65,536: at most {largest} samples fit$"):
        export_c(base, None, out, samples=largest + 1, method="skip-ridge", ram=1 << 16)
    with pytest.raises(UsageError, match=r"^RAM must hold .*: not even one sample fits: take a smaller --rank, .*$"):
        export_c(base, None, out, samples=1, ram=1 << 10)
    flash = sum(takes.flash.values())
    with pytest.raises(UsageError, match=r"^flash must hold .*: --weights int8 is smaller$"):
        export_c(base, None, out, samples=10, method="skip-ridge", flash=flash - 1)
    assert (out / "README.md").read_bytes() == before
    export_c(base, None, out, samples=10, method="skip-ridge", flash=flash)
    smaller = export_c(base, None, out, samples=10, weights="int8").flash["weights"]
    assert smaller < takes.flash["weights"] / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples on a device must be an integer from 1 to 4096, not 0"),
        ({"samples": 5000}, "samples on a device must be an integer from 1 to 4096, not 5000"),
        ({"samples": 2, "method": "ft-all"}, "method of an export must be one of skip2-lora, skip-ridge, not 'ft-all'"),
        ({"samples": 2, "cache": "nf5"}, "cache of an export must be one of fp32, .*, not 'nf5'"),
        ({"samples": 2, "weights": "int4"}, "weights of an export must be one of fp32, int8, not 'int4'"),
        ({"samples": 2, "lr": float("nan")}, "lr must be above 0 and finite in float32, not nan"),
        ({"samples": 2, "rank": 0}, "rank must be an integer from 1 to 4096, not 0"),
    ],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        export_c(network(samples.SPEC), None, tmp_path / "c", **options)
    assert not list(tmp_path.iterdir())


def test_networks_and_adapters_it_cannot_hold(tmp_path: Path) -> None:
    base = network(samples.SPEC)
    with pytest.raises(UsageError, match=r"must lead from the taps to the output, .* not be one of lora-all"):
        export_c(base, samples.adapter(base, "lora-all"), tmp_path / "c", samples=2)
    with pytest.raises(UsageError, match="rank 4 at most, not 5"):
        export_c(base, samples.adapter(base, rank=5), tmp_path / "c", samples=2)
    foreign = NetSpec((6,), (LayerSpec("foreign", 5, relu=True, name="a"), LayerSpec("foreign", 3, name="b")))

    class Foreign(Network):
        pass

    with pytest.raises(UsageError, match="not ONNX models"):
        export_c(Foreign(foreign, {}), None, tmp_path / "c", samples=2)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_ours_stay(tmp_path: Path) -> None:
    base, out = network(samples.SPEC), tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match=r"must have a folder of its own, but .* holds something else"):
        export_c(base, None, out, samples=2)
    (out / "thesis.txt").unlink()
    export_c(base, None, out, samples=2)
    (out / "build").mkdir()
    export_c(base, None, out, samples=3)
    assert constants(out)["INSTANTFT_SAMPLES"] == 3
    assert not (out / "build").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="must be a folder, but"):
        export_c(base, None, tmp_path / "file", samples=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], scalar: NativeEngine) -> None:
    base, (x, y) = samples.base(), samples.blobs(30)
    base.save(tmp_path / "base.safetensors")
    np.savez(tmp_path / "ft.npz", x=x, y=y)
    command = ["export", "c", str(tmp_path / "base.safetensors"), "--samples", "30", "--out", str(tmp_path / "c")]
    assert cli.run([*command, "--data", str(tmp_path / "ft.npz"), "--epochs", "30"]) == 0
    assert re.search(r"^flash +[\d,]+ bytes\n", capsys.readouterr().out)
    done = subprocess.run(["make", "-s", "-C", tmp_path / "c", "example"], capture_output=True, text=True, check=True)
    right = [int(n) for n in re.findall(r"(\d+) of 30 right", done.stdout)]
    assert len(right) == 3
    assert right[0] < 25 < right[1] == right[2]
    assert cli.run([*command, "--ram", "100"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: RAM must hold ")


def test_the_step_is_that_of_the_samples_that_come_along(tmp_path: Path, scalar: NativeEngine) -> None:
    base, (x, y) = samples.base(), samples.blobs(30)
    data = Samples(x, y, base.spec.input_shape)
    made = export_c(base, None, tmp_path / "c", samples=30, data=data)
    assert made.lr is not None
    chosen = fit(scalar, base, "skip2-lora", x, y, momentum=0.0).adapter.config["lr"]
    assert made.lr == float(f"{chosen:.3g}")  # three digits, so that engines that round otherwise write the same bytes
    assert made.lr != 0.1
    assert f"#define IFT_LR {export._number(made.lr)}\n" in (tmp_path / "c" / "src" / "instantft_config.h").read_text()
    assert export_c(base, None, tmp_path / "c", samples=30).lr == 0.1
    assert export_c(base, None, tmp_path / "c", samples=30, data=data, lr=0.3).lr == 0.3


def test_steps_of_a_method_without_any_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="^lr, momentum mean nothing to skip-ridge, which makes no steps$"):
        export_c(network(samples.SPEC), None, tmp_path / "c", samples=3, method="skip-ridge", lr=0.3, momentum=0.5)


def test_cmake_builds_it_and_passes_its_tests(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("cmake is not here")
    base, (x, y) = samples.base(), samples.blobs(6)
    export_c(base, None, tmp_path / "c", samples=6, data=Samples(x, y, (6,)))
    build = tmp_path / "build"
    subprocess.run(["cmake", "-S", tmp_path / "c", "-B", build, "-DCMAKE_C_FLAGS=-Werror"], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    assert "all passed" in subprocess.run([build / "test_device"], capture_output=True, text=True, check=True).stdout
    assert "of 6 right" in subprocess.run([build / "adapt"], capture_output=True, text=True, check=True).stdout


def test_as_a_zephyr_module(tmp_path: Path) -> None:
    """With stand-ins for the five functions of Zephyr that it calls; west and Zephyr's tree are not needed."""
    if not shutil.which("cmake"):
        pytest.skip("cmake is not here")
    export_c(network(samples.SPEC), None, tmp_path / "c", samples=6)
    (tmp_path / "main.c").write_text(
        "#include <instantft_device.h>\n"
        "static _Alignas(16) uint8_t arena[INSTANTFT_ARENA];\n"
        "int main(void) { return !instantft_init(arena, sizeof arena); }\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(app LANGUAGES C)\nset(CMAKE_C_STANDARD 11)\n"
        "set(CONFIG_INSTANTFT y)\n"
        "macro(zephyr_library_named name)\n set(it ${name})\n add_library(${it} STATIC)\nendmacro()\n"
        "function(zephyr_library_sources)\n target_sources(${it} PRIVATE ${ARGN})\nendfunction()\n"
        "function(zephyr_include_directories)\n include_directories(${ARGN})\n"
        " target_include_directories(${it} PUBLIC ${ARGN})\nendfunction()\n"
        "function(zephyr_library_include_directories)\n target_include_directories(${it} PRIVATE ${ARGN})\n"
        "endfunction()\n"
        "function(zephyr_library_compile_options)\n target_compile_options(${it} PRIVATE ${ARGN})\nendfunction()\n"
        "add_subdirectory(c/zephyr)\nadd_executable(app main.c)\ntarget_link_libraries(app instantft m)\n"
    )
    subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    subprocess.run([tmp_path / "build" / "app"], check=True)
    for line in (tmp_path / "c" / "zephyr" / "module.yml").read_text().splitlines()[2:]:
        kind, path = line.split(": ")
        assert (tmp_path / "c" / path).exists(), kind


def test_as_arduino_and_c_plus_plus_see_it(tmp_path: Path) -> None:
    """Arduino compiles each file of src by itself, with src alone in the path, in GNU C, for size."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not here")
    base = network(samples.SPEC)
    x, y = samples.blobs(6)
    export_c(base, None, tmp_path / "c", samples=6, data=Samples(x, y, (6,)))
    src = tmp_path / "c" / "src"
    for source in sorted(src.glob("*.c")):
        subprocess.run(["gcc", "-std=gnu11", "-Os", *WARNINGS, f"-I{src}", "-fsyntax-only", source], check=True)
    sketch = (tmp_path / "c" / "examples" / "Arduino" / "Arduino.ino").read_text()
    board = "struct { void begin(int) {} void print(const char *) {} void println(int) {} } Serial;\n"
    (tmp_path / "sketch.cpp").write_text(f"{board}{sketch}".replace("../../", f"{tmp_path}/c/"))
    subprocess.run(["g++", "-std=c++14", "-Wall", f"-I{src}", "-fsyntax-only", tmp_path / "sketch.cpp"], check=True)
    if shutil.which("arm-none-eabi-g++"):  # and as for an Arduino of today, a Cortex-M4F
        cpu = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard", "-Os", "-fno-exceptions"]
        for source in sorted(src.glob("*.c")):
            made = tmp_path / f"{source.stem}.o"
            subprocess.run(["arm-none-eabi-gcc", *cpu, "-std=gnu11", f"-I{src}", "-c", source, "-o", made], check=True)
        sketch_o = tmp_path / "sketch.o"
        subprocess.run(
            ["arm-none-eabi-g++", *cpu, "-std=gnu++14", f"-I{src}", "-c", tmp_path / "sketch.cpp", "-o", sketch_o],
            check=True,
        )
        undefined = subprocess.run(
            ["arm-none-eabi-nm", "-u", sketch_o], capture_output=True, text=True, check=True
        ).stdout.split()
        assert {"instantft_init", "instantft_train", "instantft_infer", "instantft_commit"} <= set(undefined)
    properties = dict(line.split("=", 1) for line in (src.parent / "library.properties").read_text().splitlines())
    # what arduino-lint asks of a library: every field there, the name and version well formed, a known category
    for field in (
        "name",
        "version",
        "author",
        "maintainer",
        "sentence",
        "paragraph",
        "category",
        "url",
        "architectures",
    ):
        assert field in properties
    assert re.fullmatch(r"[A-Za-z0-9][\w .-]{0,62}", properties["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", properties["version"])
    assert properties["category"] == "Data Processing"
    assert properties["sentence"]
    assert [p.name for p in (src.parent / "examples" / "Arduino").iterdir()] == ["Arduino.ino"]
    assert properties["includes"] == "InstantFT.h"
    assert (src / properties["includes"]).is_file()


@pytest.mark.parametrize(
    ("method", "cache", "more"),
    [("skip2-lora", "nf4", 0), ("skip-ridge", "nf4", 0), ("skip-ridge", "nf4-hw", FIXED_CODE)],
)
def test_stack_and_code_stay_below_what_is_counted(tmp_path: Path, method: str, cache: str, more: int) -> None:
    gcc = "arm-none-eabi-gcc"
    if not shutil.which(gcc):
        pytest.skip(f"{gcc} is not here (Debian: gcc-arm-none-eabi libnewlib-arm-none-eabi)")
    export_c(network(lenet5((1, 28, 28))), None, tmp_path / "c", samples=20, method=method, cache=cache, inputs="uint8")
    cpu = ["-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard", "-mthumb", "-std=c11", "-O2"]
    edges: dict[str, set[str]] = {}
    frames: dict[str, int] = {}
    code = 0
    for source in sorted((tmp_path / "c" / "src").glob("*.c")):
        if source.name == "instantft_model.c":
            continue
        made = tmp_path / source.stem
        math = ["-fno-math-errno", "-fno-trapping-math", "-fcallgraph-info=su"]
        subprocess.run([gcc, *cpu, *math, "-c", source, "-o", f"{made}.o"], check=True)
        graph = made.with_suffix(".ci").read_text()
        for name, size in re.findall(r'title: "(?:[^":]*:)?([\w.]+)[^"]*" label: "[^"]*?\\n(\d+) bytes', graph):
            frames[name] = int(size)
        for a, b in re.findall(r'sourcename: "(?:[^":]*:)?([\w.]+)[^"]*" targetname: "(?:[^":]*:)?([\w.]+)', graph):
            edges.setdefault(a, set()).add(b)
        sizes = subprocess.run(["arm-none-eabi-size", f"{made}.o"], capture_output=True, text=True, check=True)
        text, data, bss = map(int, sizes.stdout.splitlines()[1].split()[:3])
        assert data == bss == 0, f"{source.name} has variables outside the arena"
        if source.name == "instantft_drift.c":  # of the library, linked only where it is called
            assert text <= 2048
        else:
            code += text
    depth = 0
    if method == "skip-ridge":  # one level for each halving down to the leaf; T is MAX_SAMPLES at most
        assert "inverse_factor_f" in edges["inverse_factor_f"]
        edges["inverse_factor_f"].discard("inverse_factor_f")
        depth = frames["inverse_factor_f"] * int(np.ceil(np.log2(export.MAX_SAMPLES / export.DENSE_LEAF)))

    def deepest(name: str) -> int:
        return frames.get(name, 0) + max((deepest(b) for b in edges.get(name, ())), default=0)

    api = [name for name in frames if name.startswith("instantft_")]
    assert len(api) >= 9
    libm = 256  # sqrt, log, memcpy and double arithmetic of the library
    assert max(map(deepest, api)) + depth + libm <= STACK[method]
    assert code <= CODE[method] + more
    assert max(map(deepest, api)) > 300


def digest(
    folder: Path, target: str, *arguments: object, program: str = "digest.c", optimise: str = "-O1"
) -> list[str]:
    done = subprocess.run(
        [TOOLS / "run", folder, target, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OPT": optimise, "PROGRAM": program},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def same(lines: list[str]) -> list[str]:
    """What must be the same on every machine."""
    return [line for line in lines if line[0] not in "~="]


NEEDED = {
    "m4": ("arm-none-eabi-gcc", "qemu-system-arm"),
    "m7": ("arm-none-eabi-gcc", "qemu-system-arm"),
    "a53": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "rv32": ("riscv64-unknown-elf-gcc", "qemu-system-riscv32"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "method"),
    [*((name, "skip2-lora") for name in NEEDED), *((name, "skip-ridge") for name in ("m4", "m7", "a53"))],
)
def test_runs_on_other_machines_with_the_same_bits(tmp_path: Path, target: str, method: str) -> None:
    """Cortex-M4F, Cortex-M7, Cortex-A53 and RV32 in QEMU, and the host: codes, adapter and logits are equal."""
    missing = [tool for tool in NEEDED[target] if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    spec = IMAGES if target in ("m4", "a53") and method == "skip2-lora" else dnn(64, 3, hidden=32)
    inputs = "uint8" if spec is IMAGES else "float32"
    x, y = drawn(spec, 40, inputs)
    data = Samples(x.astype(np.float32) / np.float32(255 if inputs == "uint8" else 1), y, spec.input_shape)
    base = network(spec)
    settings: dict[str, Any] = {"samples": 30, "method": method, "inputs": inputs, "data": data, "epochs": 3}
    takes = export_c(base, None, tmp_path / "c", **settings)
    arena = constants(tmp_path / "c")["INSTANTFT_ARENA"]
    here, there = digest(tmp_path / "c", "host"), digest(tmp_path / "c", target, arena)
    assert same(here) == same(there)
    assert len(same(here)) == 4
    if target in ("m4", "m7"):
        stack = [int(n) for n in re.findall(r"(\d+) (?:add|train|infer)", there[-2])]
        assert 0 < max(stack) <= STACK[method] <= takes.ram["stack"]
    if target == "a53" and method == "skip2-lora":  # vectors of four, with fused multiply-adds
        export_c(base, None, tmp_path / "neon", lanes=4, **settings)
        neon = digest(tmp_path / "neon", target)
        want, got = (np.array(lines[-3][1:].split(), float) for lines in (here, neon))
        assert np.abs(got - want).max() < NEON_TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("cache", list(CODECS))
def test_codes_are_the_same_with_vectors_of_four(tmp_path: Path, cache: str) -> None:
    """Those of a Cortex-A53 in QEMU beside plain C, and rows that are decoded in parts beside whole ones.

    Groups of 25 start within a byte, those of 77 fill more than a block of 32."""
    layers = [
        LayerSpec("conv", 3, (5, 5), relu=True, pool=2),
        LayerSpec("conv", 2, (1, 1)),
        LayerSpec("fc", 77, relu=True),
    ]
    spec = NetSpec((1, 14, 14), (*layers, LayerSpec("fc", 5)))
    for lanes in (1, 4):
        export_c(network(spec), None, tmp_path / str(lanes), samples=2, cache=cache, lanes=lanes)
    here = digest(tmp_path / "1", "host", program="rows.c")
    assert here[2] == "parts that differ 0"
    missing = [tool for tool in NEEDED["a53"] if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    assert digest(tmp_path / "4", "a53", program="rows.c") == here


@pytest.mark.slow
def test_kernels_for_vectors_of_four_are_the_plain_loops(tmp_path: Path) -> None:
    """Convolutions, products and outer products of many shapes, the assembly of native/neon.h among them: every sum is
    that of a plain loop with one rounding a step. Below -O2, GCC does not fuse what is not assembly."""
    missing = [tool for tool in NEEDED["a53"] if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    export_c(network(samples.SPEC), None, tmp_path / "c", samples=2, lanes=4)
    count, differ = digest(tmp_path / "c", "a53", program="kernels.c", optimise="-O2")
    assert int(count.removeprefix("kernels ")) > 1000
    assert differ == "that differ 0"


def test_orders_are_drawn_from_the_same_start() -> None:
    """The generator's state in the exported header is NumPy's for SGD."""
    assert METHODS["skip2-lora"].cached
    assert set(initial(METHODS["skip2-lora"], samples.SPEC, 4, 0)) == {
        f"lora.{k}-3.{r}" for k in range(3) for r in "AB"
    }
