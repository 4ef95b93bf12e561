#!/bin/sh
# Checks the NEON kernels on another processor: cross compiler and qemu-user (Debian packages
# g++-aarch64-linux-gnu and qemu-user).
set -eu
compiler=${1:-aarch64-linux-gnu-g++}
build=build/kernels-neon
mkdir -p "$build"
cd kernels
"$compiler" -std=c++17 -O3 -Wall -Wextra -static -pthread -DGK_HAVE_NEON -DGK_HAVE_PORTABLE \
  selftest/selftest.cpp src/plan.cpp src/threads.cpp src/isa_portable.cpp src/isa_neon.cpp \
  src/isa_avx2.cpp src/isa_avx512.cpp -o "../$build/selftest"
qemu-aarch64 "../$build/selftest" neon portable
