// Runs launches of the core under Verilator: DRAM behind two AXI4 ports, and the host on AXI4-Lite.
//
//   harness MEMORY BASE TRACE SEED LATENCY_LOW LATENCY_HIGH LIMIT FAULT LAUNCHES [OFFSET=VALUE …]
//
// MEMORY: file of what is in DRAM from address BASE on; what the core writes is in it afterwards. TRACE: prefix of files
// that trace ports are written to, or -. LIMIT: cycles after which it gives up. FAULT: 0, or the number of the burst
// (of both ports and directions, from 1) that is answered with an error. The registers are written in the order given;
// then CTRL, LAUNCHES times, each when the one before is done. Of the last launch, on stdout: `progress STEPS` now and
// then; at the end `register OFFSET VALUE` for all that can be read, and `cycles N`: from the write of CTRL to the first
// answer that says done. Every rule of AXI that the core breaks ends the run with `violation TEXT` and status 3; the
// LIMIT ends it with status 4.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>

#include "Vcore.h"
#include "verilated.h"

namespace {

constexpr uint64_t BEAT = 16;
constexpr uint64_t PAGE = 4096;
constexpr size_t OUTSTANDING = 16;  // bursts that a port accepts before it refuses
constexpr uint32_t STATUS = 0x04, STEPS = 0xA0, LAST_REGISTER = 0xAC;
constexpr int OKAY = 0, SLVERR = 2, DECERR = 3;

uint64_t now = 0;

[[noreturn]] void violation(const char *port, const char *text) {
    std::printf("violation %s in cycle %llu: %s\n", port, static_cast<unsigned long long>(now), text);
    std::fflush(stdout);
    std::_Exit(3);
}

// xorshift64*: the same run for the same seed everywhere.
struct Random {
    uint64_t state;
    uint64_t next() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * 0x2545F4914F6CDD1DULL;
    }
    uint64_t between(uint64_t low, uint64_t high) { return low + (next() >> 33) % (high - low + 1); }
    bool once_in(uint64_t n) { return (next() >> 33) % n == 0; }
};

struct Memory {
    uint8_t *data = nullptr;
    uint64_t base = 0, size = 0;

    void map(const char *path) {
        const int file = open(path, O_RDWR);
        struct stat info;
        if (file < 0 || fstat(file, &info) != 0) {
            std::perror(path);
            std::exit(2);
        }
        size = static_cast<uint64_t>(info.st_size);
        void *at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (at == MAP_FAILED) {
            std::perror(path);
            std::exit(2);
        }
        data = static_cast<uint8_t *>(at);
        close(file);
    }
    bool holds(uint64_t address) const { return address >= base && address - base + BEAT <= size; }
};

struct Burst {
    uint64_t address;
    uint32_t beats;
    uint64_t due;
    bool fault;
};

// The address channel's fields that must stand still while valid waits for ready.
struct Address {
    bool valid;
    uint64_t address;
    uint32_t length;
    bool operator==(const Address &o) const { return valid == o.valid && address == o.address && length == o.length; }
};

// One manager port of the core, seen by a memory: bursts are answered in order, each after its own latency.
struct Port {
    const char *name;
    Memory &memory;
    Random random;
    uint64_t low, high;
    uint64_t &bursts;
    uint64_t faulty;

    // What the memory drives.
    bool ar_ready = false, r_valid = false, r_last = false, aw_ready = false, w_ready = false, b_valid = false;
    int r_response = OKAY, b_response = OKAY;
    uint32_t r_data[4] = {};

    std::deque<Burst> reads, writes, answers;
    uint32_t read_beat = 0, write_beat = 0;
    int write_response = OKAY;
    Address ar_before{}, aw_before{};
    bool ar_waited = false, aw_waited = false, w_waited = false;
    uint32_t w_before[6] = {};

    bool idle() const { return reads.empty() && writes.empty() && answers.empty(); }

