// How ggml comes to use the kernels: as with BLAS, a device of type ACCEL is registered. llama.cpp gives each context one
// of its backends, and ggml's scheduler hands it the operations that it says it supports, on tensors in plain memory.

#include "ggml_backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
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
    Tensor *(*new_tensor_4d)(Context *, int, int64_t, int64_t, int64_t, int64_t);
    Tensor *(*mul_mat)(Context *, Tensor *, Tensor *);
    Tensor *(*flash_attn_ext)(Context *, Tensor *, Tensor *, Tensor *, Tensor *, float, float, float);
    Device *(*dev_by_type)(int);
    const char *(*dev_name)(Device *);
    Registry *(*dev_backend_reg)(Device *);
    const char *(*reg_name)(Registry *);
};

Functions functions;
int op_mul_mat = -1, op_attention = -1;

// Which kernels are used. Until it is known, none.
bool with_q8 = false, with_attention = false;

// Columns are computed in batches whose activations stay in a core's own cache beside the panel.
constexpr int64_t BATCH_BYTES = 256 * 1024;
constexpr int64_t MIN_ROWS = PANEL;

// Of attention: from here on ggml's kernel computes tiles, as for the prompts that it reads.
constexpr int64_t TILED_ROWS = 64;
constexpr int64_t MOST_LANES = 64;

struct Work {
    int n_threads = 1;
    std::vector<Q8Activation> activations;
    std::vector<std::vector<Q8Panel>> panels;  // of each thread
    std::vector<std::vector<float>> scratches;  // of each thread
    std::vector<float> states;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_product(const Tensor *op) {
    if (!with_q8 || op->op != op_mul_mat) {
        return false;
    }
    const Tensor *matrix = op->src[0], *rows = op->src[1];
    return matrix->type == TYPE_Q8_0 && rows->type == TYPE_F32 && op->type == TYPE_F32 && matrix->ne[2] == 1 &&
           matrix->ne[3] == 1 && rows->ne[2] == 1 && rows->ne[3] == 1 && matrix->ne[1] >= MIN_ROWS &&
           matrix->nb[0] == Q8_BLOCK_BYTES && rows->nb[0] == sizeof(float) && op->nb[0] == sizeof(float);
}

float parameter(const Tensor *op, int index) {
    float value;
    std::memcpy(&value, op->op_params + index, sizeof value);
    return value;
}

bool is_attention(const Tensor *op) {
    if (!with_attention || op->op != op_attention) {
        return false;
    }
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    // Neither ALiBi (parameter 1) nor a soft cap of scores (2).
    return sinks == nullptr && parameter(op, 1) == 0.0f && parameter(op, 2) == 0.0f && q->ne[1] < TILED_ROWS &&
           q->type == TYPE_F32 && k->type == TYPE_F16 && v->type == TYPE_F16 && op->type == TYPE_F32 &&
           q->nb[0] == sizeof(float) && k->nb[0] == 2 && v->nb[0] == 2 && op->nb[0] == sizeof(float) &&
           attention_fits(q->ne[0], v->ne[0]) && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0 &&
           k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] &&
           (mask == nullptr || (mask->type == TYPE_F16 && mask->nb[0] == 2 && mask->ne[2] == 1));
}

bool supports(const Tensor *op) { return is_product(op) || is_attention(op); }

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

Strided strided(const Tensor *tensor) {
    return {static_cast<const char *>(tensor->data), tensor->nb[1], tensor->nb[2], tensor->nb[3]};
}

Attention attention_of(const Tensor *op) {
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const Strided added = mask ? Strided{static_cast<const char *>(mask->data), mask->nb[1], 0, mask->nb[3]} : Strided{};
    return {q->ne[0],   v->ne[0],   k->ne[1], q->ne[1], q->ne[2], k->ne[2], q->ne[3], parameter(op, 0), strided(q),
            strided(k), strided(v), added,    mask ? mask->ne[3] : 1, static_cast<float *>(op->data)};
}

