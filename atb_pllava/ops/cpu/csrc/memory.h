// Scratch memory, allocation failures, and advice to the system about memory.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

// An allocation failed. The call ends and its results are incomplete. The thread pool catches OutOfMemory in a worker
// and raises OutOfMemory in the calling thread. C entry points return the number of bytes, see status_of.
struct OutOfMemory {
    size_t bytes;
};

// Scratch memory that a thread keeps from call to call. Growing loses the contents.
class Scratch {
  public:
    ~Scratch() { std::free(data); }

    // Room for `count` elements, aligned to 4 KiB, uninitialised. Raises OutOfMemory.
    template <class T>
    T* get(size_t count) {
        const size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (wanted > size) {
            std::free(data);
            data = (char*)std::aligned_alloc(4096, wanted);
            size = data ? wanted : 0;
            if (!data) throw OutOfMemory{wanted};
        }
        return (T*)data;
    }

  private:
    char* data = nullptr;
    size_t size = 0;
};

// A slot, a block number or a context length lies outside of the KV cache. The call has written nothing.
struct OutOfRange {};

constexpr int64_t OUT_OF_RANGE = -1;  // _OUT_OF_RANGE in ops/cpu/backend.py

// The return value of the C entry points that may fail: 0, the bytes that could not be allocated, or OUT_OF_RANGE.
template <class F>
int64_t status_of(F&& work) {
    try {
        work();
        return 0;
    } catch (const OutOfMemory& error) {
        return (int64_t)error.bytes;
    } catch (const OutOfRange&) {
        return OUT_OF_RANGE;
    }
}

// Tells glibc to keep freed blocks of up to 1 GiB, for the activations of the next step. By default glibc returns them
// to the system, and getting the pages again takes a tenth of a large product's time. Older versions of glibc accept a
// threshold of at most 32 MiB. M_MMAP_THRESHOLD is set there too, because setting M_TRIM_THRESHOLD ends glibc's own
// adjustment of both thresholds.
void keep_freed_memory() {
#if defined(__GLIBC__)
    if (!mallopt(M_MMAP_THRESHOLD, 1 << 30)) mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

// Asks for huge pages of 2 MiB, for memory that is read from end to end. Systems without huge pages ignore the call.
void use_huge_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20;
    const uintptr_t first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + bytes) / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
