"""The whole core: a launch loads parameters, fills the cache, trains or predicts, stores (docs/hardware.md §7, §8)."""

from __future__ import annotations

from enum import IntEnum

from amaranth import Array, Cat, ClockDomain, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..configs import BLOCK, Styles
from ..image import MAX_EPOCHS, SATURATIONS
from ..layout import BEAT, CHANNELS, Build
from .adapters import Adapters
from .array import LaneArray
from .axi import COUNTERS, Control, Lite, ReadChannel, Reader, SkidBuffer, WriteChannel, Writer
from .backbone import Backbone
from .fetch import ORDER_LENGTH, Fetch, Product
from .quantise import Quantise
from .records import C_LATENCY, LATENCY, Records

__all__ = ["Core", "Error"]

LOADED = 8
"""Cycles from the last beat of PARAMS until every unit has it in its memory."""

CHECKED = 3
"""Cycles from the start until the registers are known to be right or wrong."""

DRAINED = 8
"""Cycles of quiet on both ports before an error is told."""

THROUGH = 7
"""The step of a phase that is through."""


class Error(IntEnum):
    """What STATUS says (§8)."""

    NONE = 0
    READ = 1
    WRITE = 2
    CONFIGURATION = 3
    ORDER = 4


class Phase(IntEnum):
    """Of a launch."""

    IDLE = 0
    CHECK = 1
    SIZE = 2
    LOAD = 3
    FILL = 4
    TRAIN = 5
    STORE = 6
    DRAIN = 7


