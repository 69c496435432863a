"""What stands behind the tree: y, softmax, v and u of a sample, and B (docs/hardware.md §4, §10).

A pipeline over samples without stalls: the forward pass keeps samples so far apart (`sample_slots`) that no stage takes
longer. The C multipliers that make y from h and B also update B, once the batch is through.

Letters: R rank, C classes, L taps, W width of activations.
"""

from __future__ import annotations

from typing import Any

from amaranth import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..formats import PARAMETER_FRACTION, PARAMETER_WIDTH, SCALED_FRACTION, SCALED_WIDTH, STEP_FRACTION, STEP_WIDTH
from ..layout import BEAT, CHANNELS, Build
from .array import values
from .parameters import ParameterMemory
from .pieces import again, later, saturate, tree
from .softmax import Softmax

__all__ = ["Small", "small_width"]

WORD = 32
"""Bits of a number in PARAMS' bias and in LOGITS."""


def small_width(build: Build) -> int:
    """Bits of the sums behind y and B."""
    top = 1 << (build.formats.width - 1)
    forward = top * (1 << (PARAMETER_WIDTH - 1)) * len(build.taps) * build.rank
    start = ((1 << PARAMETER_WIDTH) + 1) << (build.formats.update_shift - 1)
    return max(forward, top * (1 << (SCALED_WIDTH - 1)) * build.batch + start).bit_length() + 1