    void accept(std::deque<Burst> &queue, const Address &a, int size, int kind, const char *channel) {
        if (size != 4) violation(name, (std::string(channel) + " is not of 16 bytes a beat").c_str());
        if (kind != 1) violation(name, (std::string(channel) + " does not count upwards").c_str());
        if (a.address % BEAT) violation(name, (std::string(channel) + " is not aligned to a beat").c_str());
        const uint64_t bytes = (static_cast<uint64_t>(a.length) + 1) * BEAT;
        if (a.address / PAGE != (a.address + bytes - 1) / PAGE)
            violation(name, (std::string(channel) + " crosses 4 KiB").c_str());
        ++bursts;
        queue.push_back({a.address, a.length + 1, now + random.between(low, high), bursts == faulty});
    }

    // What was moved at this edge of the clock, and what the memory drives after it.
    void edge(Address ar, int ar_size, int ar_kind, bool r_ready, Address aw, int aw_size, int aw_kind, bool w_valid,
              const uint32_t *w_data, uint32_t w_strobe, bool w_last, bool b_ready) {
        // Payload stays until it is taken.
        if (ar_waited && !(ar == ar_before)) violation(name, "AR changed before it was taken");
        if (aw_waited && !(aw == aw_before)) violation(name, "AW changed before it was taken");
        uint32_t w_now[6] = {w_data[0], w_data[1], w_data[2], w_data[3], w_strobe, w_last};
        if (w_waited && (!w_valid || std::memcmp(w_now, w_before, sizeof w_now) != 0))
            violation(name, "W changed before it was taken");
        ar_waited = ar.valid && !ar_ready;
        aw_waited = aw.valid && !aw_ready;
        w_waited = w_valid && !w_ready;
        ar_before = ar;
        aw_before = aw;
        std::memcpy(w_before, w_now, sizeof w_now);

        if (r_valid && r_ready) {
            r_valid = false;
            if (++read_beat == reads.front().beats) {
                reads.pop_front();
                read_beat = 0;
            }
        }
        if (b_valid && b_ready) {
            b_valid = false;
            answers.pop_front();
        }
        if (w_valid && w_ready) {
            Burst &burst = writes.front();
            const uint64_t address = burst.address + write_beat * BEAT;
            if (w_last != (++write_beat == burst.beats)) violation(name, "WLAST is not on the last beat");
            if (!memory.holds(address)) {
                write_response = DECERR;
            } else {
                for (uint32_t i = 0; i < BEAT; ++i)
                    if (w_strobe >> i & 1) memory.data[address - memory.base + i] = static_cast<uint8_t>(w_data[i / 4] >> 8 * (i % 4));
            }
            if (w_last) {
                if (burst.fault) write_response = SLVERR;
                answers.push_back({static_cast<uint64_t>(write_response), 0, now + random.between(low, high), false});
                writes.pop_front();
                write_beat = 0;
                write_response = OKAY;
            }
        }
        if (ar.valid && ar_ready) accept(reads, ar, ar_size, ar_kind, "AR");
        if (aw.valid && aw_ready) accept(writes, aw, aw_size, aw_kind, "AW");

        ar_ready = reads.size() < OUTSTANDING && !random.once_in(4);
        aw_ready = writes.size() + answers.size() < OUTSTANDING && !random.once_in(4);
        w_ready = !writes.empty() && !random.once_in(8);
        if (!r_valid && !reads.empty() && reads.front().due <= now && !random.once_in(16)) {
            const Burst &burst = reads.front();
            const uint64_t address = burst.address + read_beat * BEAT;
            r_valid = true;
            r_last = read_beat + 1 == burst.beats;
            r_response = burst.fault ? SLVERR : OKAY;
            if (memory.holds(address)) {
                std::memcpy(r_data, memory.data + (address - memory.base), BEAT);
            } else {
                std::memset(r_data, 0xA5, BEAT);
                r_response = DECERR;
            }
        }
        if (!b_valid && !answers.empty() && answers.front().due <= now) {
            b_valid = true;
            b_response = static_cast<int>(answers.front().address);
        }
    }
};

// A trace port's value as little-endian bytes of its C++ type.
template <typename T> void append(FILE *file, const T &value) {
    if constexpr (std::is_arithmetic_v<T>)
        std::fwrite(&value, sizeof value, 1, file);
    else
        std::fwrite(value.data(), sizeof(EData), std::extent_v<decltype(T::m_storage)>, file);
}