// Calls `function` with 0 <= i < n and the number of the thread, on as many threads as there are.
template <typename F>
void on_threads(int n_threads, int64_t n, F function) {
#if defined(_OPENMP)
    if (n_threads > 1 && n > 1) {
        // The team of ggml's CPU backend: the same library, called on the same thread with the same number.
        // Dynamic: cores of one machine may differ, or be busy with other work.
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
        for (int64_t i = 0; i < n; ++i) {
            function(i, omp_get_thread_num());
        }
        return;
    }
#endif
    (void)n_threads;
    for (int64_t i = 0; i < n; ++i) {
        function(i, 0);
    }
}

void attend(Work &work, const Attention &call) {
    const int64_t heads = call.n_streams * call.n_kv_heads;
    int64_t lanes = ATTENTION_LANES;
    while (lanes < call.items() && lanes < MOST_LANES) {
        lanes *= 2;
    }
    // Keys and values are converted for all items of a tile: no smaller ones than threads need.
    while (lanes > ATTENTION_LANES && heads * ceil_div(call.items(), lanes) < work.n_threads) {
        lanes /= 2;
    }
    const int64_t tiles = ceil_div(call.items(), lanes), n = heads * tiles, chunks = call.chunks();
    const auto items = [&](int64_t i) {
        const int64_t first = i % tiles * lanes, head = i / tiles;
        return AttentionItems{head / call.n_kv_heads, head % call.n_kv_heads, first, std::min(lanes, call.items() - first),
                              lanes};
    };
    work.scratches.resize(static_cast<size_t>(work.n_threads));
    for (std::vector<float> &scratch : work.scratches) {
        scratch.resize(std::max(scratch.size(), attention_scratch(call, lanes)));
    }
    const auto scratch = [&](int thread) { return work.scratches[static_cast<size_t>(thread)].data(); };
    if (n >= work.n_threads || chunks == 1) {
        on_threads(work.n_threads, n, [&](int64_t i, int thread) { attention_whole(call, items(i), scratch(thread)); });
        return;
    }
    const size_t size = attention_state(call, lanes);
    work.states.resize(std::max(work.states.size(), static_cast<size_t>(n * (chunks + 1)) * size));
    const auto state = [&](int64_t i, int64_t chunk) {
        return work.states.data() + static_cast<size_t>(i * (chunks + 1) + chunk) * size;
    };
    on_threads(work.n_threads, n * chunks, [&](int64_t at, int thread) {
        attention_chunk(call, items(at / chunks), at % chunks, scratch(thread), state(at / chunks, at % chunks));
    });
    on_threads(work.n_threads, n, [&](int64_t i, int) {
        float *total = state(i, chunks);
        attention_begin(call, lanes, total);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            attention_add(call, lanes, total, state(i, chunk));
        }
        attention_end(call, items(i), total);
    });
}

// -- what ggml calls -----------------------------------------------------------------------------------------------