class Small(wiring.Component):
    """From the h of a batch to its u, B and logits.

    Args:
        build: the core.
        c_latency: of `c`, at least 2.

    Ports:
        start: a batch begins (pulse): samples, train, eta, gain, which stay.
        restart, data, b, bias, store, stored_…: loading and storing, as in docs/hardware.md §10.
        h_valid, h: the h of a sample, tap by tap and rank by rank; sample after sample.
        c_sample, c_class, c; label_sample, class_of: the read side of `Records`.
        through: every u of the batch is there. u_sample, u_tap, u: one cycle later its R values.
        update: B may be updated (pulse). updated: that is done.
        logits_…: stream, without `train`. answered: it is through.
        saturated_…: values cut, this cycle.
        y_valid, y_last, y_sample, y: a y, class by class. b_written, b_row, b_values: a row of B.
    """

    def __init__(self, build: Build, c_latency: int) -> None:
        self.build, self.c_latency, self.width = build, c_latency, small_width(build)
        activation, samples, beat = signed(build.formats.width), range(build.batch), 8 * BEAT
        super().__init__(
            {
                "start": In(1),
                "train": In(1),
                "samples": In(range(build.batch + 1)),
                "eta": In(STEP_WIDTH),
                "gain": In(signed(PARAMETER_WIDTH)),
                "restart": In(1),
                "data": In(beat),
                "b": In(1),
                "bias": In(1),
                "store": In(1),
                "storing": Out(1),
                "stored_valid": Out(1),
                "stored_data": Out(beat),
                "stored_ready": In(1),
                "h_valid": In(1),
                "h": In(activation),
                "c_sample": Out(samples),
                "c_class": Out(4),
                "c": In(activation),
                "label_sample": Out(samples),
                "class_of": In(4),
                "through": Out(1),
                "u_sample": In(samples),
                "u_tap": In(range(len(build.taps))),
                "u": Out(values(SCALED_WIDTH, build.rank)),
                "update": In(1),
                "updated": Out(1),
                "logits_valid": Out(1),
                "logits_data": Out(beat),
                "logits_ready": In(1),
                "answered": Out(1),
                "saturated_activations": Out(1),
                "saturated_gradients": Out(range(3)),
                "saturated_parameters": Out(range(build.net.C + 1)),
                "y_valid": Out(1),
                "y_last": Out(1),
                "y_sample": Out(samples),
                "y": Out(activation),
                "b_written": Out(1),
                "b_row": Out(range(len(build.taps) * build.rank)),
                "b_values": Out(PARAMETER_WIDTH * build.net.C),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.b = self.parameters = ParameterMemory(
            self.build.formats,
            rows=len(self.build.taps) * self.build.rank,
            beats=2,
            count=self.build.net.C,
            width=self.width,
            reads=2,
            ram=None,
        )
        B = self.parameters
        m.d.comb += [B.restart.eq(self.restart), B.load.eq(self.b), B.data.eq(self.data), B.store.eq(self.store)]
        m.d.comb += [B.stored_ready.eq(self.stored_ready), self.stored_data.eq(B.stored_data)]
        m.d.comb += [self.stored_valid.eq(B.stored_valid), self.storing.eq(B.storing)]
        m.d.comb += [self.saturated_parameters.eq(B.saturated), self.b_written.eq(B.written)]
        m.d.comb += [self.b_row.eq(B.written_row), self.b_values.eq(B.written_values)]

        ring, end = self._sums(m)
        self._logits(m, ring, end)
        self._gradients(m)
        self._answers(m)
        return m

    def _sums(self, m: Module) -> tuple[Any, Any]:
        """Σ h·B of a sample's classes and, after the batch, B + Σ h·v of its rows, by the same C multipliers.

        Returns:
            The sums of a sample as they were when it ended, and the pulse of its last h, 5 cycles before.
        """
        build, B = self.build, self.parameters
        rows, C = len(build.taps) * build.rank, build.net.C
        row, sample = Signal(range(rows)), Signal(range(build.batch))
        end = self.h_valid & (row == rows - 1)
        with m.If(self.start):
            m.d.sync += [row.eq(0), sample.eq(0)]
        with m.Elif(self.h_valid):
            m.d.sync += row.eq(Mux(end, 0, row + 1))
            m.d.sync += sample.eq(sample + end)
        self.sample = sample

        # The update's own walk: of every row, all samples.
        updating, update_row, update_sample = Signal(), Signal(range(rows)), Signal(range(build.batch))
        self.last_sample = Signal.like(sample)
        m.d.sync += self.last_sample.eq(self.samples - 1)
        row_end = update_sample == self.last_sample
        with m.If(self.update):
            m.d.sync += [updating.eq(1), update_row.eq(0), update_sample.eq(0)]
        with m.Elif(updating):
            m.d.sync += update_sample.eq(Mux(row_end, 0, update_sample + 1))
            with m.If(row_end):
                m.d.sync += update_row.eq(Mux(update_row == rows - 1, 0, update_row + 1))
                m.d.sync += updating.eq(update_row != rows - 1)

        m.submodules.h = h_cells = memory.Memory(
            shape=signed(build.formats.width), depth=build.batch << len(row), init=[]
        )
        h_in, h_out = h_cells.write_port(), h_cells.read_port()
        m.d.comb += [h_in.addr.eq(Cat(row, sample)), h_in.data.eq(self.h), h_in.en.eq(self.h_valid)]
        m.d.comb += h_out.addr.eq(Cat(update_row, update_sample))
        m.submodules.v = v_cells = memory.Memory(shape=values(SCALED_WIDTH, C), depth=build.batch, init=[])
        self.v_in, v_out = v_cells.write_port(), v_cells.read_port()
        m.d.comb += v_out.addr.eq(update_sample)

        # Cycle 0: an h, or addresses of h and v. 1: operands. 2: registered. 3: product; B as the start value. 4: sum.
        mode = later(m, updating, 1)
        m.d.comb += B.address_0.eq(Mux(later(m, updating, 2), later(m, update_row, 2), row))
        h = later(m, self.h, 1)
        x = Signal.like(self.h, reset_less=True)
        m.d.sync += x.eq(Mux(mode, h_out.data, h))
        valid = later(m, self.h_valid | updating, 3)
        first = later(m, Mux(updating, update_sample == 0, row == 0), 3)
        mode = later(m, mode, 2)
        shift = build.formats.update_shift
        sums = []
        for c in range(C):
            b = Signal(signed(SCALED_WIDTH), name=f"b_{c}", reset_less=True)
            product = Signal.like(x * b, name=f"product_{c}", reset_less=True)
            total = Signal(signed(self.width), name=f"sum_{c}", reset_less=True)
            origin = Mux(first, Mux(mode, (B.values_0[c] << shift) | Const(1 << (shift - 1)), 0), total)
            m.d.sync += [b.eq(Mux(later(m, updating, 1), v_out.data[c], B.values_0[c])), product.eq(x * b)]
            with m.If(valid):
                m.d.sync += total.eq(product + origin)
            sums.append(total)
        written = later(m, updating & row_end, 4)
        m.d.comb += [B.update.eq(written), B.row.eq(later(m, update_row, 4))]
        m.d.comb += [port.eq(s) for port, s in zip(B.sums, sums, strict=True)]
        with m.If(self.start):
            m.d.sync += self.updated.eq(0)
        with m.Elif(written & (B.row == rows - 1)):
            m.d.sync += self.updated.eq(1)

        ring = [Signal.like(s, name=f"ring_{c}", reset_less=True) for c, s in enumerate(sums)]
        with m.If(later(m, end, 4)):
            m.d.sync += [r.eq(s) for r, s in zip(ring, sums, strict=True)]
        return ring, end

    def _logits(self, m: Module, ring: list[Any], end: Any) -> None:
        """y = sat(round(ring + gain·c + bias)), class by class, which go into `y`."""
        build, C = self.build, self.build.net.C
        bias = Signal(values(build.formats.width, CHANNELS))
        with m.If(self.bias):
            words = [self.data.word_select(i, WORD)[: build.formats.width] for i in range(8 * BEAT // WORD)]
            m.d.sync += bias.eq(Cat(*list(bias)[len(words) :], *words))

        running, index, last = again(m, end, C, "y")
        with m.If(end):
            m.d.sync += self.c_sample.eq(self.sample)
        m.d.comb += self.c_class.eq(index)
        c, gained = Signal.like(self.c, reset_less=True), Signal.like(self.c * self.gain, reset_less=True)
        m.d.sync += [c.eq(self.c), gained.eq(c * self.gain)]
        delay = self.c_latency + 2
        running, index, last = (later(m, s, delay) for s in (running, index, last))
        with m.If(running):
            m.d.sync += [ring[i].eq(ring[i + 1]) for i in range(C - 1)]
        offset = Signal(signed(build.formats.width), reset_less=True)
        m.d.sync += offset.eq(Array(bias[c] for c in range(C))[index])
        partial = Signal.like(ring[0] + gained, reset_less=True)
        half = Const(1 << (PARAMETER_FRACTION - 1))
        whole = Signal.like(partial + Cat(half, offset).as_signed(), reset_less=True)
        m.d.sync += [partial.eq(ring[0] + gained), whole.eq(partial + Cat(half, offset).as_signed())]
        y, cut = saturate(whole >> PARAMETER_FRACTION, build.formats.width)
        valid = later(m, running, 2)
        m.d.sync += [self.y.eq(y), self.y_valid.eq(valid), self.saturated_activations.eq(cut & valid)]
        m.d.sync += [self.y_last.eq(later(m, last, 2))]
        self.y_class = later(m, index, 3)
        with m.If(self.start):
            m.d.sync += self.y_sample.eq(0)
        with m.Elif(self.y_valid & self.y_last):
            m.d.sync += self.y_sample.eq(self.y_sample + 1)

    def _gradients(self, m: Module) -> None:
        """p of the y, v of the p, u of the v."""
        build, B = self.build, self.parameters
        C, rank, rows = build.net.C, build.rank, len(build.taps) * build.rank
        m.submodules.softmax = softmax = Softmax(build)
        m.d.comb += [softmax.valid.eq(self.y_valid & self.train), softmax.last.eq(self.y_last), softmax.y.eq(self.y)]

        # v, class by class, until a sample has all of them.
        index, sample = Signal(range(C)), Signal(range(build.batch))
        end = softmax.p_valid & softmax.p_last
        with m.If(self.start):
            m.d.sync += [index.eq(0), sample.eq(0)]
        with m.Elif(softmax.p_valid):
            m.d.sync += [index.eq(Mux(end, 0, index + 1)), sample.eq(sample + end)]
        m.d.comb += self.label_sample.eq(sample)
        g = Signal(signed(len(softmax.p) + 1), reset_less=True)
        half = STEP_WIDTH // 2  # η in halves: the product of all of it is too wide for one multiplier of an ECP5
        low, high = self.eta[:half], self.eta[half:]
        by_low, by_high = (
            Signal.like(g * part, name=f"g_eta_{i}", reset_less=True) for i, part in enumerate((low, high))
        )
        scaled = Signal.like(by_low + (by_high << half), reset_less=True)
        spare = STEP_FRACTION + PARAMETER_FRACTION - SCALED_FRACTION
        rounded = Signal.like(scaled + (1 << (spare - 1)), reset_less=True)
        v = Signal(signed(SCALED_WIDTH), reset_less=True)
        cut, v_cut, u_cut = Signal(), Signal(), Signal()
        value, over = saturate(rounded >> spare, SCALED_WIDTH)
        m.d.sync += [
            g.eq(Mux(index == self.class_of, 1 << PARAMETER_FRACTION, 0) - softmax.p),
            by_low.eq(g * low),
            by_high.eq(g * high),
            scaled.eq(by_low + (by_high << half)),
            rounded.eq(scaled + (1 << (spare - 1))),
            v.eq(value),
            cut.eq(over),
        ]
        valid = later(m, softmax.p_valid, 5)
        gathered, kept = Signal(SCALED_WIDTH * C, reset_less=True), Signal(values(SCALED_WIDTH, C), reset_less=True)
        with m.If(valid):
            m.d.sync += gathered.eq(Cat(gathered[SCALED_WIDTH:], v))
        complete = later(m, end, 6)
        m.d.comb += [self.v_in.addr.eq(later(m, sample, 6)), self.v_in.data.eq(gathered), self.v_in.en.eq(complete)]
        with m.If(later(m, complete, 1)):  # no sooner: the last row of the sample before is still at work
            m.d.sync += kept.eq(gathered)

        # u, row by row.
        running, row, last = again(m, complete, rows, "u")
        m.d.comb += B.address_1.eq(row)
        products = [Signal(signed(PARAMETER_WIDTH + SCALED_WIDTH), name=f"v_b_{c}", reset_less=True) for c in range(C)]
        m.d.sync += [product.eq(kept[c] * B.values_1[c]) for c, product in enumerate(products)]
        total, depth = tree(m, products)
        spare = PARAMETER_FRACTION
        rounded = Signal.like(total + (1 << (spare - 1)), reset_less=True)
        u = Signal(signed(SCALED_WIDTH), reset_less=True)
        value, over = saturate(rounded >> spare, SCALED_WIDTH)
        m.d.sync += [rounded.eq(total + (1 << (spare - 1))), u.eq(value)]
        delay = 2 + depth + 2
        running, row, last = (later(m, s, delay) for s in (running, row, last))
        m.d.sync += [v_cut.eq(cut & valid), u_cut.eq(later(m, over, 1) & running)]
        m.d.comb += self.saturated_gradients.eq(v_cut + u_cut)

        word = Signal(SCALED_WIDTH * rank, reset_less=True)
        with m.If(running):
            m.d.sync += word.eq(Cat(word, u)[SCALED_WIDTH:])
        rank_bits = ceil_log2(rank)
        full = later(m, running & ((row & (rank - 1)) == rank - 1), 1)
        done, tap = later(m, last, 1), later(m, row[rank_bits:], 1)
        sample = Signal(range(build.batch))
        tap_bits = ceil_log2(len(build.taps))
        m.submodules.u = cells = memory.Memory(shape=values(SCALED_WIDTH, rank), depth=build.batch << tap_bits, init=[])
        into, out = cells.write_port(), cells.read_port()
        m.d.comb += [into.addr.eq(Cat(tap[:tap_bits], sample)), into.data.eq(word), into.en.eq(full)]
        m.d.comb += [out.addr.eq(Cat(self.u_tap, self.u_sample)), self.u.eq(out.data)]
        with m.If(self.start):
            m.d.sync += [sample.eq(0), self.through.eq(0)]
        with m.Elif(done):
            m.d.sync += sample.eq(sample + 1)
            with m.If(sample == self.last_sample):
                m.d.sync += self.through.eq(1)

    def _answers(self, m: Module) -> None:
        """The stream of logits: every y of the batch is kept, so that it may wait."""
        build = self.build
        class_bits = ceil_log2(CHANNELS)
        m.submodules.y = cells = memory.Memory(
            shape=signed(build.formats.width), depth=build.batch << class_bits, init=[]
        )
        into, out = cells.write_port(), cells.read_port()
        m.d.comb += [into.data.eq(self.y), into.en.eq(self.y_valid)]
        m.d.comb += into.addr.eq(Cat(self.y_class, Const(0, class_bits - len(self.y_class)), self.y_sample))

        there, sent = Signal(range(build.batch + 1)), Signal(range(build.batch + 1))
        index, arrived, number = Signal(class_bits), Signal(), Signal(signed(WORD))
        m.d.comb += [out.addr.eq(Cat(index, sent)), self.answered.eq(sent == self.samples)]
        m.d.comb += number.eq(Mux(later(m, index < build.net.C, 1), out.data, 0))
        m.d.sync += arrived.eq(0)
        with m.If(arrived):
            m.d.sync += self.logits_data.eq(Cat(self.logits_data[WORD:], number))
        with m.If(self.logits_valid), m.If(self.logits_ready):
            m.d.sync += [self.logits_valid.eq(0), sent.eq(sent + (index == 0))]
        with m.Elif(arrived & (index[:2] == 0)):
            m.d.sync += self.logits_valid.eq(1)
        with m.Elif(sent != there):
            m.d.sync += [arrived.eq(1), index.eq(index + 1)]
        with m.If(self.start):
            m.d.sync += [there.eq(0), sent.eq(0), index.eq(0)]
        with m.Elif(self.y_valid & self.y_last & ~self.train):
            m.d.sync += there.eq(there + 1)
