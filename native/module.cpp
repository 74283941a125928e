// The native part of swarmcpp. It needs no llama.h: callbacks have plain C signatures, and Python hands their
// addresses to llama.cpp.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "ggml_backend.h"
#include "graph_tap.h"
#include "q8_matmul.h"

namespace nb = nanobind;

namespace {

// Shared words between a node and its engine (see swarmcpp/engine/abortflag.py for the layout).
struct AbortWords {
    std::atomic<uint64_t> abort_step;    // written by the node: the step to abort
    std::atomic<uint64_t> current_step;  // written by the engine: the step that runs now, 0 when none
};

// ggml_abort_callback. llama.cpp calls it before every operator, from a compute thread, so it takes no lock and never
// touches Python.
bool abort_requested(void *data) {
    const auto *words = static_cast<const AbortWords *>(data);
    const uint64_t current = words->current_step.load(std::memory_order_relaxed);
    return current != 0 && words->abort_step.load(std::memory_order_relaxed) == current;
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Whether no half is infinite or NaN (all exponent bits set). Without a branch in the loop, so that it vectorises.
bool all_finite_f16(const Bytes &bytes) {
    const auto *halves = reinterpret_cast<const uint16_t *>(bytes.data());
    const size_t count = bytes.size() / 2;
    uint16_t bad = 0;
    for (size_t i = 0; i < count; ++i) {
        bad |= static_cast<uint16_t>((halves[i] & 0x7C00) == 0x7C00);
    }
    return bad == 0;
}

// The same for floats at an address: those of llama.cpp's logits, of which no copy is made.
bool all_finite_f32(uintptr_t address, size_t count) {
    const auto *bits = reinterpret_cast<const uint32_t *>(address);
    uint32_t bad = 0;
    for (size_t i = 0; i < count; ++i) {
        bad |= static_cast<uint32_t>((bits[i] & 0x7F800000) == 0x7F800000);
    }
    return bad == 0;
}

// The first index of the largest float at an address, those in `banned` not counted; -1 when a NaN is among them. What
// llama.cpp's greedy sampler says, without its list of candidates: 12 bytes for each token of the vocabulary.
int64_t largest_f32(uintptr_t address, size_t count, const std::vector<int64_t> &banned) {
    auto *values = reinterpret_cast<float *>(address);
    for (const int64_t index : banned) {
        if (index < 0 || static_cast<size_t>(index) >= count) {
            throw std::invalid_argument("a banned index is outside");
        }
    }
    std::vector<float> kept;
    for (const int64_t index : banned) {
        kept.push_back(values[index]);
        values[index] = -INFINITY;
    }
    // In lanes, so that it vectorises: the order of the comparisons of a lane is that of the loop.
    constexpr size_t LANES = 32;
    float most[LANES];
    int32_t nan[LANES] = {};
    std::fill(most, most + LANES, -INFINITY);
    size_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        for (size_t lane = 0; lane < LANES; ++lane) {
            const float value = values[at + lane];
            most[lane] = value > most[lane] ? value : most[lane];
            nan[lane] |= value != value;
        }
    }
    for (size_t lane = 0; at < count; ++at, ++lane) {
        most[lane] = std::max(most[lane], values[at]);
        nan[lane] |= values[at] != values[at];
    }
    int64_t found = -1;
    if (count > 0 && std::none_of(nan, nan + LANES, [](int32_t each) { return each != 0; })) {
        found = std::find(values, values + count, *std::max_element(most, most + LANES)) - values;
    }
    for (size_t i = banned.size(); i-- > 0;) {
        values[banned[i]] = kept[i];
    }
    return found;
}

using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A GraphTap that keeps the array it fills alive for as long as a decode may write to it.
class PythonTap : public swarmcpp::GraphTap {
public:
    using GraphTap::GraphTap;

