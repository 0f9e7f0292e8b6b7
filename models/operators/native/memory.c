/* Advice to the system about memory that has not been touched yet. */

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

/* Ask for large pages for the pages that lie within these bytes; a system without them goes on as before. */
void infty_use_large_pages(char *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + bytes) / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