class Core(wiring.Component):
    """The top level, called ``core``.

    Args:
        build: what it is made for.
        styles: what its memories are made of.
        trace: with the trace ports of a simulation.
    """

    def __init__(self, build: Build, styles: Styles = BLOCK, trace: bool = False) -> None:
        self.build, self.styles, self.trace = build, styles, trace
        ports = {"ap_clk": In(1), "ap_rst_n": In(1)}
        for prefix, signature in (
            ("s_axi_control", Lite().flip()),
            ("m_axi_gmem0", ReadChannel()),
            ("m_axi_gmem0", WriteChannel()),
            ("m_axi_gmem1", ReadChannel()),
            ("m_axi_gmem1", WriteChannel()),
        ):
            ports |= {f"{prefix}_{name}": member for name, member in signature.members.items()}
        if trace:
            ports |= {
                "trace_y_valid": Out(1),
                "trace_y_sample": Out(8),
                "trace_y": Out(CHANNELS * build.formats.width),
                "trace_a_valid": Out(1),
                "trace_a_chunk": Out(16),
                "trace_a": Out(16 * build.lanes * build.rank),
                "trace_b_valid": Out(1),
                "trace_b_row": Out(16),
                "trace_b": Out(16 * CHANNELS),
            }
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        build = self.build
        m.domains.sync = clock = ClockDomain()
        m.d.comb += [clock.clk.eq(self.ap_clk), clock.rst.eq(~self.ap_rst_n)]

        self.phase = Signal(Phase)
        self.step = Signal(3)
        self.fresh, self.abort = Signal(), Signal()  # a launch begins; an error is over and every unit starts anew
        self.error = Signal(8)
        self.flush = Signal()
        m.submodules.control = self.control = Control(build.id)
        m.submodules.reader0 = self.reader0 = Reader()
        m.submodules.reader1 = self.reader1 = Reader()
        m.submodules.writer = self.writer = Writer()
        self.outward = SkidBuffer(8 * BEAT)  # between whoever writes and the writer: two ways cut short
        styles = self.styles
        self.fetch, self.records = Fetch(build), Records(build, styles.records)
        self.adapters = Adapters(build, LATENCY, C_LATENCY, styles.a, self.trace)
        self.backbone = Backbone(build, styles.weights, styles.activations, styles.pixels)
        self.quantise, self.array = Quantise(build, styles.entries), LaneArray(build)
        m.submodules.fetch = ResetInserter(self.fresh)(self.fetch)
        for name in ("outward", "records", "adapters", "backbone", "quantise", "array"):
            m.submodules[name] = ResetInserter(self.abort)(getattr(self, name))

        self._join(m, "s_axi_control", self.control.bus)
        self._join(m, "m_axi_gmem0", self.reader0.bus)
        self._join(m, "m_axi_gmem0", self.writer.bus)
        self._join(m, "m_axi_gmem1", self.reader1.bus)
        if self.trace:
            names = [f"{what}{part}" for what in ("trace_y", "trace_a", "trace_b") for part in ("", "_valid")]
            for name in (*names, "trace_y_sample", "trace_a_chunk", "trace_b_row"):
                m.d.comb += getattr(self, name).eq(getattr(self.adapters, name))
        self._units(m)
        self._launch(m)
        self._count(m)
        return m

    def _join(self, m: Module, prefix: str, bus: wiring.PureInterface) -> None:
        for name in bus.signature.members:
            outer, inner = getattr(self, f"{prefix}_{name}"), getattr(bus, name)
            outward = self.signature.members[f"{prefix}_{name}"].flow is Out
            m.d.comb += outer.eq(inner) if outward else inner.eq(outer)

    # -- what is joined to what, whatever the phase

    def _units(self, m: Module) -> None:
        control, adapters, records, fetch = self.control, self.adapters, self.records, self.fetch
        wiring.connect(m, self.backbone.array, self.array.backbone)
        wiring.connect(m, adapters.array, self.array.adapters)
        wiring.connect(m, self.backbone.results, self.quantise.results)
        m.d.sync += self.array.select.eq(self.phase == Phase.FILL)
        m.d.comb += [
            self.writer.valid.eq(self.outward.out_valid),
            self.writer.data.eq(self.outward.out_data),
            self.outward.out_ready.eq(self.writer.ready),
            self.backbone.heads.eq(self.array.sample_heads),
            adapters.p.eq(self.array.p),
            adapters.lane_heads.eq(self.array.lane_heads),
            *(
                getattr(records, name).eq(getattr(adapters, name))
                for name in ("read_bank", "sample", "chunk", "c_sample", "c_class", "label_sample")
            ),
            adapters.values.eq(records.values),
            adapters.c.eq(records.c),
            adapters.class_of.eq(records.class_of),
            records.bank.eq(fetch.bank),
            records.restart.eq(fetch.restart),
            records.label_valid.eq(fetch.label_valid),
            records.label.eq(fetch.label),
            adapters.gain.eq(control.gain),
            adapters.train.eq(control.mode[2]),
            fetch.samples.eq(control.samples),
            fetch.epochs.eq(control.epochs),
            fetch.batch.eq(control.batch),
            fetch.order.eq(control.order),
            fetch.cache.eq(control.cache),
            fetch.x0.eq(control.x0),
            self.reader0.flush.eq(self.flush),
            self.reader1.flush.eq(self.flush),
            self.writer.flush.eq(self.flush),
        ]

    # -- the launch

    def _launch(self, m: Module) -> None:
        control, phase = self.control, self.phase
        load, fill, train, store, predict = control.mode
        self.busy, self.done = Signal(), Signal()
        m.d.comb += [control.busy.eq(self.busy), control.done.eq(self.done), control.error.eq(self.error)]
        m.d.comb += self.busy.eq(phase != Phase.IDLE)
        m.d.sync += self.flush.eq(phase == Phase.DRAIN)
        m.d.comb += [self.fresh.eq((phase == Phase.CHECK) | self.abort)]

        wrong = self._wrong(m)
        self._size(m)
        asked = {Phase.LOAD: load, Phase.FILL: fill, Phase.TRAIN: train | predict, Phase.STORE: store}
        self.running = Signal(len(asked))  # which of these it is at, from a phase's second cycle on
        m.d.sync += self.running.eq(Cat((phase == p) & wanted for p, wanted in asked.items()))
        through = self.step == THROUGH
        with m.Switch(phase):
            with m.Case(Phase.IDLE), m.If(control.start):
                m.d.sync += [self.done.eq(0), self.error.eq(Error.NONE)]
                self._go(m, Phase.CHECK)
            with m.Case(Phase.CHECK):
                m.d.sync += self.step.eq(self.step + 1)
                with m.If(self.step == CHECKED):
                    self._go(m, Phase.SIZE)
                    with m.If(wrong):
                        m.d.sync += [self.done.eq(1), self.error.eq(Error.CONFIGURATION)]
                        self._go(m, Phase.IDLE)
            with m.Case(Phase.SIZE), m.If(through):
                self._go(m, Phase.LOAD)
            for (p, wanted), then in zip(asked.items(), (*list(asked)[1:], Phase.IDLE), strict=True):
                with m.Case(p), m.If(~wanted | through):
                    if then == Phase.IDLE:
                        m.d.sync += self.done.eq(1)
                    self._go(m, then)
        for part, active in zip((self._load, self._fill, self._train, self._store), self.running, strict=True):
            part(m, active)

        # Errors come before everything above; one in the last answer of a launch comes while its last phase is through.
        bad_read, failed, code = self.reader0.error | self.reader1.error, Signal(), Signal.like(self.error)
        m.d.sync += [
            failed.eq(bad_read | self.writer.error | self.fetch.bad),
            code.eq(Mux(bad_read, Error.READ, Mux(self.writer.error, Error.WRITE, Error.ORDER))),
        ]
        with m.If(failed & (phase != Phase.IDLE) & (phase != Phase.DRAIN)):
            m.d.sync += [self.error.eq(code), self.done.eq(0)]
            self._go(m, Phase.DRAIN)
        quiet = Signal(range(DRAINED + 1))
        with m.If(phase == Phase.DRAIN):
            idle = self.reader0.idle & self.reader1.idle & self.writer.idle
            m.d.sync += quiet.eq(Mux(idle, quiet + 1, 0))
            with m.If(quiet == DRAINED):
                m.d.comb += self.abort.eq(1)
                m.d.sync += [self.done.eq(1), quiet.eq(0)]
                self._go(m, Phase.IDLE)

    def _go(self, m: Module, phase: Phase) -> None:
        m.d.sync += [self.phase.eq(phase), self.step.eq(0), self.running.eq(0)]

    def _wrong(self, m: Module) -> Value:
        """Whether the registers ask for what cannot be (two cycles after they are there)."""
        control = self.control
        addresses = (control.params, control.x0, control.cache, control.order, control.out, control.logits)
        faults = Signal(6)
        wrong = Signal()
        m.d.sync += [
            faults.eq(
                Cat(
                    control.samples == 0,
                    control.batch == 0,
                    control.batch > self.build.batch,
                    (control.epochs == 0) | (control.epochs >= MAX_EPOCHS),
                    Cat(a[: (BEAT - 1).bit_length()] for a in addresses).any(),
                    control.mode[2] & control.mode[4],
                )
            ),
            wrong.eq(faults.any()),
        ]
        return wrong

    def _size(self, m: Module) -> None:
        """How many beats the cache, X0 and ORDER have: three products, one after the other."""
        build, control = self.build, self.control
        m.submodules.product = product = Product(24, 16)
        self.cache_beats, self.x0_beats = (Signal(ORDER_LENGTH, name=n) for n in ("cache_beats", "x0_beats"))
        words = Signal(ORDER_LENGTH + 1)
        going = Signal()
        m.d.comb += [
            product.a.eq(control.samples),
            product.b.eq(Array([build.entry_beats, build.input_beats, control.epochs])[self.step]),
            product.start.eq((self.phase == Phase.SIZE) & ~going & (self.step != THROUGH)),
            self.fetch.order_beats.eq((words + 3) >> 2),
        ]
        with m.If(product.start):
            m.d.sync += going.eq(1)
        with m.Elif(going & ~product.busy):
            m.d.sync += [going.eq(0), self.step.eq(self.step + 1)]
            with m.Switch(self.step):
                for i, size in enumerate((self.cache_beats, self.x0_beats, words)):
                    with m.Case(i):
                        m.d.sync += size.eq(product.result)
            with m.If(self.step == 2):
                m.d.sync += self.step.eq(THROUGH)

    def _load(self, m: Module, active: Value) -> None:
        """PARAMS, section by section, a strobe for each."""
        build, step, reader = self.build, self.step, self.reader0
        sections = (2 * build.weight_words, 2 * build.bias_words, build.a_beats, build.b_beats, 4)
        section, left = Signal(range(len(sections))), Signal(range(max(sections) + 1))
        strobes, data = Signal(len(sections)), Signal(8 * BEAT, reset_less=True)
        restart = Signal()
        m.d.sync += [data.eq(reader.data), strobes.eq(0), restart.eq(0)]
        for unit in (self.backbone, self.adapters):
            m.d.comb += [unit.restart.eq(restart), unit.data.eq(data)]
        m.d.comb += [
            Cat(
                self.backbone.weights, self.backbone.biases, self.adapters.a, self.adapters.b, self.adapters.bias
            ).eq(strobes)
        ]  # fmt: skip
        settle = Signal(range(LOADED + 1))
        with m.If(active), m.Switch(step):
            with m.Case(0):
                m.d.comb += [
                    reader.command.valid.eq(1),
                    reader.command.address.eq(self.control.params),
                    reader.command.beats.eq(build.parameter_beats),
                ]
                m.d.sync += [section.eq(0), left.eq(sections[0]), settle.eq(LOADED)]
                with m.If(reader.command.ready):
                    m.d.sync += [restart.eq(1), step.eq(1)]
            with m.Case(1):
                m.d.comb += reader.ready.eq(1)
                with m.If(reader.valid):
                    m.d.sync += [strobes.eq(1 << section), left.eq(left - 1)]
                    with m.If(left == 1):
                        m.d.sync += [section.eq(section + 1), left.eq(Array([*sections[1:], 0])[section])]
                        with m.If(section == len(sections) - 1):
                            m.d.sync += step.eq(2)
            with m.Case(2):
                m.d.sync += settle.eq(settle - 1)
                with m.If(settle == 0):
                    m.d.sync += step.eq(THROUGH)

    def _fill(self, m: Module, active: Value) -> None:
        """The cache: one read of all rows, one write of all entries, group after group of S samples in between."""
        build, step, reader, writer = self.build, self.step, self.reader1, self.writer
        backbone, quantise, control = self.backbone, self.quantise, self.control
        left, samples = Signal(24), Signal(range(build.samples + 1))
        start, asked = Signal(), Signal(2)
        m.d.sync += start.eq(0)
        m.d.comb += [
            backbone.start.eq(start),
            backbone.samples.eq(samples),
            backbone.x_data.eq(reader.data),
            quantise.start.eq(start),
            quantise.samples.eq(samples),
        ]
        with m.If(~active):
            m.d.sync += asked.eq(0)
        with m.Else():
            m.d.comb += [
                backbone.x_valid.eq(reader.valid),
                reader.ready.eq(backbone.x_ready),
                self.outward.in_valid.eq(quantise.entry_valid),
                self.outward.in_data.eq(quantise.entry_data),
                quantise.entry_ready.eq(self.outward.in_ready),
            ]
            with m.Switch(step):
                with m.Case(0):
                    m.d.comb += [
                        reader.command.valid.eq(~asked[0]),
                        reader.command.address.eq(control.x0),
                        reader.command.beats.eq(self.x0_beats),
                        writer.command.valid.eq(~asked[1]),
                        writer.command.address.eq(control.cache),
                        writer.command.beats.eq(self.cache_beats),
                    ]
                    m.d.sync += [asked.eq(asked | Cat(reader.command.ready, writer.command.ready))]
                    m.d.sync += left.eq(control.samples)
                    with m.If(asked.all()):
                        m.d.sync += [step.eq(1), asked.eq(0)]
                with m.Case(1):
                    last = left <= build.samples
                    m.d.sync += [
                        start.eq(1),
                        samples.eq(Mux(last, left, build.samples)),
                        left.eq(Mux(last, 0, left - build.samples)),
                        step.eq(2),
                    ]
                with m.Case(2):  # `start` is there
                    m.d.sync += step.eq(3)
                with m.Case(3), m.If(~backbone.busy):  # the entries leave while the next group is computed
                    m.d.sync += step.eq(Mux(left == 0, 4, 1))
                with m.Case(4), m.If(~quantise.busy & writer.idle):
                    m.d.sync += step.eq(THROUGH)

    def _train(self, m: Module, active: Value) -> None:
        """Batch after batch as `fetch` has them ready; for a prediction their logits are written."""
        build, step, control, fetch = self.build, self.step, self.control, self.fetch
        adapters, records, writer = self.adapters, self.records, self.writer
        reader0, reader1 = self.reader0, self.reader1
        predict = control.mode[4]
        bank, start, begun = Signal(), Signal(), Signal()
        samples, ends_run = Signal(range(build.batch + 1)), Signal()
        at = Signal.like(control.logits)
        eta = Signal.like(control.eta)
        full, ends_epoch, last = Signal(), Signal(), Signal()
        count = Signal.like(fetch.count_0)
        self.stepped = Signal()
        m.d.sync += [start.eq(0), begun.eq(active)]
        m.d.comb += [
            fetch.start.eq(active & ~begun),
            adapters.bank.eq(bank),
            adapters.start.eq(start),
            adapters.samples.eq(samples),
            adapters.eta.eq(eta),
            records.x_data.eq(reader1.data),
            records.entry_data.eq(reader0.data),
            fetch.order_data.eq(reader1.data),
            full.eq(fetch.full.bit_select(bank, 1)),
            count.eq(Mux(bank, fetch.count_1, fetch.count_0)),
            ends_epoch.eq(Mux(bank, fetch.ends_epoch_1, fetch.ends_epoch_0)),
            last.eq(Mux(bank, fetch.ends_run_1, fetch.ends_run_0)),
        ]
        with m.If(active):
            m.d.comb += [
                records.x_valid.eq(reader1.valid & ~reader1.tag),
                fetch.order_valid.eq(reader1.valid & reader1.tag),
                reader1.ready.eq(records.x_ready | reader1.tag),
                fetch.input_done.eq(reader1.valid & reader1.ready & reader1.last & ~reader1.tag),
                records.entry_valid.eq(reader0.valid),
                reader0.ready.eq(records.entry_ready),
                fetch.entry_done.eq(reader0.valid & reader0.ready & reader0.last),
                reader0.command.valid.eq(fetch.entries.valid),
                reader0.command.address.eq(fetch.entries.address),
                reader0.command.beats.eq(fetch.entries.beats),
                fetch.entries.ready.eq(reader0.command.ready),
                reader1.command.valid.eq(fetch.inputs.valid),
                reader1.command.address.eq(fetch.inputs.address),
                reader1.command.beats.eq(fetch.inputs.beats),
                reader1.tag_in.eq(fetch.inputs_tag),
                fetch.inputs.ready.eq(reader1.command.ready),
                self.outward.in_valid.eq(adapters.logits_valid),
                self.outward.in_data.eq(adapters.logits_data),
                adapters.logits_ready.eq(self.outward.in_ready),
            ]
            with m.If(~begun):
                m.d.sync += [bank.eq(0), at.eq(control.logits)]
            with m.Switch(step):
                with m.Case(0), m.If(full & begun):
                    m.d.sync += [
                        start.eq(1),
                        samples.eq(count),
                        ends_run.eq(last),
                        eta.eq(Mux(ends_epoch, control.eta_last, control.eta)),
                        step.eq(1),
                    ]
                with m.Case(1):  # `start` is there, for the first cycle of perhaps many
                    m.d.comb += [
                        writer.command.valid.eq(predict),
                        writer.command.address.eq(at),
                        writer.command.beats.eq(samples << 2),
                    ]
                    with m.If(~predict | writer.command.ready):
                        m.d.sync += [step.eq(2), at.eq(at + (samples << 6))]
                with m.Case(2), m.If(~adapters.busy):
                    m.d.comb += [fetch.release.eq(1 << bank), self.stepped.eq(1)]
                    m.d.sync += [bank.eq(~bank), step.eq(Mux(ends_run, 3, 0))]
                with m.Case(3), m.If(writer.idle):
                    m.d.sync += step.eq(THROUGH)

    def _store(self, m: Module, active: Value) -> None:
        build, step, writer, adapters = self.build, self.step, self.writer, self.adapters
        with m.If(active):
            m.d.comb += [
                self.outward.in_valid.eq(adapters.stored_valid),
                self.outward.in_data.eq(adapters.stored_data),
                adapters.stored_ready.eq(self.outward.in_ready),
            ]
            with m.Switch(step):
                with m.Case(0):
                    m.d.comb += [
                        writer.command.valid.eq(1),
                        writer.command.address.eq(self.control.out),
                        writer.command.beats.eq(build.a_beats + build.b_beats),
                    ]
                    with m.If(writer.command.ready):
                        m.d.comb += adapters.store.eq(1)
                        m.d.sync += step.eq(1)
                with m.Case(1), m.If(writer.idle):
                    m.d.sync += step.eq(THROUGH)

    def _count(self, m: Module) -> None:
        """Cycles and saturations since the start of the launch."""
        phase, control, adapters = self.phase, self.control, self.adapters
        computing = self.backbone.busy & ~self.backbone.results.ready
        events = {
            "total": phase != Phase.IDLE,
            "load": phase == Phase.LOAD,
            "fill": (phase == Phase.FILL) & computing,
            "quantise": (phase == Phase.FILL) & ~computing,
            "forward": adapters.forward,
            "backward": adapters.backward,
            "store": phase == Phase.STORE,
            "waiting": (phase == Phase.TRAIN) & ~adapters.busy,
            "steps": self.stepped,
            "activations": self.backbone.saturated + adapters.saturated_activations,
            "gradients": adapters.saturated_gradients,
            "parameters": adapters.saturated_parameters,
        }
        begin = (phase == Phase.IDLE) & control.start
        for name in COUNTERS + SATURATIONS:
            more = Signal(Value.cast(events[name]).shape(), name=f"more_{name}")
            count = Signal(32, name=f"count_{name}")
            m.d.sync += [more.eq(events[name]), count.eq(count + more)]
            with m.If(begin):
                m.d.sync += count.eq(0)
            m.d.comb += getattr(control, name).eq(count)
