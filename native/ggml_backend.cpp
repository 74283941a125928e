// How ggml comes to use the kernel: as with BLAS, a device of type ACCEL is registered. llama.cpp gives each context one
// of its backends, and ggml's scheduler hands it the operations that it says it supports, on weights in plain memory.

#include "ggml_backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "ggml_abi.h"
#include "q8_matmul.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace swarmcpp {

namespace {

using namespace ggml;

// ggml's functions, by the addresses that Python found.
struct Functions {
    void (*backend_register)(Registry *);
    BufferType *(*cpu_buffer_type)();
    Buffer *(*cpu_buffer_from_ptr)(void *, size_t);
    bool (*buft_is_host)(BufferType *);
    int (*graph_n_nodes)(Graph *);
    Tensor *(*graph_node)(Graph *, int);
    Context *(*init)(InitParams);
    void (*free)(Context *);
    Tensor *(*new_tensor_2d)(Context *, int, int64_t, int64_t);
    Tensor *(*mul_mat)(Context *, Tensor *, Tensor *);
    Device *(*dev_by_type)(int);
    const char *(*dev_name)(Device *);
    Registry *(*dev_backend_reg)(Device *);
    const char *(*reg_name)(Registry *);
};

Functions functions;
int op_mul_mat = -1;

// Columns are computed in batches whose activations stay in a core's own cache beside the panel.
constexpr int64_t BATCH_BYTES = 256 * 1024;
constexpr int64_t MIN_ROWS = PANEL;

struct Work {
    int n_threads = 1;
    std::vector<Q8Activation> activations;
    std::vector<std::vector<Q8Panel>> panels;  // of each thread
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool supports(const Tensor *op) {
    if (op->op != op_mul_mat) {
        return false;
    }
    const Tensor *matrix = op->src[0], *rows = op->src[1];
    return matrix->type == TYPE_Q8_0 && rows->type == TYPE_F32 && op->type == TYPE_F32 && matrix->ne[2] == 1 &&
           matrix->ne[3] == 1 && rows->ne[2] == 1 && rows->ne[3] == 1 && matrix->ne[1] >= MIN_ROWS &&
           matrix->nb[0] == Q8_BLOCK_BYTES && rows->nb[0] == sizeof(float) && op->nb[0] == sizeof(float);
}

void quantize_columns(const Tensor *rows, int64_t n_blocks, int64_t first, int64_t last, Q8Activation *out) {
    for (int64_t c = first; c < last; ++c) {
        const char *values = static_cast<const char *>(rows->data) + static_cast<size_t>(c) * rows->nb[1];
        q8_quantize(reinterpret_cast<const float *>(values), n_blocks, out + c * n_blocks);
    }
}

void multiply(Work &work, const Tensor *op, bool same_rows) {
    const Tensor *matrix = op->src[0], *rows = op->src[1];
    const int64_t n_blocks = matrix->ne[0] / Q8_BLOCK, n_columns = rows->ne[1];
    const Q8Matrix weights{static_cast<const uint8_t *>(matrix->data), matrix->nb[1], matrix->ne[1], n_blocks};
    const int64_t n_panels = ceil_div(weights.n_rows, PANEL);
    const int64_t column_bytes = n_blocks * static_cast<int64_t>(sizeof(Q8Activation));
    const int64_t batch = std::max<int64_t>(TILE, BATCH_BYTES / column_bytes / TILE * TILE);
    work.activations.resize(static_cast<size_t>(n_blocks * n_columns));
    for (std::vector<Q8Panel> &panels : work.panels) {
        panels.resize(std::max(panels.size(), static_cast<size_t>(n_blocks)));
    }
    Q8Activation *activations = work.activations.data();
    const auto multiply_panel = [&](int64_t batch_first, int64_t panel, Q8Panel *scratch) {
        const int64_t stride = static_cast<int64_t>(op->nb[1] / sizeof(float));
        const Columns columns{activations + batch_first * n_blocks, static_cast<float *>(op->data) + batch_first * stride,
                              stride, std::min(batch, n_columns - batch_first)};
        q8_multiply_panel(weights, panel * PANEL, columns, scratch);
    };
#if defined(_OPENMP)
    if (work.n_threads > 1) {
        // The team of ggml's CPU backend: the same library, called on the same thread with the same number.
#pragma omp parallel num_threads(work.n_threads)
        {
            if (!same_rows) {
#pragma omp for schedule(static)
                for (int64_t c = 0; c < n_columns; ++c) {
                    quantize_columns(rows, n_blocks, c, c + 1, activations);
                }
            }
            Q8Panel *scratch = work.panels[static_cast<size_t>(omp_get_thread_num())].data();
            // Dynamic: cores of one machine may differ, or be busy with other work.
            const int64_t n_batches = ceil_div(n_columns, batch);
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < n_batches * n_panels; ++i) {
                multiply_panel(i / n_panels * batch, i % n_panels, scratch);
            }
        }
        return;
    }
#endif
    if (!same_rows) {
        quantize_columns(rows, n_blocks, 0, n_columns, activations);
    }
    for (int64_t first = 0; first < n_columns; first += batch) {
        for (int64_t panel = 0; panel < n_panels; ++panel) {
            multiply_panel(first, panel, work.panels[0].data());
        }
    }
}

// -- what ggml calls -----------------------------------------------------------------------------------------------

const char *name_of_backend(Backend *) { return "swarmcpp"; }
const char *name_of_device(Device *) { return "swarmcpp"; }
const char *name_of_registry(Registry *) { return "swarmcpp"; }
const char *description(Device *) { return "Q8_0 products by AVX-512 VNNI"; }

void free_backend(Backend *backend) {
    delete static_cast<Work *>(backend->context);
    delete backend;
}

int compute(Backend *backend, Graph *graph) {
    auto &work = *static_cast<Work *>(backend->context);
    try {
        work.panels.resize(static_cast<size_t>(work.n_threads));
        const Tensor *before = nullptr;
        for (int i = 0, n = functions.graph_n_nodes(graph); i < n; ++i) {
            const Tensor *node = functions.graph_node(graph, i);
            if (node->op == op_mul_mat && (node->flags & FLAG_COMPUTE)) {
                // Queries, keys and values, gate and up: neighbours have the same rows. Within one graph only, where
                // nobody else writes to them between two nodes.
                multiply(work, node, before == node->src[1]);
                before = node->src[1];
            }
        }
    } catch (const std::bad_alloc &) {
        return STATUS_ALLOC_FAILED;
    }
    return STATUS_SUCCESS;
}

void get_memory(Device *, size_t *free, size_t *total) { *free = *total = 0; }
int get_type(Device *) { return DEVICE_ACCEL; }

void get_properties(Device *device, DeviceProperties *properties) {
    *properties = {};
    properties->name = name_of_device(device);
    properties->description = description(device);
    properties->type = DEVICE_ACCEL;
    properties->caps.buffer_from_host_ptr = true;
    properties->caps.mmap_support = true;
}

constexpr uint8_t GUID[16] = {0x73, 0x77, 0x61, 0x72, 0x6d, 0x63, 0x70, 0x70, 0x2d, 0x71, 0x38, 0x2d, 0x76, 0x6e, 0x6e, 0x69};

Backend *init_backend(Device *device, const char *) {
    auto work = std::make_unique<Work>();
    auto *backend = new Backend{};
    backend->guid = GUID;
    backend->iface.get_name = name_of_backend;
    backend->iface.free = free_backend;
    backend->iface.graph_compute = compute;
    backend->device = device;
    backend->context = work.release();
    return backend;
}

BufferType *get_buffer_type(Device *) { return functions.cpu_buffer_type(); }
Buffer *buffer_from_host_ptr(Device *, void *data, size_t size, size_t) {
    return functions.cpu_buffer_from_ptr(data, size);
}
bool supports_op(Device *, const Tensor *op) { return supports(op); }
bool supports_buft(Device *, BufferType *type) { return functions.buft_is_host(type); }

void set_n_threads(Backend *backend, int n_threads) {
    static_cast<Work *>(backend->context)->n_threads = std::max(1, n_threads);
}

size_t get_device_count(Registry *) { return 1; }
Device *get_device(Registry *, size_t);

void *get_proc_address(Registry *, const char *name) {
    return std::strcmp(name, "ggml_backend_set_n_threads") == 0 ? reinterpret_cast<void *>(&set_n_threads) : nullptr;
}

Registry registry = {
    BACKEND_API_VERSION, {name_of_registry, get_device_count, get_device, get_proc_address}, nullptr};
Device device = {{name_of_device, description, get_memory, get_type, get_properties, init_backend, get_buffer_type, nullptr,
                  buffer_from_host_ptr, supports_op, supports_buft, nullptr, {}},
                 &registry,
                 nullptr};

Device *get_device(Registry *, size_t) { return &device; }

// -- registration --------------------------------------------------------------------------------------------------

// Whether `ggml_abi.h` describes the library: a product's tensors, and the CPU's device, must look as it says.
// Learns the number of the operation.
bool layout_agrees() {
    Context *context = functions.init({1 << 16, nullptr, false});
    if (context == nullptr) {
        return false;
    }
    Tensor *matrix = functions.new_tensor_2d(context, TYPE_Q8_0, 64, 24);
    Tensor *rows = functions.new_tensor_2d(context, TYPE_F32, 64, 3);
    const Tensor *product = functions.mul_mat(context, matrix, rows);
    const auto is = [](const Tensor *tensor, int type, int64_t n, int64_t m, size_t item, size_t line) {
        return tensor->type == type && tensor->buffer == nullptr && tensor->ne[0] == n && tensor->ne[1] == m &&
               tensor->ne[2] == 1 && tensor->ne[3] == 1 && tensor->nb[0] == item && tensor->nb[1] == line &&
               tensor->nb[2] == line * static_cast<size_t>(m) && tensor->flags == 0 && tensor->view_src == nullptr &&
               tensor->data != nullptr;
    };
    const bool tensors = is(matrix, TYPE_Q8_0, 64, 24, Q8_BLOCK_BYTES, 2 * Q8_BLOCK_BYTES) &&
                         is(rows, TYPE_F32, 64, 3, sizeof(float), 64 * sizeof(float)) &&
                         is(product, TYPE_F32, 24, 3, sizeof(float), 24 * sizeof(float)) && matrix->op == 0 &&
                         rows->op == 0 && product->op > 0 && product->src[0] == matrix && product->src[1] == rows &&
                         product->src[2] == nullptr;
    op_mul_mat = product->op;
    functions.free(context);
    Device *cpu = functions.dev_by_type(DEVICE_CPU);
    if (!tensors || cpu == nullptr || cpu->reg != functions.dev_backend_reg(cpu)) {
        return false;
    }
    DeviceProperties properties{};
    return cpu->reg->api_version == BACKEND_API_VERSION && cpu->iface.get_type(cpu) == DEVICE_CPU &&
           std::strcmp(cpu->iface.get_name(cpu), functions.dev_name(cpu)) == 0 &&
           std::strcmp(cpu->reg->iface.get_name(cpu->reg), functions.reg_name(cpu->reg)) == 0 &&
           cpu->iface.get_buffer_type(cpu) == functions.cpu_buffer_type() &&
           cpu->iface.supports_buft(cpu, functions.cpu_buffer_type()) &&
           (cpu->iface.get_props(cpu, &properties), properties.type == DEVICE_CPU && properties.caps.buffer_from_host_ptr);
}

}  // namespace

