// A backend of ggml that multiplies Q8_0 matrices with the kernel of q8_matmul.h and leaves the rest to the CPU backend.

#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace swarmcpp {

// Why this machine or this build cannot have the backend; empty when it can.
std::string q8_backend_problem();

// Register the backend with the ggml whose functions have these addresses. Empty when that was done, now or before;
// otherwise why not, and nothing was changed.
std::string register_q8_backend(const std::map<std::string, uintptr_t> &addresses);

}  // namespace swarmcpp
