// The thread pool that all kernels share.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>

#include "memory.h"

namespace {

// Workers take task numbers from a shared counter, so a worker that wakes late does not delay the others. After a call
// workers spin for 60 us before they sleep, because a decode step makes a hundred short calls.
class Pool {
  public:
    // Calls task(i) for every i below `count`, in at most `threads` threads, and returns when all calls have returned.
    // The calling thread works too, and works alone if another thread of the program is using the pool.
    // Raises OutOfMemory if a task raises OutOfMemory. Some tasks have not run then.
    template <class F>
    void run(int64_t count, int threads, F&& task) {
        threads = (int)std::min<int64_t>(threads, count);
        if (threads <= 1 || !in_use.try_lock()) {
            for (int64_t i = 0; i < count; i++) task(i);
            return;
        }
        while (num_workers < threads - 1 && start_worker()) {
        }
        call = [](void* f, int64_t i) { (*(typename std::remove_reference<F>::type*)f)(i); };
        context = (void*)&task;
        task_count = count;
        tickets = threads - 1;
        next_task = 0;
        open = true;
        generation++;
        if (sleeping) {
            std::lock_guard<std::mutex> guard(wake_lock);
            wake.notify_all();
        }
        work();
        open = false;
        for (int spins = 0; working; spins++) spins < 4000 ? relax() : std::this_thread::yield();
        const size_t bytes = missing.exchange(0);
        in_use.unlock();
        if (bytes) throw OutOfMemory{bytes};
    }

  private:
    std::mutex in_use;
    int num_workers = 0;

    // The current call, in which at most `tickets` workers take part.
    void (*call)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int64_t task_count = 0;
    std::atomic<int64_t> next_task{0};
    std::atomic<int> tickets{0};
    std::atomic<int> working{0};
    std::atomic<size_t> missing{0};  // bytes of an OutOfMemory
    std::atomic<bool> open{false};

    // The number of the call. Workers wait until `generation` changes.
    std::atomic<uint64_t> generation{0};
    std::atomic<int> sleeping{0};
    std::mutex wake_lock;
    std::condition_variable wake;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void work() {
        try {
            for (int64_t i; (i = next_task++) < task_count;) call(context, i);
        } catch (const OutOfMemory& error) {
            missing = error.bytes;
            next_task = task_count;
        }
    }

    // Returns false if the system grants no more threads. The threads that exist then do the work.
    bool start_worker() {
        try {
            std::thread([this, seen = generation.load()] { worker_loop(seen); }).detach();
        } catch (const std::exception&) {
            return false;
        }
        num_workers++;
        return true;
    }

    void worker_loop(uint64_t seen) {
        for (;;) {
            wait_for_call(seen);
            seen = generation;
            working++;  // before reading `open`: run() clears `open` first and reads `working` after
            if (open && tickets-- > 0) work();
            working--;
        }
    }

    void wait_for_call(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(60);
        for (int i = 1; generation == seen; i++) {
            relax();
            if (i % 64 == 0 && std::chrono::steady_clock::now() > until) {
                std::unique_lock<std::mutex> guard(wake_lock);
                sleeping++;
                wake.wait(guard, [&] { return generation != seen; });
                sleeping--;
            }
        }
    }
};

// The pool of this process. The pool is never destroyed, because its threads may outlive static destructors. A forked
// child inherits no threads and gets a new pool.
Pool* pool() {
    static Pool* instance = nullptr;
    static std::once_flag once;
    std::call_once(once, [] {
        instance = new Pool;
        pthread_atfork(nullptr, nullptr, [] { instance = new Pool; });
    });
    return instance;
}

}  // namespace
