"""The frozen network: S samples in step through all layers (docs/hardware.md §2, §6, §10).

One sequencer walks layers, groups of 16 output channels, pooling windows, their pixels, and inputs (channel, row,
column of the kernel): a weight word of 16 channels and an activation of every sample each cycle, no cycle between
outputs. All samples do the same at once, so a memory of activations is one wide memory, with one address; it has an
even and an odd bank, so that two neighbours come in one cycle. Every layer has a region of its own: what `Quantise`
reads is all there.

While an output is summed, the one before leaves the array channel by channel: bias, rounding, ReLU, pooling, memory.

Letters: S samples side by side, W width of activations, F their fraction.
"""

from __future__ import annotations

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from ..formats import PARAMETER_FRACTION, PARAMETER_WIDTH
from ..layout import BEAT, CHANNELS, Build, Layer
from .array import LATENCY as SUM
from .array import BackbonePort, sum_width, values
from .memory import LATENCY as STORED
from .memory import Store, Style
from .pieces import later, saturate, tree

__all__ = ["READ", "Backbone", "ResultsPort"]

READ = 2 + STORED
"""Cycles from an address to its two values: bank addresses, memory, then swapped and masked."""

DRAIN = 5
"""Registers from the head of the hold chain to memory: head and bias, sum, rounded, pooled, memory."""

SETTLE = READ + SUM + 1 + CHANNELS + DRAIN
"""Cycles from the last product of a layer until its last output can be read."""

COUNTERS = ("pixels_x", "pixels_y", "windows_x", "windows_y", "groups")
"""From the innermost: columns and rows of a window, columns and rows of windows, groups of channels."""


class ResultsPort(wiring.Signature):
    """What the frozen network gives the quantiser.

    Attributes:
        ready: x^1 … c of the group lie in memory, until `taken`.
        taken: pulse: they are no longer needed.
        address: of a value, x^1 … c one after the other; only while `ready`.
        pair: (2·S,) of sample s, the value at `address` at 2·s and the next one at 2·s + 1, READ cycles later.
        written: a value of every sample is written this cycle …
        scale: … of this group of the record (c, which has no scale, comes after those that have one), …
        first: … its first one …
        values: (S,) … these.
    """

    def __init__(self, build: Build) -> None:
        width = build.formats.width
        super().__init__(
            {
                "ready": Out(1),
                "taken": In(1),
                "address": In(range(build.net.record.size)),
                "pair": Out(values(width, 2 * build.samples)),
                "written": Out(1),
                "scale": Out(range(build.scales + 1)),
                "first": Out(1),
                "values": Out(values(width, build.samples)),
            }
        )


