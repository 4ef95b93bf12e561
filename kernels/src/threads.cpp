#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace gk {
namespace {

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp{nullptr};

// Sleeping workers, woken for one job at a time. Only grows; a caller that finds it busy works
// alone. Never destroyed: a worker may outlive static destructors at exit.
class Pool {
 public:
  bool run(int threads, void (*body)(void *), void *context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(threads - 1);
    const int helpers = threads - 1 < size_ ? threads - 1 : size_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      wanted_ = helpers;
      running_ = helpers;
    }
    wake_.notify_all();
    body(context);
    std::unique_lock<std::mutex> lock(mutex_);
    // Workers that have not started yet are not needed any more: the job is done.
    running_ -= wanted_;
    wanted_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void grow(int size) {
    while (size_ < size) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error &) {
        return;  // no more threads to be had: fewer do the work
      }
      ++size_;
    }
  }
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      const auto body = body_;
      void *const context = context_;
      lock.unlock();
      body(context);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  void (*body_)(void *) = nullptr;
  void *context_ = nullptr;
  int wanted_ = 0, running_ = 0, size_ = 0;
};

std::atomic<Pool *> pool{nullptr};

Pool *the_pool() {
  Pool *p = pool.load();
  if (p) return p;
  Pool *fresh = new Pool;
  if (pool.compare_exchange_strong(p, fresh)) return fresh;
  delete fresh;
  return p;
}

#if !defined(_WIN32)
// A child of fork has one thread: PyTorch's OpenMP threads and our own did not come along.
void in_forked_child() {
  gomp.store(nullptr);
  pool.store(nullptr);
}
const int fork_handler = pthread_atfork(nullptr, nullptr, in_forked_child);
#endif

}  // namespace

void set_openmp(void *address) { gomp.store(reinterpret_cast<GompParallel>(address)); }
const char *thread_backend() { return gomp.load() ? "openmp" : "pool"; }

void run_parallel(int threads, void (*body)(void *), void *context) {
  if (threads > 1) {
    if (const GompParallel parallel = gomp.load()) {
      parallel(body, context, unsigned(threads), 0);
      return;
    }
    if (the_pool()->run(threads, body, context)) return;
  }
  body(context);
}

}  // namespace gk
