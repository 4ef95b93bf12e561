// Threads that do not fight PyTorch's.
#pragma once
#include <cstdint>

namespace gk {

// Address of GOMP_parallel in the OpenMP runtime that PyTorch itself runs on, or null. With it
// the work runs on PyTorch's own threads; without it, and in a forked child (where that
// runtime's threads are gone), on a small pool of our own.
void set_openmp(void *gomp_parallel);
const char *thread_backend();

// Calls body(context) on up to `threads` threads, the caller's among them, and waits.
void run_parallel(int threads, void (*body)(void *), void *context);

}  // namespace gk
