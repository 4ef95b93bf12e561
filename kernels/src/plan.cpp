#include "plan.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <cstring>
#include <initializer_list>

#include "threads.h"

namespace gk {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A grow-only aligned buffer per thread; freed with the thread.
struct Buffer {
  float *data = nullptr;
  int64_t size = 0;
  float *get(int64_t floats) {
    if (floats > size) {
      std::free(data);
      data = nullptr;
      size = 0;
      void *fresh = nullptr;
      if (posix_memalign(&fresh, 64, size_t(floats) * sizeof(float)) != 0) return nullptr;
      data = static_cast<float *>(fresh);
      size = floats;
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};
thread_local Buffer scratch_buffer, partial_buffer;

struct Job {
  const Problem *p;
  const KernelSet *kernels;
  Plan plan;
  int64_t scratch, tasks, stride;
  float *partials;
  std::atomic<int32_t> *left;  // splits of each unit still running
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};

  void run_task(int64_t index, float *buffer) {
    const int64_t unit = index / plan.splits, split = index % plan.splits;
    const int64_t pairs = p->batch * p->kv_heads;
    // The last row block first: under a causal mask it is the longest.
    const int64_t block = plan.row_blocks - 1 - unit / pairs, pair = unit % pairs;
    Task t;
    t.batch = pair / p->kv_heads;
    t.kv_head = pair % p->kv_heads;
    t.row0 = block * plan.task_rows;
    t.row1 = t.row0 + plan.task_rows < plan.rows ? t.row0 + plan.task_rows : plan.rows;
    t.key0 = p->key_begin(t.batch);
    t.key1 = p->key_end(t.batch);
    t.partial = nullptr;
    if (plan.splits == 1) return kernels->attend(*p, t, buffer);

    const int64_t keys = t.key1 > t.key0 ? t.key1 - t.key0 : 0;
    const int64_t first = t.key0;
    t.key0 = first + keys / plan.splits * split + keys % plan.splits * split / plan.splits;
    t.key1 = first + keys / plan.splits * (split + 1) +
             keys % plan.splits * (split + 1) / plan.splits;
    float *const mine = partials + unit * plan.splits * stride;
    t.partial = mine + split * stride;
    kernels->attend(*p, t, buffer);
    // Whoever finishes a unit last merges its parts.
    if (left[unit].fetch_sub(1, std::memory_order_acq_rel) == 1)
      kernels->combine(*p, t, mine, plan.splits, stride);
  }
};

void work(void *context) {
  Job &job = *static_cast<Job *>(context);
  float *const buffer = scratch_buffer.get(job.scratch);
  if (!buffer) {
    job.failed = true;
    return;
  }
  for (;;) {
    const int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= job.tasks) return;
    job.run_task(index, buffer);
  }
}

}  // namespace

Plan make_plan(const Problem &p, int threads, int64_t tile_rows) {
  Plan plan;
  plan.rows = p.tq * p.group();
  const int64_t pairs = p.batch * p.kv_heads;
  plan.task_rows = plan.rows;
  if (plan.rows > 4 * tile_rows) {
    plan.task_rows = 32 * tile_rows;
    while (plan.task_rows > 8 * tile_rows &&
           pairs * ceil_div(plan.rows, plan.task_rows) < 4 * threads)
      plan.task_rows -= 4 * tile_rows;
    plan.row_blocks = ceil_div(plan.rows, plan.task_rows);
    // Equal blocks, in whole tiles.
    plan.task_rows = ceil_div(ceil_div(plan.rows, plan.row_blocks), tile_rows) * tile_rows;
  }
  plan.row_blocks = ceil_div(plan.rows, plan.task_rows);
  plan.units = pairs * plan.row_blocks;

  // A thread for every 20 microseconds or so of work; waking one costs several.
  const int64_t bytes = pairs * p.tk * (p.d_qk + p.d_v) * (p.dtype == F32 ? 4 : 2);
  const double flops = 2.0 * double(p.batch * p.heads * p.tq) * double(p.tk) * double(p.d_qk + p.d_v);
  const double microseconds = double(bytes) / 2e4 + flops / 5e4;
  const double useful = microseconds / 20.0 + 1.0;
  plan.threads = useful < threads ? int(useful) : threads;
  if (plan.threads < 1) plan.threads = 1;

  plan.splits = 1;
  if (plan.threads > 1 && plan.units < 16 * plan.threads) {
    // Enough parts for an even load, none so short that merging them shows.
    const int64_t shortest = plan.task_rows > 4 * tile_rows ? 2048 : 256;
    const int64_t wanted = ceil_div(16 * plan.threads, plan.units);
    const int64_t most = p.tk / shortest;
    plan.splits = wanted < most ? wanted : most;
    if (plan.splits < 1) plan.splits = 1;
    if (plan.units >= plan.threads && plan.units % plan.threads == 0 && plan.splits < 2)
      plan.splits = 1;
  }
  return plan;
}

bool run_problem(const Problem &p, const KernelSet &kernels, int threads) {
  Job job;
  job.p = &p;
  job.kernels = &kernels;
  job.plan = make_plan(p, threads, kernels.tile_rows);
  job.scratch = kernels.scratch_floats(p, job.plan.task_rows);
  job.tasks = job.plan.units * job.plan.splits;
  job.partials = nullptr;
  job.left = nullptr;
  job.stride = partial_floats(job.plan.task_rows, p.d_v);
  if (job.plan.splits > 1) {
    // Counters behind the partial results, in the caller's own buffer.
    const int64_t floats = job.tasks * job.stride;
    float *const buffer = partial_buffer.get(floats + job.plan.units);
    if (!buffer) return false;
    job.partials = buffer;
    static_assert(sizeof(std::atomic<int32_t>) == sizeof(float), "counters share the buffer");
    job.left = reinterpret_cast<std::atomic<int32_t> *>(buffer + floats);
    for (int64_t i = 0; i < job.plan.units; ++i)
      new (&job.left[i]) std::atomic<int32_t>(int32_t(job.plan.splits));
  }
  const int most = job.tasks < job.plan.threads ? int(job.tasks) : job.plan.threads;
  run_parallel(most, work, &job);
  // Threads that got no memory left their tasks to the others; if none got any, say so.
  return job.next.load() >= job.tasks;
}

const KernelSet *kernels_named(const char *name) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("fma")
               ? kernels_avx512()
               : nullptr;
  if (!std::strcmp(name, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c")
               ? kernels_avx2()
               : nullptr;
#endif
  if (!std::strcmp(name, "neon")) return kernels_neon();
  if (!std::strcmp(name, "portable")) return kernels_portable();
  return nullptr;
}

const KernelSet *best_kernels() {
  for (const char *name : {"avx512", "avx2", "neon", "portable"})
    if (const KernelSet *set = kernels_named(name)) return set;
  return nullptr;
}

}  // namespace gk