struct Simulation {
    std::unique_ptr<VerilatedContext> context = std::make_unique<VerilatedContext>();
    std::unique_ptr<Vcore> core;
    Memory memory;
    uint64_t bursts = 0;
    std::vector<Port> ports;
    FILE *trace_y = nullptr, *trace_a = nullptr, *trace_b = nullptr;

    // Drive, settle, look, tick.
    template <typename Look> void cycle(Look look) {
        Vcore &c = *core;
#define DRIVE(n)                                                                                                       \
    c.m_axi_gmem##n##_arready = ports[n].ar_ready;                                                                     \
    c.m_axi_gmem##n##_rvalid = ports[n].r_valid;                                                                       \
    c.m_axi_gmem##n##_rlast = ports[n].r_last;                                                                         \
    c.m_axi_gmem##n##_rresp = static_cast<CData>(ports[n].r_response);                                                 \
    for (int i = 0; i < 4; ++i) c.m_axi_gmem##n##_rdata[i] = ports[n].r_data[i];                                       \
    c.m_axi_gmem##n##_awready = ports[n].aw_ready;                                                                     \
    c.m_axi_gmem##n##_wready = ports[n].w_ready;                                                                       \
    c.m_axi_gmem##n##_bvalid = ports[n].b_valid;                                                                       \
    c.m_axi_gmem##n##_bresp = static_cast<CData>(ports[n].b_response);
        DRIVE(0)
        DRIVE(1)
        c.ap_clk = 0;
        c.eval();
#define LOOK(n)                                                                                                        \
    ports[n].edge({c.m_axi_gmem##n##_arvalid != 0, c.m_axi_gmem##n##_araddr, c.m_axi_gmem##n##_arlen},                 \
                  c.m_axi_gmem##n##_arsize, c.m_axi_gmem##n##_arburst, c.m_axi_gmem##n##_rready,                       \
                  {c.m_axi_gmem##n##_awvalid != 0, c.m_axi_gmem##n##_awaddr, c.m_axi_gmem##n##_awlen},                 \
                  c.m_axi_gmem##n##_awsize, c.m_axi_gmem##n##_awburst, c.m_axi_gmem##n##_wvalid != 0,                  \
                  c.m_axi_gmem##n##_wdata.data(), c.m_axi_gmem##n##_wstrb, c.m_axi_gmem##n##_wlast != 0,               \
                  c.m_axi_gmem##n##_bready != 0);
        if (c.ap_rst_n) {
            LOOK(0)
            LOOK(1)
#ifdef TRACE
            if (trace_y && c.trace_y_valid) {
                append(trace_y, c.trace_y_sample);
                append(trace_y, c.trace_y);
            }
            if (trace_a && c.trace_a_valid) {
                append(trace_a, c.trace_a_chunk);
                append(trace_a, c.trace_a);
            }
            if (trace_b && c.trace_b_valid) {
                append(trace_b, c.trace_b_row);
                append(trace_b, c.trace_b);
            }
#endif
        }
        look();
        c.ap_clk = 1;
        c.eval();
        ++now;
    }
    void cycle() {
        cycle([] {});
    }

    // The host holds its side still until the core takes it; no answer in 1,000 cycles is a fault of the core.
    template <typename Done, typename Offer> void until(Done done, const char *what, Offer offer) {
        for (int i = 0; i < 1000; ++i) {
            bool over = false;
            offer();
            cycle([&] { over = done(); });
            if (over) return;
        }
        violation("s_axi_control", what);
    }

    template <typename Done> void until(Done done, const char *what) {
        until(done, what, [] {});
    }

    void write(uint32_t offset, uint32_t value) {
        Vcore &c = *core;
        c.s_axi_control_awaddr = offset;
        c.s_axi_control_wdata = value;
        c.s_axi_control_wstrb = 15;
        c.s_axi_control_bready = 1;
        bool address = false, data = false;  // what was taken is not offered again
        until(
            [&] {
                address = address || c.s_axi_control_awready;
                data = data || c.s_axi_control_wready;
                return address && data;
            },
            "a write is not taken", [&] {
                c.s_axi_control_awvalid = !address;
                c.s_axi_control_wvalid = !data;
            });
        c.s_axi_control_awvalid = c.s_axi_control_wvalid = 0;
        until([&] { return c.s_axi_control_bvalid != 0; }, "a write is not answered");
        c.s_axi_control_bready = 0;
    }

    uint32_t read(uint32_t offset) {
        Vcore &c = *core;
        c.s_axi_control_araddr = offset;
        c.s_axi_control_arvalid = 1;
        until([&] { return c.s_axi_control_arready != 0; }, "a read is not taken");
        c.s_axi_control_arvalid = 0;
        c.s_axi_control_rready = 1;
        uint32_t value = 0;
        until(
            [&] {
                value = c.s_axi_control_rdata;
                return c.s_axi_control_rvalid != 0;
            },
            "a read is not answered");
        c.s_axi_control_rready = 0;
        return value;
    }
};

FILE *create(const std::string &path) {
    FILE *file = std::fopen(path.c_str(), "wb");
    if (!file) {
        std::perror(path.c_str());
        std::exit(2);
    }
    return file;
}

}  // namespace

int main(int count, char **arguments) {
    if (count < 10) {
        std::fprintf(stderr, "usage: harness MEMORY BASE TRACE SEED LATENCY_LOW LATENCY_HIGH LIMIT FAULT LAUNCHES [OFFSET=VALUE …]\n");
        return 2;
    }
    Simulation s;
    s.memory.map(arguments[1]);
    s.memory.base = std::strtoull(arguments[2], nullptr, 0);
    const std::string trace = arguments[3];
    const uint64_t seed = std::strtoull(arguments[4], nullptr, 0);
    const uint64_t low = std::strtoull(arguments[5], nullptr, 0), high = std::strtoull(arguments[6], nullptr, 0);
    const uint64_t limit = std::strtoull(arguments[7], nullptr, 0), fault = std::strtoull(arguments[8], nullptr, 0);
    s.ports.reserve(2);
    for (uint64_t n = 0; n < 2; ++n)
        s.ports.push_back(Port{n ? "m_axi_gmem1" : "m_axi_gmem0", s.memory, Random{0x9E3779B97F4A7C15ULL + 2 * seed + n}, low,
                               high, s.bursts, fault});
    if (trace != "-") {
        s.trace_y = create(trace + "y");
        s.trace_a = create(trace + "a");
        s.trace_b = create(trace + "b");
    }
    s.core = std::make_unique<Vcore>(s.context.get());
    s.core->ap_rst_n = 0;
    for (int i = 0; i < 16; ++i) s.cycle();
    s.core->ap_rst_n = 1;
    for (int i = 0; i < 4; ++i) s.cycle();

    for (int i = 10; i < count; ++i) {
        char *value = nullptr;
        const auto offset = static_cast<uint32_t>(std::strtoul(arguments[i], &value, 0));
        s.write(offset, static_cast<uint32_t>(std::strtoul(value + 1, nullptr, 0)));
    }
    uint64_t began = 0;
    for (uint64_t launches = std::strtoull(arguments[9], nullptr, 0); launches; --launches) {
        s.write(0x00, 1);
        began = now;
        for (uint64_t told = now; !(s.read(STATUS) & 2);) {
            if (now - began > limit) {
                std::printf("violation the core in cycle %llu: it does not finish\n", static_cast<unsigned long long>(now));
                return 4;
            }
            if (now - told >= 1 << 15) {
                told = now;
                std::printf("progress %u\n", s.read(STEPS));
                std::fflush(stdout);
            }
        }
    }
    std::printf("cycles %llu\n", static_cast<unsigned long long>(now - began));
    for (uint32_t offset = 0; offset <= LAST_REGISTER; offset += 4)
        std::printf("register %u %u\n", offset, s.read(offset));
    for (int i = 0; i < 1000; ++i) s.cycle();
    for (const Port &port : s.ports)
        if (!port.idle()) violation(port.name, "a transfer is left when the core is done");
    for (FILE *file : {s.trace_y, s.trace_a, s.trace_b})
        if (file) std::fclose(file);
    s.core->final();
    return 0;
}