class Backbone(wiring.Component):
    """Sequencer, memories and drain; the products are the lane array's.

    Args:
        build: the core.
        weights, activations, pixels: what the memories of weights, of x^1 … c, and of x^0 are made of.

    Ports:
        restart, data, weights, biases: load (docs/hardware.md §10).
        x_valid, x_data, x_ready: stream of rows of X0, `samples` of them a group. They may come before `start`: x_ready
            is low from the last one until the group's first layer is done.
        start: pulse, while not busy; samples: of this group, with it.
        busy: from the cycle after `start` until the quantiser has taken the results.
        saturated: how many values were cut; of the samples that count.
        array, heads: to the lane array, and its sample heads.
        results: to the quantiser.
    """

    def __init__(
        self, build: Build, weights: Style = "block", activations: Style = "block", pixels: Style = "block"
    ) -> None:
        self.build = build
        self.styles = {"weights": weights, "activations": activations, "pixels": pixels}
        samples = range(build.samples + 1)
        super().__init__(
            {
                "restart": In(1),
                "data": In(8 * BEAT),
                "weights": In(1),
                "biases": In(1),
                "x_valid": In(1),
                "x_data": In(8 * BEAT),
                "x_ready": Out(1),
                "start": In(1),
                "samples": In(samples),
                "busy": Out(1),
                "saturated": Out(samples),
                "array": Out(BackbonePort(build)),
                "heads": In(values(sum_width(build), build.samples)),
                "results": Out(ResultsPort(build)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        build = self.build
        # Addresses of x^0 and of x^1 … c, with room for a row of padding before them.
        self.address_bits = bits_for(max(build.net.geometry[0].N, build.net.record.size)) + 1
        plans = [self._plan(k, layer) for k, layer in enumerate(build.layers)]
        self.plan = {
            name: Signal(
                signed(max(bits_for(p[name], True) for p in plans))
                if min(p[name] for p in plans) < 0
                else unsigned(max(1, *(bits_for(p[name]) for p in plans))),
                name=f"plan_{name}",
                reset_less=True,
            )
            for name in plans[0]
        }
        self.mask = Signal(build.samples, reset_less=True)
        self.first_layer = Signal()
        self.rows = Signal(range(build.samples + 1))  # of x^0, that are there
        self.layer = Signal(range(len(plans)))
        with m.Switch(self.layer):
            for i, p in enumerate(plans):
                with m.Case(i):
                    m.d.sync += [self.plan[name].eq(value) for name, value in p.items()]
        self._sequence(m)
        self._operands(m)
        self._drain(m)
        return m

    def _plan(self, k: int, layer: Layer) -> dict[str, int]:
        """Constants of layer k. `address_i`, `x_i` and `y_i` are what changes from a pixel to the next where counter i
        steps (`COUNTERS`)."""
        build, spec, g = self.build, layer.spec, layer.geometry
        regions = [0]  # of the inputs: x^0 has a memory of its own, the others lie one after the other
        at = 0
        for segment in build.net.record.segments:
            regions.append(at)
            at += segment.size
        conv = spec.kind == "conv"
        h, w = g.in_shape[1:] if conv else (1, 1)
        (kh, kw), (ph, pw) = (spec.kernel, spec.padding) if conv else ((1, 1), (0, 0))
        rows, columns = g.linear_shape[1:] if conv else (1, 1)
        pool = spec.pool
        wide = 2 if layer.pair else pool  # columns of a window, or of two where they are computed at once
        across = 1 if layer.pair else pool  # steps over its columns
        back = (pool - 1) * w + across - 1  # from a window's first pixel to its last
        count = columns // wide
        plane = (rows // pool) * (columns // pool)
        step = 2 if layer.pair and pool == 1 else 1  # outputs of a window, or of two
        return {
            "inputs": layer.inputs - 1,
            "gap": max(0, CHANNELS - layer.inputs),
            "kernel_x": kw - 1,
            "kernel_y": kh - 1,
            "next_row": w - (kw - 1),
            "next_channel": h * w - (kh - 1) * w - (kw - 1),
            "width": w,
            "height": h,
            "origin": regions[k] - ph * w - pw,
            "origin_x": -pw,
            "origin_y": -ph,
            "pixels_x": across - 1,
            "pixels_y": pool - 1,
            "windows_x": count - 1,
            "windows_y": rows // pool - 1,
            "groups": layer.channel_groups - 1,
            "address_1": w - (across - 1),
            "address_2": wide - back,
            "address_3": pool * w - (count - 1) * wide - back,
            "x_1": 1 - across,
            "x_2": wide - (across - 1),
            "x_3": -(count - 1) * wide - (across - 1),
            "y_2": 1 - pool,
            "out": regions[k + 1],
            "out_step": step,
            "plane": plane,
            "next_group": (CHANNELS - 1) * plane + step,
            "channels": spec.out - CHANNELS * (layer.channel_groups - 1),
            "scale": build.scales if k == build.net.L - 1 else build.taps[k + 1].first_scale,
            "vector": int(not conv),
            "pair": int(layer.pair),
            "joined": int(layer.pair and pool == 2),
            "relu": int(spec.relu),
            "is_last": int(k == build.net.L - 1),
        }

    # -- what is multiplied when

    def _sequence(self, m: Module) -> None:
        plan, bits = self.plan, self.address_bits
        # The next product.
        self.address = address = Signal(bits, reset_less=True)
        side = signed(max(len(plan["width"]), len(plan["height"])) + 2)
        x, y = Signal(side, reset_less=True), Signal(side, reset_less=True)
        self.x, self.y = x, y
        left = Signal.like(plan["inputs"], name="left", reset_less=True)
        last = Signal(reset_less=True)  # left == 0
        kernel_x = Signal.like(plan["kernel_x"], name="kernel_x", reset_less=True)
        kernel_y = Signal.like(plan["kernel_y"], name="kernel_y", reset_less=True)
        self.valid, self.fresh = Signal(), Signal(reset_less=True)
        self.last = Signal()  # the last product of an output is issued
        word = Signal(range(max(2, self.build.weight_words + 1)), reset_less=True)
        group_word = Signal.like(word, name="group_word", reset_less=True)
        self.word = word

        # The pixel it belongs to, and (at least 16 cycles long, so it may take five) the pixel after that.
        pixel, pixel_x, pixel_y = Signal(bits, reset_less=True), Signal.like(x), Signal.like(y)
        after, after_x, after_y = (Signal.like(s, name=f"after_{i}") for i, s in enumerate((pixel, x, y)))
        counters = [Signal.like(plan[name], name=f"left_{name}", reset_less=True) for name in COUNTERS]
        ends = Signal(len(counters))
        turn = Signal(range(6))  # which of the counters steps; 5: the layer is done
        moves = [Signal(signed(bits + 1), name=f"move_{i}", reset_less=True) for i in range(3)]
        m.d.sync += [ends[i].eq(c == 0) for i, c in enumerate(counters)]
        m.d.sync += turn.eq(5)
        for i in reversed(range(5)):
            with m.If(~ends[i]):
                m.d.sync += turn.eq(i)
        with m.Switch(turn):
            for i, move in enumerate(
                [
                    (1, 1, 0),
                    (plan["address_1"], plan["x_1"], 1),
                    (plan["address_2"], plan["x_2"], plan["y_2"]),
                    (plan["address_3"], plan["x_3"], 1),
                ]
            ):
                with m.Case(i):
                    m.d.sync += [s.eq(v) for s, v in zip(moves, move, strict=True)]
        m.d.sync += [
            after.eq(Mux(turn == 4, plan["origin"], pixel + moves[0])),
            after_x.eq(Mux(turn == 4, plan["origin_x"], pixel_x + moves[1])),
            after_y.eq(Mux(turn == 4, plan["origin_y"], pixel_y + moves[2])),
        ]

        # Where the output goes.
        self.output = output = Signal(
            data.StructLayout(
                {
                    "address": unsigned(bits),
                    "pool_first": 1,
                    "pool_last": 1,
                    "scale": range(self.build.scales + 1),
                    "scale_first": 1,
                    "channels": range(CHANNELS + 1),
                    "bias": range(max(2, self.build.bias_words)),
                }
            ),
            reset_less=True,
        )
        m.d.sync += [
            output.pool_last.eq(ends[:2].all()),
            output.channels.eq(Mux(ends[4], plan["channels"], CHANNELS)),
        ]

        step_x, step_y = Signal(), Signal()
        m.d.comb += [self.last.eq(self.valid & last), step_x.eq(kernel_x == 0), step_y.eq(kernel_y == 0)]
        with m.If(self.valid):
            m.d.sync += [left.eq(left - 1), last.eq(left == 1), self.fresh.eq(last), word.eq(word + 1)]
            m.d.sync += [kernel_x.eq(kernel_x - 1), address.eq(address + 1), x.eq(x + 1)]
            with m.If(step_x):
                m.d.sync += [
                    kernel_x.eq(plan["kernel_x"]),
                    kernel_y.eq(Mux(step_y, plan["kernel_y"], kernel_y - 1)),
                    address.eq(address + Mux(step_y, plan["next_channel"], plan["next_row"])),
                    x.eq(pixel_x),
                    y.eq(Mux(step_y, pixel_y, y + 1)),
                ]
        with m.If(self.last):
            m.d.sync += [left.eq(plan["inputs"]), last.eq(plan["inputs"] == 0)]
            m.d.sync += [s.eq(v) for s, v in zip((address, x, y), (after, after_x, after_y), strict=True)]
            m.d.sync += [s.eq(v) for s, v in zip((pixel, pixel_x, pixel_y), (after, after_x, after_y), strict=True)]
            for i, (counter, name) in enumerate(zip(counters, COUNTERS, strict=True)):
                with m.If(turn == i):
                    m.d.sync += counter.eq(counter - 1)
                with m.Elif(turn > i):
                    m.d.sync += counter.eq(plan[name])
            with m.If(turn >= 4):
                m.d.sync += [group_word.eq(word + 1), output.bias.eq(output.bias + 1)]
            with m.Else():
                m.d.sync += word.eq(group_word)
            m.d.sync += output.pool_first.eq(turn >= 2)
            with m.If(turn == 4):
                m.d.sync += [
                    output.address.eq(output.address + plan["next_group"]),
                    output.scale_first.eq(~plan["vector"]),
                    output.scale.eq(output.scale + Mux(plan["vector"], 0, CHANNELS)),
                ]
            with m.Elif(turn >= 2):
                m.d.sync += [output.address.eq(output.address + plan["out_step"]), output.scale_first.eq(0)]

        wait = Signal(range(SETTLE + 1), reset_less=True)
        needed = Signal.like(self.samples, reset_less=True)
        with m.FSM():
            with m.State("idle"), m.If(self.start):
                m.d.sync += [
                    needed.eq(self.samples),
                    self.mask.eq(Cat(self.samples > i for i in range(len(self.mask)))),
                ]
                m.d.sync += [self.busy.eq(1), self.layer.eq(0), output.bias.eq(0), word.eq(0), group_word.eq(0)]
                m.next = "load"
            with m.State("load"), m.If(self.rows == needed):
                m.d.sync += self.first_layer.eq(1)
                m.next = "plan"
            with m.State("plan"):  # of `layer`, from the next cycle
                m.next = "begin"
            with m.State("begin"):
                m.d.sync += [s.eq(plan["origin"]) for s in (address, pixel)]
                m.d.sync += [s.eq(plan["origin_x"]) for s in (x, pixel_x)]
                m.d.sync += [s.eq(plan["origin_y"]) for s in (y, pixel_y)]
                m.d.sync += [counter.eq(plan[name]) for counter, name in zip(counters, COUNTERS, strict=True)]
                m.d.sync += [kernel_x.eq(plan["kernel_x"]), kernel_y.eq(plan["kernel_y"])]
                m.d.sync += [left.eq(plan["inputs"]), last.eq(plan["inputs"] == 0), self.fresh.eq(1)]
                m.d.sync += [output.address.eq(plan["out"]), output.pool_first.eq(1)]
                m.d.sync += [output.scale.eq(plan["scale"]), output.scale_first.eq(1)]
                m.d.sync += [self.valid.eq(plan["gap"] == 0), wait.eq(plan["gap"])]
                m.next = "run"
            with m.State("run"):
                with m.If(self.last):
                    m.d.sync += [self.valid.eq((plan["gap"] == 0) & (turn != 5)), wait.eq(plan["gap"])]
                    with m.If(turn == 5):
                        m.d.sync += wait.eq(SETTLE)
                        m.next = "drain"
                with m.Elif(~self.valid):  # an output takes at least 16 cycles: the one before it leaves in these
                    m.d.sync += [wait.eq(wait - 1), self.valid.eq(wait == 1)]
            with m.State("drain"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.d.sync += [self.first_layer.eq(0), self.layer.eq(self.layer + 1)]
                    m.next = "plan"
                    with m.If(plan["is_last"]):
                        m.next = "results"
            with m.State("results"):
                m.d.comb += self.results.ready.eq(1)
                with m.If(self.results.taken):
                    m.d.sync += self.busy.eq(0)
                    m.next = "idle"

    # -- memories, and from them to the array

    def _load_inputs(self, m: Module) -> list[tuple[Store, Store]]:
        """The memories of x^0, even and odd, of each sample; half a beat is written a cycle."""
        build, width = self.build, self.build.formats.width
        samples, depth = build.samples, 2 * build.input_beats
        beat, pending = Signal(8 * BEAT, reset_less=True), Signal(2)
        left = Signal(range(max(2, build.input_beats)))
        row, word = Signal(range(samples), reset_less=True), Signal(range(depth), reset_less=True)
        m.d.comb += self.x_ready.eq(~pending[0] & (self.rows != samples) & ~self.first_layer)
        m.d.sync += pending.eq(pending << 1)
        with m.If(self.x_valid & self.x_ready):
            m.d.sync += [beat.eq(self.x_data), pending.eq(1), row.eq(self.rows), left.eq(left + 1)]
            m.d.sync += word.eq(Mux(left == 0, 0, word + 1))
            with m.If(left == build.input_beats - 1):
                m.d.sync += [left.eq(0), self.rows.eq(self.rows + 1)]
        with m.Elif(pending[0]):
            m.d.sync += [word.eq(word + 1), beat.eq(beat >> 4 * BEAT)]
        with m.If(self.first_layer):
            m.d.sync += self.rows.eq(0)

        half = []
        if build.input == "u8":
            half = [Cat(beat[8 * i : 8 * i + 8] for i in range(first, BEAT // 2, 2)) for first in (0, 1)]
        else:
            drop = 16 - build.formats.fraction
            for i in range(2):
                value = beat[32 * i : 32 * i + 24].as_signed()
                half.append(saturate((value + (1 << drop >> 1)) >> drop, width)[0])
        place, at, writes = Signal.like(word, reset_less=True), Signal.like(row, reset_less=True), Signal()
        m.d.sync += [place.eq(word), at.eq(row), writes.eq(pending.any())]
        out = []
        for i, value in enumerate(half):
            held = Signal(len(value), name=f"input_{i}", reset_less=True)
            m.d.sync += held.eq(value)
            half[i] = held
        for s in range(samples):
            stores = []
            for name, value in zip(("even", "odd"), half, strict=True):
                m.submodules[f"x_{name}_{s}"] = store = Store(len(value), depth, self.styles["pixels"])
                m.d.comb += [
                    store.write.eq(writes & (at == s)),
                    store.write_address.eq(place),
                    store.write_data.eq(value),
                ]
                stores.append(store)
            out.append((stores[0], stores[1]))
        return out

    def _operands(self, m: Module) -> None:
        build, plan, width = self.build, self.plan, self.build.formats.width
        pixels = self._load_inputs(m)
        depth = -(-build.net.record.size // 2)
        self.stores = [Store(build.samples * width, depth, self.styles["activations"]) for _ in range(2)]
        m.submodules.even, m.submodules.odd = self.stores

        # Cycle 1: the banks' addresses; what lies inside the image.
        reading = self.results.ready
        address = Mux(reading, self.results.address, self.address)
        banks = [Signal(self.address_bits - 1, name=f"bank_{name}", reset_less=True) for name in ("even", "odd")]
        swap = Signal(reset_less=True)
        m.d.sync += [banks[0].eq((address + 1) >> 1), banks[1].eq(address >> 1), swap.eq(address[0])]
        inside = Signal(3, reset_less=True)
        if any(any(layer.spec.padding) for layer in build.layers):
            m.d.sync += inside.eq(
                Cat(
                    (self.x >= 0) & (self.x < plan["width"]),
                    (self.x >= -1) & (self.x + 1 < plan["width"]),
                    (self.y >= 0) & (self.y < plan["height"]),
                )
                | Mux(reading, 7, 0)
            )
        else:
            m.d.comb += inside.eq(7)
        for store, bank in zip(self.stores, banks, strict=True):
            m.d.comb += store.read_address.eq(bank)
        per = 4 if build.input == "u8" else 1
        for stores in pixels:
            for store, bank in zip(stores, banks, strict=True):
                m.d.comb += store.read_address.eq(bank >> (per.bit_length() - 1))

        # Cycle 4: swapped and masked.
        swap = later(m, swap, STORED)
        shown = later(
            m, Cat(inside[0] & inside[2], Mux(plan["pair"] | reading, inside[1], inside[0]) & inside[2]), STORED
        )
        part = [later(m, bank[:2], STORED) for bank in banks]
        pair, initial = Signal(reset_less=True), Signal(reset_less=True)
        m.d.sync += [pair.eq(plan["pair"] | reading), initial.eq(self.first_layer)]
        for s, stores in enumerate(pixels):
            two = [store.read_data for store in stores]
            if build.input == "u8":
                two = [word.word_select(byte, 8) for word, byte in zip(two, part, strict=True)]
            near = [store.read_data[width * s : width * (s + 1)] for store in self.stores]
            for half in range(2):
                other = swap ^ (pair if half else Const(0))
                raw, value = Mux(other, two[1], two[0]), Mux(other, near[1], near[0])
                if build.input == "u8":
                    drop = 16 - build.formats.fraction
                    raw = (Cat(raw, raw) + raw[7] + (1 << drop >> 1)) >> drop
                operand = Signal(signed(width), name=f"operand_{s}_{half}", reset_less=True)
                m.d.sync += operand.eq(Mux(shown[half], Mux(initial, raw[:width], value), 0))
                m.d.comb += [self.array.x[2 * s + half].eq(operand), self.results.pair[2 * s + half].eq(operand)]

        # Weights, biases: two beats a word, each beat with a memory of its own, so that few wires bring them.
        odd, word_row, bias_row = Signal(), Signal(range(build.weight_words)), Signal(range(build.bias_words))
        with m.If(self.restart):
            m.d.sync += [odd.eq(0), word_row.eq(0), bias_row.eq(0)]
        with m.Elif(self.weights | self.biases):
            m.d.sync += odd.eq(~odd)
            m.d.sync += [word_row.eq(word_row + (self.weights & odd)), bias_row.eq(bias_row + (self.biases & odd))]
        words = [Store(8 * BEAT, build.weight_words, self.styles["weights"]) for _ in range(2)]
        self.biases_read = []
        for half, store in enumerate(words):
            bias = Memory(shape=8 * BEAT, depth=build.bias_words, init=[], attrs={"ram_style": "distributed"})
            m.submodules[f"weight_words_{half}"], m.submodules[f"bias_words_{half}"] = store, bias
            write = bias.write_port()
            self.biases_read.append(bias.read_port())
            m.d.comb += [
                store.write.eq(self.weights & (odd == half)),
                store.write_address.eq(word_row),
                store.write_data.eq(self.data),
                store.read_address.eq(later(m, self.word, READ - 1 - STORED)),
                write.en.eq(self.biases & (odd == half)),
                write.addr.eq(bias_row),
                write.data.eq(self.data),
            ]
        weights = Signal(16 * BEAT, reset_less=True)
        m.d.sync += weights.eq(Cat(store.read_data for store in words))
        m.d.comb += [
            self.array.w.as_value().eq(weights),
            self.array.valid.eq(later(m, self.valid, READ)),
            self.array.start.eq(later(m, self.fresh, READ)),
        ]

    # -- from the array to memory

    def _drain(self, m: Module) -> None:
        build, plan, width = self.build, self.plan, self.build.formats.width
        fraction, drop, samples = build.formats.fraction, PARAMETER_FRACTION, build.samples

        # An output's sums are complete SUM cycles after its last operands; then it has 16 cycles to leave.
        tail, drain = Signal.like(self.output, reset_less=True), Signal.like(self.output, reset_less=True)
        m.d.comb += self.array.capture.eq(later(m, self.last, READ + SUM - 1))
        capture = later(m, self.array.capture, 1)
        active, channel = Signal(), Signal(range(CHANNELS), reset_less=True)
        place = Signal.like(self.output.address, reset_less=True)
        biases = Signal(16 * BEAT, reset_less=True)
        m.d.comb += [read.addr.eq(tail.bias) for read in self.biases_read]
        m.d.comb += self.array.shift.eq(capture | (active & (channel != CHANNELS - 1)))
        with m.If(self.last):
            m.d.sync += tail.eq(self.output)
        again = plan["pair"] & (channel == CHANNELS // 2 - 1)  # channel 0 of the second pixel comes next
        with m.If(capture):
            m.d.sync += [active.eq(1), channel.eq(0), drain.eq(tail), place.eq(tail.address)]
            m.d.sync += biases.eq(Cat(read.data for read in self.biases_read))
        with m.Else():
            m.d.sync += [channel.eq(channel + 1), biases.eq(biases >> PARAMETER_WIDTH)]
            m.d.sync += place.eq(Mux(again, drain.address + ~plan["joined"], place + plan["plane"]))
            with m.If(channel == CHANNELS - 1):
                m.d.sync += active.eq(0)

        # What happens to the value at the heads: `control` goes with it.
        second = channel[3] & plan["pair"]
        own = Cat(channel[:3], channel[3] & ~plan["pair"])
        joined = plan["joined"]
        control = data.StructLayout(
            {
                "counts": 1,
                "first": 1,
                "write": 1,
                "place": len(place),
                "slot": range(CHANNELS),
                "scale": range(build.scales + 1),
                "scale_first": 1,
            }
        )
        now = Signal(control)
        counts = active & (own < drain.channels)
        m.d.comb += [
            now.counts.eq(counts),
            now.first.eq(drain.pool_first & ~(joined & second)),
            now.write.eq(counts & drain.pool_last & (second | ~joined)),
            now.place.eq(place),
            now.slot.eq(Mux(joined, own, channel)),
            now.scale.eq(drain.scale + Mux(plan["vector"], 0, own)),
            now.scale_first.eq(drain.scale_first & Mux(plan["vector"], channel == 0, joined | ~second)),
        ]
        stages = [now]
        for i in range(4):
            stage = Signal(control, name=f"stage_{i + 1}")
            m.d.sync += stage.eq(stages[-1])
            stages.append(stage)

        constant = Signal(signed(PARAMETER_WIDTH + fraction + 1), reset_less=True)
        m.d.sync += constant.eq((biases[:PARAMETER_WIDTH].as_signed() << fraction) + (1 << (drop - 1)))
        pooling = any(layer.spec.pool > 1 for layer in build.layers)
        if pooling:
            m.submodules.pool = pool = Memory(
                shape=samples * width, depth=CHANNELS, init=[], attrs={"ram_style": "distributed"}
            )
            put, get = pool.write_port(), pool.read_port(domain="comb")
            m.d.comb += [put.en.eq(stages[3].counts), put.addr.eq(stages[3].slot), get.addr.eq(stages[3].slot)]
        cut = Signal(samples)
        best = [Signal(signed(width), name=f"best_{s}", reset_less=True) for s in range(samples)]
        for s in range(samples):
            head = Signal.like(self.heads[s], name=f"head_{s}", reset_less=True)
            total = Signal(signed(len(head) + 1), name=f"total_{s}", reset_less=True)
            z = Signal(signed(width), name=f"z_{s}", reset_less=True)
            m.d.sync += [head.eq(self.heads[s]), total.eq(head + constant)]
            cut_off, over = saturate(total[drop:].as_signed(), width)
            m.d.sync += z.eq(Mux(total[-1] & plan["relu"], 0, cut_off))
            m.d.sync += cut[s].eq(over & stages[2].counts & self.mask[s])
            if pooling:
                held = get.data[width * s : width * (s + 1)].as_signed()
                larger = Mux(stages[3].first | (z > held), z, held)
                m.d.comb += put.data[width * s : width * (s + 1)].eq(larger)
            else:
                larger = z
            m.d.sync += best[s].eq(larger)
        m.d.comb += self.saturated.eq(tree(m, list(cut))[0])
        done = stages[4]
        for parity, store in enumerate(self.stores):
            m.d.comb += [
                store.write.eq(done.write & (done.place[0] == parity)),
                store.write_address.eq(done.place >> 1),
                store.write_data.eq(Cat(best)),
            ]
        m.d.comb += [self.results.values[s].eq(b) for s, b in enumerate(best)]
        m.d.comb += [
            self.results.written.eq(done.write),
            self.results.scale.eq(done.scale),
            self.results.first.eq(done.scale_first),
        ]
