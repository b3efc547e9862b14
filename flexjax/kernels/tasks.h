// Work in numbered parts, which threads of XLA's pool take one after the other.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace flexjax {

template <typename Act>
class Tasks {
 public:
  Tasks(int64_t count, Act act) : count_(count), act_(std::move(act)) {}

  void Take() {
    for (int64_t index; (index = taken_.fetch_add(1)) < count_;) {
      if (!act_(index)) has_failed_ = true;
      if (done_.fetch_add(1) + 1 == count_) done_.notify_all();
    }
  }

  // Waits until all are done; whether all are well.
  bool Wait() {
    for (int64_t done; (done = done_.load()) < count_;) done_.wait(done);
    return !has_failed_;
  }

 private:
  const int64_t count_;
  const Act act_;
  std::atomic<int64_t> taken_ = 0, done_ = 0;
  std::atomic<bool> has_failed_ = false;
};

inline int64_t NumThreads(const xla::ffi::ThreadPool& pool) {
  return std::max<int64_t>(1, pool.num_threads());
}

// Calls `act` with each index below `count`; whether it always returned true. What it
// refers to must be there until then. Threads of the pool help the one that calls, which
// takes parts too: so it never waits for a thread that has not begun.
template <typename Act>
bool InParallel(xla::ffi::ThreadPool& pool, int64_t count, Act act) {
  auto tasks = std::make_shared<Tasks<Act>>(count, std::move(act));
  for (int64_t i = 1; i < std::min(count, NumThreads(pool)); ++i) {
    pool.Schedule([tasks] { tasks->Take(); });
  }
  tasks->Take();
  return tasks->Wait();
}

}  // namespace flexjax
