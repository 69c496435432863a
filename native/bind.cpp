// The Python binding: arrays in, arrays out. No loop over samples and no arithmetic; engine/native.py checks shapes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "instantft.h"

namespace nb = nanobind;

template <typename T> using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

static void need(bool ok, const char *what) {
    if (!ok) throw std::invalid_argument(what);
}

struct Plan {
    ift_plan plan;
    std::vector<int64_t> memory;
    ift_codec codec;

    Plan(Array<const int32_t> layers, std::tuple<int, int, int> input, int rank, int batch, int codec_id) {
        need(layers.ndim() == 2 && layers.shape(1) == sizeof(ift_layer_desc) / 4, "layers must be (L, 10)");
        const int32_t shape[3] = {std::get<0>(input), std::get<1>(input), std::get<2>(input)};
        int status = ift_plan_init(&plan, reinterpret_cast<const ift_layer_desc *>(layers.data()),
                                   static_cast<int32_t>(layers.shape(0)), shape, rank, batch);
        need(status == IFT_OK, "the core refused this network, rank or batch size");
        memory.resize(static_cast<size_t>(ift_codec_memory(&plan, codec_id)) / sizeof(int64_t) + 1);
        need(ift_codec_init(&codec, &plan, codec_id, memory.data()) == IFT_OK, "no such codec");
    }
};

using Tensor = std::tuple<int, int, int64_t, int, int, int>;

static std::vector<Tensor> tensors(const Plan &p) {
    std::vector<Tensor> all;
    for (int k = 0; k < p.plan.L; k++)
        for (int r = 0; r < IFT_ROLES; r++) {
            const ift_tensor &t = p.plan.layer[k].t[r];
            if (t.rows) all.emplace_back(k, r, t.offset, t.rows, t.cols, t.pitch);
        }
    return all;
}

struct Core {
    const ift_core *core;
    explicit Core(const std::string &name) : core(ift_core_named(name.c_str())) {
        need(core != nullptr, "no such instruction set here");
    }
};

static std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (int i = 0; ift_core_at(i); i++) names.emplace_back(ift_core_at(i)->name);
    return names;
}

static void need_buffers(const Plan &p, const Array<const float> &frozen, const Array<const float> &x,
                         const Array<float> &ws) {
    need(frozen.size() >= static_cast<size_t>(p.plan.params), "parameters too small for the plan");
    need(ws.size() >= static_cast<size_t>(p.plan.workspace), "workspace too small for the plan");
    need(x.ndim() == 2 && x.shape(1) >= static_cast<size_t>(ift_pad(p.plan.input_width)), "samples must be padded rows");
}

// The closed form's algebra in float or double. Rows of x may lie apart, so that records are read where they are.
template <typename T> using Rows = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <typename T> using Square = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T> static void need_square(const Square<T> &a, size_t n, const Array<uint8_t> &ws) {
    need(a.shape(0) == n && a.shape(1) == n, "a square matrix of that size is needed");
    need(ws.size() >= IFT_DENSE_BYTES && reinterpret_cast<uintptr_t>(ws.data()) % 64 == 0, "workspace too small");
}

template <typename T, typename F> static auto gram(F function) {
    return [function](const Core &c, Rows<const T> x, int64_t first, int64_t last, bool add, Square<T> g,
                      Array<uint8_t> ws) {
        need_square(g, x.shape(0), ws);
        need(x.stride(1) == 1 || x.shape(1) <= 1, "values of a row must lie side by side");
        need(0 <= first && first <= last && last <= static_cast<int64_t>(x.shape(0)), "rows must be there");
        nb::gil_scoped_release release;
        (c.core->*function)(x.data(), x.stride(0), static_cast<int64_t>(x.shape(1)), first, last, add, g.data(),
                            static_cast<int64_t>(g.shape(0)), ws.data());
    };
}

template <typename T, typename F> static auto inverse_factor(F function) {
    return [function](const Core &c, Square<T> g, Square<T> v, Array<uint8_t> ws) {
        need_square(g, g.shape(0), ws);
        need_square(v, g.shape(0), ws);
        int64_t n = static_cast<int64_t>(g.shape(0));
        nb::gil_scoped_release release;
        return (c.core->*function)(g.data(), n, v.data(), n, n, ws.data());
    };
}

template <typename T, typename F> static auto inverse_blocks(F function) {
    return [function](const Core &c, Square<const T> v, Array<const int64_t> starts, Array<T> out, Array<uint8_t> ws) {
        need_square(v, v.shape(0), ws);
        int64_t n = static_cast<int64_t>(v.shape(0)), cells = 0;
        need(starts.size() > 0 && starts.data()[0] >= 0, "blocks must start inside the matrix");
        for (size_t b = 1; b < starts.size(); b++) {
            int64_t m = starts.data()[b] - starts.data()[b - 1];
            need(m >= 0 && starts.data()[b] <= n, "blocks must be in order and inside the matrix");
            cells += m * m;
        }
        need(static_cast<int64_t>(out.size()) >= cells, "blocks need more room");
        nb::gil_scoped_release release;
        (c.core->*function)(v.data(), n, n, starts.data(), static_cast<int64_t>(starts.size()) - 1, out.data(),
                            ws.data());
    };
}

