// A backend of ggml that multiplies Q8_0 matrices with the kernel of q8_matmul.h, computes attention of few rows with
// that of attention.h, and leaves the rest to the CPU backend.

#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace swarmcpp {

// Why this machine or this build cannot have a kernel; empty when it can.
std::string q8_problem();
std::string attention_problem();

// Register the backend with the ggml whose functions have these addresses, for these kernels and those of earlier calls.
// Empty when that was done; otherwise why not, and nothing was changed.
std::string register_kernels(const std::map<std::string, uintptr_t> &addresses, bool q8, bool attention);

}  // namespace swarmcpp
