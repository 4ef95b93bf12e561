// How a problem is cut into tasks.
#pragma once
#include "problem.h"

namespace gk {

struct Plan {
  int64_t rows;        // rows of one KV head: tq × group
  int64_t task_rows;   // rows of one task
  int64_t row_blocks;  // tasks side by side over the rows
  int64_t splits;      // tasks side by side over the keys
  int64_t units;       // batch × KV heads × row_blocks
  int threads;
};

Plan make_plan(const Problem &p, int threads, int64_t tile_rows);

// Runs the problem; false when memory for it cannot be had.
bool run_problem(const Problem &p, const KernelSet &kernels, int threads);

// The kernels for this processor, or those of that name (null where it can't run them).
const KernelSet *best_kernels();
const KernelSet *kernels_named(const char *name);

}  // namespace gk
