// The parts of ggml's interface for backends (ggml-backend-impl.h, GGML_BACKEND_API_VERSION 2) and of ggml_tensor that
// are needed here. llama-cpp-python is built apart and installs no such header, so they are declared again; whether
// they are those of the library that is loaded is checked at run time (ggml_backend.cpp).

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace swarmcpp::ggml {

constexpr int BACKEND_API_VERSION = 2;
constexpr int TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q8_0 = 8, TYPE_I64 = 27;  // as in GGUF files
constexpr int DEVICE_CPU = 0, DEVICE_ACCEL = 3;            // ggml_backend_dev_type
constexpr int STATUS_SUCCESS = 0, STATUS_ALLOC_FAILED = -2;  // ggml_status
constexpr int32_t FLAG_COMPUTE = 16;                       // ggml_tensor_flag

using Function = void (*)();

struct Backend;
struct Device;
struct Registry;
struct Buffer;
struct BufferType;
struct Graph;
struct Context;

struct Tensor {
    int type;
    Buffer *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    Tensor *src[10];
    Tensor *view_src;
    size_t view_offs;
    void *data;
};

struct BackendInterface {
    const char *(*get_name)(Backend *);
    void (*free)(Backend *);
    Function asynchronous[6];  // data access and synchronize: none of it
    Function graph_plan[4];
    int (*graph_compute)(Backend *, Graph *);
    Function events[2];
    Function graph_optimize;
};

struct Backend {
    const void *guid;
    BackendInterface iface;
    Device *device;
    void *context;
};

struct DeviceProperties {
    const char *name;
    const char *description;
    size_t memory_free;
    size_t memory_total;
    int type;
    const char *device_id;
    struct {
        bool async;
        bool host_buffer;
        bool buffer_from_host_ptr;
        bool events;
        bool mmap_support;
    } caps;
};

struct DeviceInterface {
    const char *(*get_name)(Device *);
    const char *(*get_description)(Device *);
    void (*get_memory)(Device *, size_t *free, size_t *total);
    int (*get_type)(Device *);
    void (*get_props)(Device *, DeviceProperties *);
    Backend *(*init_backend)(Device *, const char *params);
    BufferType *(*get_buffer_type)(Device *);
    Function get_host_buffer_type;
    Buffer *(*buffer_from_host_ptr)(Device *, void *data, size_t size, size_t max_tensor_size);
    bool (*supports_op)(Device *, const Tensor *);
    bool (*supports_buft)(Device *, BufferType *);
    Function offload_op;
    Function events[3];
};

struct Device {
    DeviceInterface iface;
    Registry *reg;
    void *context;
};

struct RegistryInterface {
    const char *(*get_name)(Registry *);
    size_t (*get_device_count)(Registry *);
    Device *(*get_device)(Registry *, size_t index);
    void *(*get_proc_address)(Registry *, const char *name);
};

struct Registry {
    int api_version;
    RegistryInterface iface;
    void *context;
};

struct InitParams {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};

// One of ggml's functions, by the addresses that Python found. False when it is not among them.
template <typename F>
bool find(const std::map<std::string, uintptr_t> &addresses, const char *name, F &function) {
    const auto found = addresses.find(name);
    if (found == addresses.end() || found->second == 0) {
        return false;
    }
    function = reinterpret_cast<F>(found->second);
    return true;
}

}  // namespace swarmcpp::ggml
