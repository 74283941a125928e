// The native part of swarmcpp. It needs no llama.h: callbacks have plain C signatures, and Python hands their
// addresses to llama.cpp.

#include <atomic>
#include <cstdint>

#include <nanobind/nanobind.h>

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

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Callbacks for llama.cpp that must not run Python.";
    m.def("abort_callback_address", [] { return reinterpret_cast<uintptr_t>(&abort_requested); },
          "Address of a ggml_abort_callback; its user data is the address of two uint64: abort step, current step.");
}
