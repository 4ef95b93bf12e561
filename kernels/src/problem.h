// One call of the operator: pointers, sizes and strides. Everything is 64-bit; nothing here
// knows about PyTorch, so that one build serves every release of it.
#pragma once
#include <cstdint>

namespace gk {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

struct Problem {
  const void *q, *k, *v;
  void *out;
  int32_t dtype;
  bool causal;
  double scale;
  int64_t batch, heads, kv_heads, tq, tk, d_qk, d_v;
  // Strides in elements of the axes batch, head, position; the last axis is contiguous.
  int64_t qs[3], ks[3], vs[3], os[3];
  // First valid key and one past the last, per batch row; null when every key is valid.
  const int64_t *starts, *lengths;

  int64_t group() const { return heads / kv_heads; }
  int64_t key_begin(int64_t b) const { return starts ? starts[b] : 0; }
  int64_t key_end(int64_t b) const { return lengths ? lengths[b] : tk; }
};

// A piece of work: rows [row0, row1) of one (batch, KV head), keys [key0, key1).
// A row is (query position, member of the head group), position major, so that neighbouring
// rows see nearly the same keys and every key is read once for the whole group.
struct Task {
  int64_t batch, kv_head, row0, row1, key0, key1;
  float *partial;  // null: write the final output; else {max, sum, weighted values} go here
};

// What one instruction set offers.
struct KernelSet {
  const char *name;
  int64_t tile_rows;                                        // rows of the register tile
  int64_t (*scratch_floats)(const Problem &, int64_t rows);  // per thread
  void (*attend)(const Problem &, const Task &, float *scratch);
  // Merges `splits` partial results, `stride` floats apart, and writes the output rows.
  void (*combine)(const Problem &, const Task &, const float *partials, int64_t splits,
                  int64_t stride);
  // Sum of n floats, prefetching `ahead` bytes: a reader as fast as we can make one, for the
  // ceiling that benchmarks are held against.
  float (*read)(const float *data, int64_t n, int64_t ahead);
};

// Floats of one partial result: per row the running maximum, the sum and d_v values.
inline int64_t partial_floats(int64_t rows, int64_t d_v) { return rows * (2 + d_v); }

const KernelSet *kernels_avx512();
const KernelSet *kernels_avx2();
const KernelSet *kernels_neon();
const KernelSet *kernels_portable();

}  // namespace gk
