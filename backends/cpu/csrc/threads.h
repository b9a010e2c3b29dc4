// One pool of threads for the process.
#pragma once

#include <cstddef>

namespace graphwright {

// Calls `task(context, index)` for every index below `count`, on up to `threads` threads, the caller's among them.
// Several callers at once take turns; a task that itself asks for threads runs on its own thread alone. Idle threads
// sleep: they look for more work for a few microseconds only. What a task throws (memory may run out) is thrown here,
// once the others have stopped.
void parallel_for(std::size_t count, std::size_t threads, void (*task)(void* context, std::size_t index), void* context);

// The same for anything that can be called with an index.
template <typename Function>
void parallel_for(std::size_t count, std::size_t threads, const Function& function) {
  parallel_for(
      count, threads, [](void* context, std::size_t index) { (*static_cast<const Function*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace graphwright
