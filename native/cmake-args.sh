#!/bin/sh
# Prints CMAKE_ARGS for building llama-cpp-python from source on this machine.
#
# gcc 12 on a CPU with AMX builds kernels that die in `ldtilecfg` at the first quantised matmul (llama.cpp PR 26954).
# Without the AMX kernels llama.cpp uses its repacked AVX-512 ones, which are safe and nearly as fast, so AMX is left
# out wherever the compiler knows the flags (x86 only; other compilers print nothing and build as usual).
set -eu
flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
if printf 'int main(void){return 0;}\n' | ${CC:-cc} $flags -Werror -x c -c -o /dev/null - 2>/dev/null; then
    printf '%s' "-DCMAKE_C_FLAGS='$flags' -DCMAKE_CXX_FLAGS='$flags'"
fi
