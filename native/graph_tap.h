// What is taken out of the graphs of one llama.cpp context while it computes: hidden rows, and where KV is written.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ggml_abi.h"

namespace swarmcpp {

// Where the K or V rows of one layer lie: of all cells of all streams, one behind another.
struct KvPlace {
    char side;  // 'k' or 'v'
    int layer;
    uintptr_t address;
    size_t row_bytes;
    int64_t n_rows;
};

class GraphTap {
public:
    // `tensor`: the one whose F32 rows are taken, and behind which nothing is computed; empty: none. `addresses` are
    // those of ggml's functions. Throws std::invalid_argument when one is missing.
    GraphTap(std::string tensor, const std::map<std::string, uintptr_t> &addresses);

    // Before each decode. Rows of the next one go to `target`, those of each ubatch behind those of the one before.
    void arm(float *target, size_t capacity);

    size_t filled() const { return overflowed_ ? 0 : filled_; }         // bytes, since `arm`
    const std::vector<int64_t> &cells() const { return cells_; }        // that rows since `arm` have been written to
    const std::vector<KvPlace> &places() const { return places_; }      // that were seen so far

    // ggml_backend_sched_eval_callback. Called on the thread that decodes, without the GIL: never touches Python.
    static bool on_eval(const void *tensor, bool ask, void *data);

private:
    void take(const ggml::Tensor *tensor);
    void note_kv(const ggml::Tensor *write, const char *name);
    void learn(const ggml::Tensor *write, const char *name);

    std::string tensor_;
    const char *(*get_name_)(const void *) = nullptr;
    const char *(*op_desc_)(const void *) = nullptr;
    size_t (*n_bytes_)(const void *) = nullptr;
    void (*tensor_get_)(const void *, void *, size_t, size_t) = nullptr;
    float *target_ = nullptr;
    size_t capacity_ = 0, filled_ = 0;
    bool overflowed_ = false;
    std::vector<KvPlace> places_;
    std::vector<int64_t> cells_;
};

}  // namespace swarmcpp
