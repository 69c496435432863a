"""The adapters of all taps: forward sample by sample, backward chunk by chunk (docs/hardware.md §4, §6, §10).

Letters: N lanes, R rank, L taps, W width of activations.
"""

from __future__ import annotations

from typing import Any

from amaranth import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from ..formats import PARAMETER_FRACTION, PARAMETER_WIDTH, STEP_WIDTH
from ..layout import BEAT, CHANNELS, Build
from .array import LATENCY as ARRAY_LATENCY
from .array import START_DELAY, AdaptersPort, sum_width, values
from .parameters import ParameterMemory
from .pieces import later, saturate, tree
from .small import Small

__all__ = ["Adapters", "sample_slots"]


def sample_slots(build: Build, c_latency: int) -> list[tuple[int, bool, bool]]:
    """The forward pass of a sample, cycle by cycle: (chunk or -1, first of its tap, last of its tap).

    A tap ends R cycles at least after the one before, which leaves through the tree meanwhile; a sample has as many as
    the passes over its classes take.
    """
    out: list[tuple[int, bool, bool]] = []
    for tap in build.taps:
        last = tap.chunks - 1
        out += [(-1, False, False)] * (build.rank - tap.chunks)
        out += [(tap.first_chunk + i, i == 0, i == last) for i in range(tap.chunks)]
    return out + [(-1, False, False)] * (build.net.C + max(2, c_latency) - len(out))