std::string q8_backend_problem() {
    if (!q8_matmul_supported()) {
        return "needs AVX-512 VNNI, and gcc or clang with OpenMP when it is built";
    }
    return "";
}

std::string register_q8_backend(const std::map<std::string, uintptr_t> &addresses) {
    static bool done = false;
    if (done) {
        return "";
    }
    if (std::string problem = q8_backend_problem(); !problem.empty()) {
        return problem;
    }
    const bool all = find(addresses, "ggml_backend_register", functions.backend_register) &&
                     find(addresses, "ggml_backend_cpu_buffer_type", functions.cpu_buffer_type) &&
                     find(addresses, "ggml_backend_cpu_buffer_from_ptr", functions.cpu_buffer_from_ptr) &&
                     find(addresses, "ggml_backend_buft_is_host", functions.buft_is_host) &&
                     find(addresses, "ggml_graph_n_nodes", functions.graph_n_nodes) &&
                     find(addresses, "ggml_graph_node", functions.graph_node) &&
                     find(addresses, "ggml_init", functions.init) && find(addresses, "ggml_free", functions.free) &&
                     find(addresses, "ggml_new_tensor_2d", functions.new_tensor_2d) &&
                     find(addresses, "ggml_mul_mat", functions.mul_mat) &&
                     find(addresses, "ggml_backend_dev_by_type", functions.dev_by_type) &&
                     find(addresses, "ggml_backend_dev_name", functions.dev_name) &&
                     find(addresses, "ggml_backend_dev_backend_reg", functions.dev_backend_reg) &&
                     find(addresses, "ggml_backend_reg_name", functions.reg_name);
    if (!all) {
        return "finds functions of ggml missing";
    }
    if (!layout_agrees()) {
        return "was made for another version of ggml";
    }
    functions.backend_register(&registry);
    done = true;
    return "";
}

}  // namespace swarmcpp
