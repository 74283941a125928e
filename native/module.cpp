// The native part of swarmcpp. It needs no llama.h: callbacks have plain C signatures, and Python hands their
// addresses to llama.cpp.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

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

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Callbacks for llama.cpp that must not run Python, and loops over KV that Python is too slow for.";
    m.def("abort_callback_address", [] { return reinterpret_cast<uintptr_t>(&abort_requested); },
          "Address of a ggml_abort_callback; its user data is the address of two uint64: abort step, current step.");
    m.def("all_finite_f16", &all_finite_f16, nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>(),
          "Whether every IEEE half in a byte array (little-endian, shape (n,)) is finite.");
}