class Adapters(wiring.Component):
    """Forward, backward and update of a batch; its parameters, loaded and stored.

    Args:
        build: the core.
        latency: of `Records`, (sample, chunk) to `values`, at least 1.
        c_latency: of its `c`, at least 2.
        ram: `ram_style` of the memory of A.
        trace: whether there are the trace ports of docs/hardware.md §10.

    Ports, all as in docs/hardware.md §10:
        start, train, bank, samples, eta, gain; busy, forward, backward: a batch. What it is given must stay until it is
            through.
        restart, data, a, b, bias: loading. store, stored_…: storing.
        read_bank, sample, chunk, values, c_sample, c_class, c, label_sample, class_of: the read side of `Records`.
        array, lane_heads, p: the lane array.
        logits_…: the answers. saturated_…: values cut this cycle.
    """

    def __init__(self, build: Build, latency: int, c_latency: int, ram: str | None = None, trace: bool = False) -> None:
        self.build, self.latency, self.c_latency, self.ram, self.trace = build, latency, c_latency, ram, trace
        count, width, activation = build.lanes * build.rank, sum_width(build), signed(build.formats.width)
        self.small = Small(build, c_latency)
        ports: dict[str, Any] = {
            "start": In(1),
            "train": In(1),
            "bank": In(1),
            "samples": In(range(build.batch + 1)),
            "eta": In(STEP_WIDTH),
            "gain": In(signed(PARAMETER_WIDTH)),
            "busy": Out(1),
            "forward": Out(1),
            "backward": Out(1),
            "restart": In(1),
            "data": In(8 * BEAT),
            "a": In(1),
            "b": In(1),
            "bias": In(1),
            "store": In(1),
            "stored_valid": Out(1),
            "stored_data": Out(8 * BEAT),
            "stored_ready": In(1),
            "read_bank": Out(1),
            "sample": Out(range(build.batch)),
            "chunk": Out(range(build.chunks)),
            "values": In(values(build.formats.width, build.lanes)),
            "c_sample": Out(range(build.batch)),
            "c_class": Out(4),
            "c": In(activation),
            "label_sample": Out(range(build.batch)),
            "class_of": In(4),
            "array": Out(AdaptersPort(build)),
            "lane_heads": In(values(width, build.lanes)),
            "p": In(values(width, count)),
            "logits_valid": Out(1),
            "logits_data": Out(8 * BEAT),
            "logits_ready": In(1),
            "saturated_activations": Out(range(3)),
            "saturated_gradients": Out(range(3)),
            "saturated_parameters": Out(range(count + build.net.C + 1)),
        }
        if trace:
            ports |= {
                "trace_y_valid": Out(1),
                "trace_y_sample": Out(8),
                "trace_y": Out(CHANNELS * build.formats.width),
                "trace_a_valid": Out(1),
                "trace_a_chunk": Out(16),
                "trace_a": Out(PARAMETER_WIDTH * count),
                "trace_b_valid": Out(1),
                "trace_b_row": Out(16),
                "trace_b": Out(PARAMETER_WIDTH * CHANNELS),
            }
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        build, small = self.build, self.small
        m.submodules.small = small
        m.submodules.a = A = ParameterMemory(
            build.formats,
            rows=build.chunks,
            beats=build.chunk_beats,
            count=build.lanes * build.rank,
            width=sum_width(build),
            reads=1,
            ram=self.ram,
        )
        for name in ("start", "train", "samples", "eta", "gain", "restart", "data", "b", "bias", "c", "class_of"):
            m.d.comb += getattr(small, name).eq(getattr(self, name))
        for name in ("c_sample", "c_class", "label_sample", "logits_valid", "logits_data", "saturated_gradients"):
            m.d.comb += getattr(self, name).eq(getattr(small, name))
        m.d.comb += [small.logits_ready.eq(self.logits_ready), self.read_bank.eq(self.bank)]

        # Loading and storing: A, then B.
        m.d.comb += [A.restart.eq(self.restart), A.load.eq(self.a), A.data.eq(self.data), A.store.eq(self.store)]
        m.d.comb += small.store.eq(later(m, A.storing, 1) & ~A.storing)
        m.d.comb += [
            self.stored_valid.eq(A.stored_valid | small.stored_valid),
            self.stored_data.eq(Mux(A.storing, A.stored_data, small.stored_data)),
            A.stored_ready.eq(self.stored_ready),
            small.stored_ready.eq(self.stored_ready),
        ]

        self._walk(m, A)
        m.d.sync += self.saturated_parameters.eq(A.saturated + small.saturated_parameters)
        if self.trace:
            self._traces(m, A)
        return m

    def _walk(self, m: Module, A: ParameterMemory) -> None:
        """Requests to `Records`, and what follows them down the pipeline."""
        build, small, array = self.build, self.small, self.array
        rank, latency = build.rank, self.latency
        slots = sample_slots(build, self.c_latency)

        # Where it is: a slot of a sample forward, a sample of a chunk backward.
        down, slot, sample = Signal(), Signal(range(len(slots))), Signal(range(build.batch))
        chunk = Signal(range(build.chunks))
        last_sample = Signal.like(sample)
        m.d.sync += last_sample.eq(self.samples - 1)
        asking, slot_end, sample_end = Signal(), slot == len(slots) - 1, sample == last_sample
        chunk_end, finished = chunk == build.chunks - 1, Signal()
        with m.FSM() as fsm:
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [down.eq(0), slot.eq(0), sample.eq(0), chunk.eq(0), finished.eq(0)]
                m.next = "FORWARD"
            with m.State("FORWARD"):
                m.d.comb += asking.eq(1)
                m.d.sync += slot.eq(Mux(slot_end, 0, slot + 1))
                with m.If(slot_end):
                    m.d.sync += sample.eq(Mux(sample_end, 0, sample + 1))
                    with m.If(sample_end):
                        m.next = "LOSS"
            with m.State("LOSS"):
                with m.If(self.train & small.through):
                    m.d.comb += small.update.eq(1)
                    m.d.sync += down.eq(1)
                    m.next = "BACKWARD"
                with m.Elif(~self.train & small.answered):
                    m.next = "IDLE"
            with m.State("BACKWARD"):
                m.d.comb += asking.eq(1)
                m.d.sync += sample.eq(Mux(sample_end, 0, sample + 1))
                with m.If(sample_end):
                    m.d.sync += chunk.eq(chunk + 1)
                    with m.If(chunk_end):
                        m.next = "UPDATE"
            with m.State("UPDATE"), m.If(finished & small.updated):
                m.next = "IDLE"
        m.d.comb += [
            self.busy.eq(~fsm.ongoing("IDLE")),
            self.forward.eq(fsm.ongoing("FORWARD") | fsm.ongoing("LOSS")),
            self.backward.eq(fsm.ongoing("BACKWARD") | fsm.ongoing("UPDATE")),
        ]

        # The request, a cycle later: of the slot forward, of the chunk backward.
        chunk_bits = len(chunk)
        m.submodules.slots = slot_cells = memory.Memory(
            shape=unsigned(chunk_bits + 3),
            depth=len(slots),
            init=[(max(c, 0) << 3) | (c >= 0) << 2 | first << 1 | last for c, first, last in slots],
        )
        taps = [i for i, tap in enumerate(build.taps) for _ in range(tap.chunks)]
        m.submodules.taps = tap_cells = memory.Memory(shape=unsigned(8), depth=build.chunks, init=taps)
        slot_read, tap_read = slot_cells.read_port(), tap_cells.read_port()
        m.d.comb += [slot_read.addr.eq(slot), tap_read.addr.eq(chunk)]
        asked = later(m, asking, 1)
        valid = Mux(down, asked, asked & slot_read.data[2])
        first = Mux(down, later(m, sample == 0, 1), slot_read.data[1])
        last = valid & Mux(down, later(m, sample_end, 1), slot_read.data[0])
        final = last & down & later(m, chunk_end, 1)
        m.d.comb += self.chunk.eq(Mux(down, later(m, chunk, 1), slot_read.data[3:]))
        m.d.comb += self.sample.eq(later(m, sample, 1))

        # `latency` cycles later its operands are there, and ARRAY_LATENCY after those the sums.
        forward_row, backward_row = (later(m, self.chunk, latency - 1 + i) for i in (0, START_DELAY))
        m.d.comb += [
            A.address_0.eq(Mux(down, backward_row, forward_row)),
            small.u_sample.eq(later(m, self.sample, latency - 1)),
            small.u_tap.eq(later(m, tap_read.data, latency - 1)),
            array.valid.eq(later(m, valid, latency)),
            array.start.eq(later(m, first, latency)),
            array.update.eq(down),
            array.x.eq(self.values),
            array.a.eq(A.values_0),
            array.u.eq(small.u),
        ]
        m.d.comb += [
            array.capture.eq(later(m, last & ~down, latency + ARRAY_LATENCY - 1)),
            A.update.eq(later(m, last & down, latency + ARRAY_LATENCY)),
            A.row.eq(later(m, self.chunk, latency + ARRAY_LATENCY)),
            A.sums.eq(self.p),
        ]
        with m.If(later(m, final, latency + ARRAY_LATENCY + 1)):
            m.d.sync += finished.eq(1)

        # The sums of a tap leave the array rank by rank, while those of the next are made.
        leaving = Signal(rank)
        then = Cat(later(m, array.capture, 1), leaving)
        m.d.sync += leaving.eq(then)
        m.d.comb += array.shift.eq(then[: rank - 1].any() if rank > 1 else 0)
        most = (1 << (build.formats.width + PARAMETER_WIDTH - 2)) * max(tap.chunks for tap in build.taps)
        total, depth = tree(m, [head[: most.bit_length() + 1].as_signed() for head in self.lane_heads])
        half = 1 << (PARAMETER_FRACTION - 1)
        rounded = Signal.like(total + half, reset_less=True)
        h, cut = saturate(rounded >> PARAMETER_FRACTION, build.formats.width)
        there = later(m, leaving.any(), depth + 1)
        h_cut = Signal()
        m.d.sync += [rounded.eq(total + half), small.h.eq(h), small.h_valid.eq(there), h_cut.eq(cut & there)]
        m.d.comb += self.saturated_activations.eq(h_cut + small.saturated_activations)

    def _traces(self, m: Module, A: ParameterMemory) -> None:
        small, width = self.small, self.build.formats.width
        gathered = Signal(self.build.net.C * width)
        with m.If(small.y_valid):
            m.d.sync += gathered.eq(Cat(gathered[width:], small.y))
        m.d.sync += [self.trace_y_valid.eq(small.y_valid & small.y_last), self.trace_y_sample.eq(small.y_sample)]
        m.d.comb += self.trace_y.eq(gathered)
        m.d.comb += [self.trace_a_valid.eq(A.written), self.trace_a_chunk.eq(A.written_row)]
        m.d.comb += [self.trace_a.eq(A.written_values), self.trace_b_valid.eq(small.b_written)]
        m.d.comb += [self.trace_b_row.eq(small.b_row), self.trace_b.eq(small.b_values)]