    void take_into(std::optional<Rows> target) {
        target_ = std::move(target);
        arm(target_ ? target_->data() : nullptr, target_ ? target_->size() : 0);
    }

private:
    std::optional<Rows> target_;
};

using Matrix = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Product = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// rows x matrix^T by the kernel alone, on one thread.
void q8_product(const Matrix &matrix, const Floats &rows, Product out) {
    using namespace swarmcpp;
    const size_t n_blocks = matrix.shape(1) / Q8_BLOCK_BYTES, n_rows = matrix.shape(0), n_columns = rows.shape(0);
    if (matrix.shape(1) != n_blocks * Q8_BLOCK_BYTES || rows.shape(1) != n_blocks * Q8_BLOCK ||
        out.shape(0) != n_columns || out.shape(1) != n_rows || n_columns == 0) {
        throw std::invalid_argument("the shapes do not fit");
    }
    if (const std::string problem = q8_problem(); !problem.empty()) {
        throw std::runtime_error(problem);
    }
    std::vector<Q8Activation> activations(n_columns * n_blocks);
    std::vector<Q8Panel> scratch(n_blocks);
    for (size_t c = 0; c < n_columns; ++c) {
        q8_quantize(rows.data() + c * rows.shape(1), static_cast<int64_t>(n_blocks), &activations[c * n_blocks]);
    }
    const Q8Matrix weights{matrix.data(), matrix.shape(1), static_cast<int64_t>(n_rows), static_cast<int64_t>(n_blocks)};
    const Columns columns{activations.data(), out.data(), static_cast<int64_t>(n_rows), static_cast<int64_t>(n_columns)};
    for (int64_t row = 0; row < weights.n_rows; row += PANEL) {
        q8_multiply_panel(weights, row, columns, scratch.data());
    }
}

using Floats4 = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Halves4 = nb::ndarray<const uint16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Halves3 = nb::ndarray<const uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Result4 = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

template <typename Array>
swarmcpp::Strided strided(const Array &array) {
    const size_t item = sizeof(typename Array::Scalar), row = item * array.shape(3), head = row * array.shape(2);
    return {reinterpret_cast<const char *>(array.data()), row, head, head * array.shape(1)};
}

// Attention by the kernel alone, on one thread: `lanes` items at a time, chunks one after another or each apart.
void attend(const Floats4 &queries, const Halves4 &keys, const Halves4 &values, const Halves3 &mask, float scale,
            int64_t lanes, bool apart, Result4 out) {
    using namespace swarmcpp;
    const size_t streams = queries.shape(0), heads = queries.shape(1), rows = queries.shape(2), dk = queries.shape(3);
    const size_t kv_heads = keys.shape(1), positions = keys.shape(2), dv = values.shape(3);
    const auto shaped = [](const auto &array, std::vector<size_t> shape) {
        for (size_t i = 0; i < shape.size(); ++i) {
            if (array.shape(i) != shape[i]) {
                return false;
            }
        }
        return true;
    };
    if (kv_heads == 0 || heads % kv_heads != 0 || lanes < ATTENTION_LANES ||
        (lanes != ATTENTION_LANES && lanes % (2 * ATTENTION_LANES) != 0) || !shaped(keys, {streams, kv_heads, positions, dk}) ||
        !shaped(values, {streams, kv_heads, positions, dv}) || !shaped(mask, {streams, rows, positions}) ||
        !shaped(out, {streams, rows, heads, dv})) {
        throw std::invalid_argument("the shapes do not fit");
    }
    if (const std::string problem = attention_problem(); !problem.empty()) {
        throw std::runtime_error(problem);
    }
    if (!attention_fits(static_cast<int64_t>(dk), static_cast<int64_t>(dv))) {
        throw std::invalid_argument("the kernel has no heads of this size");
    }
    const auto at = [](size_t value) { return static_cast<int64_t>(value); };
    const Strided added{reinterpret_cast<const char *>(mask.data()), 2 * positions, 0, 2 * positions * rows};
    const Attention call{at(dk), at(dv), at(positions), at(rows), at(heads), at(kv_heads), at(streams), scale,
                         strided(queries), strided(keys), strided(values), added, at(streams), out.data()};
    std::vector<float> scratch(attention_scratch(call, lanes)), state(2 * attention_state(call, lanes));
    float *total = state.data(), *part = total + attention_state(call, lanes);
    for (int64_t head = 0; head < at(streams * kv_heads); ++head) {
        for (int64_t first = 0; first < call.items(); first += lanes) {
            const AttentionItems items{head / at(kv_heads), head % at(kv_heads), first,
                                       std::min(lanes, call.items() - first), lanes};
            if (!apart) {
                attention_whole(call, items, scratch.data());
                continue;
            }
            attention_begin(call, lanes, total);
            for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
                attention_chunk(call, items, chunk, scratch.data(), part);
                attention_add(call, lanes, total, part);
            }
            attention_end(call, items, total);
        }
    }
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Callbacks for llama.cpp that must not run Python, and loops over KV that Python is too slow for.";
    m.def("abort_callback_address", [] { return reinterpret_cast<uintptr_t>(&abort_requested); },
          "Address of a ggml_abort_callback; its user data is the address of two uint64: abort step, current step.");
    m.def("all_finite_f16", &all_finite_f16, nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>(),
          "Whether every IEEE half in a byte array (little-endian, shape (n,)) is finite.");
    m.def("all_finite_f32", &all_finite_f32, nb::arg("address"), nb::arg("count"),
          "Whether all of `count` floats at an address are finite.");
    m.def("largest_f32", &largest_f32, nb::arg("address"), nb::arg("count"), nb::arg("banned"),
          "First index of the largest of `count` floats at an address, or -1 with a NaN.");
    m.def("q8_problem", &swarmcpp::q8_problem,
          "Why this machine or build cannot have the kernel for Q8_0 matrices; empty when it can.");
    m.def("attention_problem", &swarmcpp::attention_problem,
          "Why this machine or build cannot have the kernel for attention; empty when it can.");
    m.def("register_kernels", &swarmcpp::register_kernels, nb::arg("addresses"), nb::kw_only(), nb::arg("q8"),
          nb::arg("attention"), "Let ggml compute with kernels of this module; why not, or empty.");
    m.def("attend", &attend, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("mask"), nb::arg("scale"),
          nb::arg("lanes"), nb::arg("apart"), nb::arg("out").noconvert(), "Attention by the kernel alone.");
    m.def("q8_product", &q8_product, nb::arg("matrix"), nb::arg("rows"), nb::arg("out").noconvert(),
          "rows x matrix^T by the kernel alone.");
    nb::class_<PythonTap>(m, "GraphTap", "Takes hidden rows out of the graphs of one context, and notes where its KV is.")
        .def(nb::init<std::string, std::map<std::string, uintptr_t>>(), nb::arg("tensor"), nb::arg("addresses"))
        .def("arm", &PythonTap::take_into, nb::arg("target").none(), "Before each decode: take rows into this array.")
        .def_prop_ro("filled", &PythonTap::filled, "Bytes taken since `arm`; 0 when the rows did not fit.")
        .def("cells", [](const PythonTap &tap) { return tap.cells(); }, "Cells that rows were written to since `arm`.")
        .def("places",
             [](const PythonTap &tap) {
                 std::vector<std::tuple<std::string, int, uintptr_t, size_t, int64_t>> places;
                 for (const auto &each : tap.places()) {
                     places.emplace_back(std::string(1, each.side), each.layer, each.address, each.row_bytes, each.n_rows);
                 }
                 return places;
             },
             "(side, layer, address, row bytes, rows) of the KV that was written to so far.")
        .def_prop_ro("address",
                     [](PythonTap &tap) { return reinterpret_cast<uintptr_t>(static_cast<swarmcpp::GraphTap *>(&tap)); },
                     "User data of the callback; valid as long as this object.")
        .def_prop_ro_static("callback_address",
                            [](nb::handle) { return reinterpret_cast<uintptr_t>(&swarmcpp::GraphTap::on_eval); },
                            "Address of a ggml_backend_sched_eval_callback.");
}
