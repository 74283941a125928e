#include "graph_tap.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace swarmcpp {

namespace {

template <typename F>
void need(const std::map<std::string, uintptr_t> &addresses, const char *name, F &function) {
    if (!ggml::find(addresses, name, function)) {
        throw std::invalid_argument(std::string("the address of ") + name + " is missing");
    }
}

}  // namespace

GraphTap::GraphTap(std::string tensor, const std::map<std::string, uintptr_t> &addresses) : tensor_(std::move(tensor)) {
    need(addresses, "ggml_get_name", get_name_);
    need(addresses, "ggml_op_desc", op_desc_);
    need(addresses, "ggml_nbytes", n_bytes_);
    need(addresses, "ggml_backend_tensor_get", tensor_get_);
}

void GraphTap::arm(float *target, size_t capacity) {
    target_ = target;
    capacity_ = capacity;
    filled_ = 0;
    overflowed_ = false;
    cells_.clear();
}

bool GraphTap::on_eval(const void *opaque, bool ask, void *data) {
    auto *tap = static_cast<GraphTap *>(data);
    const auto *tensor = static_cast<const ggml::Tensor *>(opaque);
    if (!ask) {
        tap->take(tensor);
        return false;  // final norm and head are not computed
    }
    const char *name = tap->get_name_(tensor);
    if (std::strncmp(name, "cache_", 6) == 0) {
        tap->note_kv(tensor, name);
        return false;
    }
    return !tap->tensor_.empty() && tap->tensor_ == name;
}

void GraphTap::take(const ggml::Tensor *tensor) {
    const size_t size = n_bytes_(tensor);
    if (overflowed_ || size > capacity_ * sizeof(float) - filled_) {
        overflowed_ = true;
        return;
    }
    tensor_get_(tensor, reinterpret_cast<char *>(target_) + filled_, 0, size);
    filled_ += size;
}

// llama_kv_cache::cpy_k and cpy_v: ggml_set_rows(the cache of a layer, new rows, the cells that they go to).
void GraphTap::note_kv(const ggml::Tensor *write, const char *name) {
    // Behind what ggml_abi.h describes of a tensor stands its name: in another version of ggml it would not.
    if (name != reinterpret_cast<const char *>(write + 1) || std::strcmp(op_desc_(write), "SET_ROWS") != 0) {
        return;
    }
    const ggml::Tensor *cells = write->src[1];
    if (cells->type != ggml::TYPE_I64 || cells->ne[1] != 1) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(write->data);
    const auto known = std::find_if(places_.begin(), places_.end(),
                                    [&](const KvPlace &each) { return each.address == address; });
    if (known == places_.end()) {
        learn(write, name);
    }
    // All layers' rows go to the same cells.
    if (!places_.empty() && address == places_.front().address) {
        const auto *first = static_cast<const int64_t *>(cells->data);
        cells_.insert(cells_.end(), first, first + cells->ne[0]);
    }
}

void GraphTap::learn(const ggml::Tensor *write, const char *name) {
    char side = 0;
    int layer = 0;
    if (std::sscanf(name, "cache_%c_l%d", &side, &layer) != 2 || (side != 'k' && side != 'v')) {
        return;
    }
    places_.push_back({side, layer, reinterpret_cast<uintptr_t>(write->data), write->nb[1], write->ne[1]});
}

}  // namespace swarmcpp