template <typename T, typename F> static auto combine(F function) {
    return [function](const Core &c, const std::vector<Square<const T>> &parts, Array<const T> w,
                      Array<const int64_t> rows, Array<const T> d, Array<const T> one, Square<T> g) {
        size_t n = g.shape(0), all = parts.empty() ? n : parts[0].shape(0);
        need(g.shape(1) == n && d.size() == n && one.size() == n && w.size() == parts.size(), "sizes must agree");
        std::vector<const T *> part;
        for (const auto &p : parts) {
            need(p.shape(0) == all && p.shape(1) == all, "parts must be square matrices of one size");
            part.push_back(p.data());
        }
        need(rows.size() == n || (rows.size() == 0 && all == n), "rows must be all of them, or as many as are wanted");
        for (size_t i = 0; i < rows.size(); i++)
            need(rows.data()[i] >= 0 && static_cast<size_t>(rows.data()[i]) < all, "rows must be there");
        nb::gil_scoped_release release;
        (c.core->*function)(part.data(), w.data(), static_cast<int64_t>(part.size()), static_cast<int64_t>(all),
                            rows.size() ? rows.data() : nullptr, d.data(), one.data(), static_cast<int64_t>(n),
                            g.data(), static_cast<int64_t>(n));
    };
}

static auto exact(const char *name) { return nb::arg(name).noconvert(); } // an output must not be a copy