const char *name_of_backend(Backend *) { return "swarmcpp"; }
const char *name_of_device(Device *) { return "swarmcpp"; }
const char *name_of_registry(Registry *) { return "swarmcpp"; }
const char *description(Device *) { return "Q8_0 products by AVX-512 VNNI, attention of few rows by AVX2"; }

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
            if (!(node->flags & FLAG_COMPUTE)) {
                continue;
            }
            if (node->op == op_mul_mat) {
                // Queries, keys and values, gate and up: neighbours have the same rows. Within one graph only, where
                // nobody else writes to them between two nodes.
                multiply(work, node, before == node->src[1]);
                before = node->src[1];
            } else if (node->op == op_attention) {
                attend(work, attention_of(node));
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

// Whether attention's tensors look as `ggml_abi.h` and attention.h say. Learns the number of the operation.
bool attention_agrees(Context *context) {
    constexpr int64_t DIM = 16, ROWS = 3, HEADS = 4, KV_HEADS = 2, POSITIONS = 32, STREAMS = 2;
    Tensor *q = functions.new_tensor_4d(context, TYPE_F32, DIM, ROWS, HEADS, STREAMS);
    Tensor *k = functions.new_tensor_4d(context, TYPE_F16, DIM, POSITIONS, KV_HEADS, STREAMS);
    Tensor *v = functions.new_tensor_4d(context, TYPE_F16, DIM, POSITIONS, KV_HEADS, STREAMS);
    Tensor *mask = functions.new_tensor_4d(context, TYPE_F16, POSITIONS, ROWS, 1, STREAMS);
    const Tensor *found = functions.flash_attn_ext(context, q, k, v, mask, 0.5f, 0.25f, 2.0f);
    op_attention = found->op;
    return op_attention > 0 && op_attention != op_mul_mat && found->src[0] == q && found->src[1] == k &&
           found->src[2] == v && found->src[3] == mask && found->src[4] == nullptr && found->type == TYPE_F32 &&
           found->ne[0] == DIM && found->ne[1] == HEADS && found->ne[2] == ROWS && found->ne[3] == STREAMS &&
           k->nb[0] == 2 && k->nb[1] == 2 * DIM && k->nb[3] == 2 * DIM * POSITIONS * KV_HEADS &&
           parameter(found, 0) == 0.5f && parameter(found, 1) == 0.25f && parameter(found, 2) == 2.0f;
}

// Whether `ggml_abi.h` describes the library: the tensors of operations, and the CPU's device, must look as it says.
// Learns the numbers of the operations.
bool layout_agrees() {
    Context *context = functions.init({1 << 17, nullptr, false});
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
    const bool attention = attention_agrees(context);
    functions.free(context);
    Device *cpu = functions.dev_by_type(DEVICE_CPU);
    if (!tensors || !attention || cpu == nullptr || cpu->reg != functions.dev_backend_reg(cpu)) {
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

std::string q8_problem() {
    return q8_matmul_supported() ? "" : "needs AVX-512 VNNI, and gcc or clang with OpenMP when it is built";
}

std::string attention_problem() {
    return attention_supported() ? "" : "needs AVX2, F16C and FMA, and gcc or clang with OpenMP when it is built";
}

std::string register_kernels(const std::map<std::string, uintptr_t> &addresses, bool q8, bool attention) {
    static bool registered = false;
    for (const std::string &problem : {q8 ? q8_problem() : "", attention ? attention_problem() : ""}) {
        if (!problem.empty()) {
            return problem;
        }
    }
    if (registered) {
        with_q8 = with_q8 || q8;
        with_attention = with_attention || attention;
        return "";
    }
    const bool all = find(addresses, "ggml_backend_register", functions.backend_register) &&
                     find(addresses, "ggml_backend_cpu_buffer_type", functions.cpu_buffer_type) &&
                     find(addresses, "ggml_backend_cpu_buffer_from_ptr", functions.cpu_buffer_from_ptr) &&
                     find(addresses, "ggml_backend_buft_is_host", functions.buft_is_host) &&
                     find(addresses, "ggml_graph_n_nodes", functions.graph_n_nodes) &&
                     find(addresses, "ggml_graph_node", functions.graph_node) &&
                     find(addresses, "ggml_init", functions.init) && find(addresses, "ggml_free", functions.free) &&
                     find(addresses, "ggml_new_tensor_2d", functions.new_tensor_2d) &&
                     find(addresses, "ggml_new_tensor_4d", functions.new_tensor_4d) &&
                     find(addresses, "ggml_mul_mat", functions.mul_mat) &&
                     find(addresses, "ggml_flash_attn_ext", functions.flash_attn_ext) &&
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
    registered = true;
    with_q8 = q8;
    with_attention = attention;
    return "";
}

}  // namespace swarmcpp
