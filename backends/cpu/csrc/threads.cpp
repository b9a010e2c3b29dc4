#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace graphwright {
namespace {

// A thread that has just worked looks for more for so long before it sleeps: waking one up takes about as long.
constexpr std::chrono::microseconds kLook{60};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Every thread begins with a share of its own, the same for every job of as many pieces: what it wrote in one job it
// finds in its cache in the next. A thread that is done takes what is left of the others' shares.
struct Job {
  static constexpr std::size_t kMost = 64;  // threads with a share of their own
  struct alignas(64) Share {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };

  void (*task)(void*, std::size_t);
  void* context;
  std::size_t shares;
  Share share[kMost]{};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // the first one, once `failed`

  Job(void (*task)(void*, std::size_t), void* context, std::size_t count, std::size_t threads)
      : task(task), context(context), shares(threads < kMost ? threads : kMost) {
    for (std::size_t i = 0; i < shares; ++i) {
      share[i].next.store(count * i / shares, std::memory_order_relaxed);
      share[i].end = count * (i + 1) / shares;
    }
  }

  void work(std::size_t thread) noexcept {
    try {
      for (std::size_t i = 0; i < shares; ++i) {
        Share& from = share[(thread + i) % shares];
        for (std::size_t index = from.next.fetch_add(1); index < from.end; index = from.next.fetch_add(1)) {
          task(context, index);
        }
      }
    } catch (...) {
      for (std::size_t i = 0; i < shares; ++i) share[i].next.store(share[i].end);  // nobody begins more of it
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : workers_) thread.join();
  }

  void run(Job& job, std::size_t helpers) {
    const std::lock_guard turn(turn_);
    try {
      while (workers_.size() < helpers) {
        const std::size_t rank = workers_.size();
        workers_.emplace_back([this, rank] { serve(rank); });
      }
    } catch (const std::system_error&) {
      helpers = workers_.size();  // the system gives no more threads: those there are do the work
    }
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      helpers_ = helpers;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    job.work(0);
    {
      // All of it has been begun: who has not come yet (waking up takes long) need not come any more.
      const std::lock_guard lock(mutex_);
      job_ = nullptr;
    }
    const auto until = std::chrono::steady_clock::now() + kLook;
    while (busy_.load(std::memory_order_acquire) != 0 && std::chrono::steady_clock::now() < until) relax();
    for (std::size_t left = busy_.load(); left != 0; left = busy_.load()) busy_.wait(left);
  }

 private:
  void serve(std::size_t rank) {
    std::uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kLook;
      while (round_.load() == seen && std::chrono::steady_clock::now() < until) relax();
      Job* job = nullptr;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || round_.load() != seen; });
        if (stop_) return;
        seen = round_.load();
        if (rank < helpers_ && job_ != nullptr) {
          job = job_;
          busy_.fetch_add(1);
        }
      }
      if (job == nullptr) continue;
      inside = true;
      job->work(rank + 1);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_all();
    }
  }

  std::mutex turn_;   // held by the caller whose job it is
  std::mutex mutex_;  // guards what the workers sleep on
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<std::uint64_t> round_{0};
  std::atomic<std::size_t> busy_{0};
  Job* job_ = nullptr;
  std::size_t helpers_ = 0;
  bool stop_ = false;

 public:
  static thread_local bool inside;  // on a worker, or within a job on the caller's thread
};

thread_local bool Pool::inside = false;

// A forked child has none of its parent's threads: it gets a pool of its own, and the parent's is left alone.
std::unique_ptr<Pool>& pool() {
  static std::unique_ptr<Pool> found = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
      pool().release();  // its threads are not in this process, so they can be neither used nor joined
      pool() = std::make_unique<Pool>();
    });
#endif
    return std::make_unique<Pool>();
  }();
  return found;
}

}  // namespace

void parallel_for(std::size_t count, std::size_t threads, void (*task)(void*, std::size_t), void* context) {
  const std::size_t used = threads < count ? threads : count;
  if (used <= 1 || Pool::inside) {
    for (std::size_t index = 0; index < count; ++index) task(context, index);
    return;
  }
  Job job(task, context, count, used);
  Pool::inside = true;
  pool()->run(job, used - 1);
  Pool::inside = false;
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace graphwright