NB_MODULE(_core, m) {
    m.doc() = "The native core: see native/instantft.h.";
    m.attr("DENSE_BYTES") = static_cast<int>(IFT_DENSE_BYTES);
    m.def("isas", &isas, "Instruction sets of this build that this processor runs, best first.");

    nb::class_<Plan>(m, "Plan")
        .def(nb::init<Array<const int32_t>, std::tuple<int, int, int>, int, int, int>())
        .def_prop_ro("params", [](const Plan &p) { return p.plan.params; })
        .def_prop_ro("workspace", [](const Plan &p) { return p.plan.workspace; })
        .def_prop_ro("row_width", [](const Plan &p) { return p.plan.row_width; })
        .def_prop_ro("general", [](const Plan &p) { return p.plan.general != 0; })
        .def_prop_ro("gain", [](const Plan &p) { return p.plan.gain; })
        .def_prop_ro("bias", [](const Plan &p) { return p.plan.bias; })
        .def_prop_ro("classes", [](const Plan &p) { return p.plan.C; })
        .def_prop_ro("stride", [](const Plan &p) { return p.codec.stride; })
        .def_prop_ro("codec_bytes", [](const Plan &p) { return p.codec.bytes; })
        .def("tensors", &tensors, "(layer, role, offset, rows, cols, pitch) of every matrix in the parameter buffer");

    nb::class_<Core>(m, "Core")
        .def(nb::init<std::string>())
        .def_prop_ro("name", [](const Core &c) { return std::string(c.core->name); })
        .def("fold",
             [](const Core &c, const Plan &p, Array<const float> params, Array<float> frozen) {
                 need(params.size() >= static_cast<size_t>(p.plan.params) && frozen.size() >= params.size(),
                      "parameters too small for the plan");
                 c.core->fold(&p.plan, params.data(), frozen.data());
             })
        .def("records",
             [](const Core &c, const Plan &p, Array<const float> frozen, Array<const float> x, Array<float> rows,
                Array<float> ws) {
                 need_buffers(p, frozen, x, ws);
                 need(rows.size() >= x.shape(0) * static_cast<size_t>(p.plan.row_width), "rows too small");
                 nb::gil_scoped_release release;
                 c.core->records(&p.plan, frozen.data(), x.data(), x.shape(1), x.shape(0), rows.data(), ws.data());
             })
        .def("fill",
             [](const Core &c, const Plan &p, Array<const float> frozen, Array<const float> x, Array<const int64_t> order,
                Array<const int64_t> slots, Array<uint8_t> store, Array<float> ws) {
                 need_buffers(p, frozen, x, ws);
                 need(order.size() == slots.size(), "one slot a sample");
                 nb::gil_scoped_release release;
                 c.core->fill(&p.plan, frozen.data(), x.data(), x.shape(1), order.data(), slots.data(), order.size(),
                              &p.codec, store.data(), ws.data());
             })
        .def("forward",
             [](const Core &c, const Plan &p, Array<const float> params, Array<const float> frozen, Array<const float> x,
                Array<float> logits, Array<float> ws) {
                 need_buffers(p, frozen, x, ws);
                 need(params.size() >= static_cast<size_t>(p.plan.params), "parameters too small for the plan");
                 need(logits.size() >= x.shape(0) * static_cast<size_t>(p.plan.C), "logits too small");
                 nb::gil_scoped_release release;
                 c.core->forward(&p.plan, params.data(), frozen.data(), x.data(), x.shape(1), x.shape(0), logits.data(),
                                 ws.data());
             })
        .def(
            "epochs",
            [](const Core &c, const Plan &p, Array<float> params, Array<float> grads, Array<float> velocity,
               Array<const float> frozen, Array<const float> x, Array<const int32_t> labels, Array<const int64_t> numbers,
               bool cached, Array<uint8_t> store, Array<int64_t> owner, Array<float> ws, float lr, float momentum,
               Array<const int32_t> order, Array<double> loss, Array<int64_t> correct, Array<const float> targets,
               Array<const float> weights, int kind) {
                need_buffers(p, frozen, x, ws);
                size_t n = static_cast<size_t>(p.plan.params);
                need(params.size() >= n && (grads.size() >= n || !p.plan.general), "parameters too small for the plan");
                need(velocity.size() == 0 || velocity.size() >= n, "velocity too small for the plan");
                need(!cached || store.size() >= owner.size() * static_cast<size_t>(p.codec.stride), "store too small");
                need(labels.size() == x.shape(0) && numbers.size() == x.shape(0), "one label and number a sample");
                need(order.ndim() == 2 && loss.size() >= order.shape(0) && correct.size() >= order.shape(0),
                     "order must be (E, T)");
                need(targets.size() == 0 || (targets.size() == x.shape(0) * static_cast<size_t>(p.plan.C) &&
                                             weights.size() == x.shape(0)),
                     "a target for every sample and output, and a weight for every sample");
                need(IFT_SOFTMAX <= kind && kind <= IFT_SQUARED, "no such loss");
                ift_job job = {};
                job.params = params.data(), job.grads = grads.data(), job.frozen = frozen.data();
                job.velocity = velocity.size() ? velocity.data() : nullptr;
                job.x = x.data(), job.x_pitch = static_cast<int64_t>(x.shape(1));
                job.labels = labels.data(), job.numbers = numbers.data();
                job.codec = cached ? &p.codec : nullptr;
                job.store = store.data(), job.owner = owner.data();
                job.capacity = cached ? static_cast<int64_t>(owner.size()) : 0;
                job.workspace = ws.data(), job.lr = lr, job.momentum = momentum;
                job.targets = targets.size() ? targets.data() : nullptr;
                job.weights = weights.data(), job.loss = kind;
                int64_t diverged = 0;
                {
                    nb::gil_scoped_release release;
                    diverged = c.core->epochs(&p.plan, &job, order.data(), order.shape(0), order.shape(1), loss.data(),
                                              correct.data());
                }
                return std::make_tuple(diverged, job.hits, job.misses);
            })
        .def("encode",
             [](const Core &c, const Plan &p, Array<const float> rows, Array<uint8_t> out, Array<uint8_t> scratch) {
                 need(rows.size() >= static_cast<size_t>(p.plan.row_width) &&
                          out.size() >= static_cast<size_t>(p.codec.stride) &&
                          scratch.size() >= 2 * static_cast<size_t>(p.plan.row_width) + 64,
                      "buffers too small for a record");
                 c.core->encode(&p.plan, &p.codec, rows.data(), out.data(), scratch.data());
             })
        .def("decode",
             [](const Core &c, const Plan &p, Array<const uint8_t> in, Array<float> row) {
                 need(in.size() >= static_cast<size_t>(p.codec.stride) + 16 &&
                          row.size() >= static_cast<size_t>(p.plan.row_width) + IFT_PAD,
                      "buffers too small for a record");
                 c.core->decode(&p.plan, &p.codec, in.data(), row.data());
             })
        .def("gram", gram<float>(&ift_core::gram_f),
             exact("x"), nb::arg("first"), nb::arg("last"), nb::arg("add"), exact("g"), exact("workspace"))
        .def("gram", gram<double>(&ift_core::gram_d),
             exact("x"), nb::arg("first"), nb::arg("last"), nb::arg("add"), exact("g"), exact("workspace"))
        .def("inverse_factor", inverse_factor<float>(&ift_core::inverse_factor_f),
             exact("g"), exact("v"), exact("workspace"))
        .def("inverse_factor", inverse_factor<double>(&ift_core::inverse_factor_d),
             exact("g"), exact("v"), exact("workspace"))
        .def("inverse_blocks", inverse_blocks<float>(&ift_core::inverse_blocks_f),
             exact("v"), exact("starts"), exact("out"), exact("workspace"))
        .def("inverse_blocks", inverse_blocks<double>(&ift_core::inverse_blocks_d),
             exact("v"), exact("starts"), exact("out"), exact("workspace"))
        .def("combine", combine<float>(&ift_core::combine_f),
             exact("parts"), exact("w"), exact("rows"), exact("d"), exact("c"), exact("g"))
        .def("combine", combine<double>(&ift_core::combine_d),
             exact("parts"), exact("w"), exact("rows"), exact("d"), exact("c"), exact("g"))
        .def("fma_loop", [](const Core &c, int64_t n) {
            float sink[3] = {0.999f, 0.001f, 0};
            nb::gil_scoped_release release;
            return c.core->fma_loop(n, sink);
        });
}
