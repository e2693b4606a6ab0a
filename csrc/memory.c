/* Large arrays and scratch memory.  A layer's results are as large as those of the layer before: their memory is kept
   for it, since the system's pages come zeroed, one fault after the other, which may cost a fifth of an encoder's time.
   What is kept lies apart from the C library's heap, so that it can be given back whole. */
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif
#ifndef MAP_POPULATE
#define MAP_POPULATE 0
#endif
#define KEPT_BYTES (40u << 20)  /* at most; one array at most half of that */
#if defined(__SANITIZE_ADDRESS__)
#define SMALL_BYTES SIZE_MAX    /* all from the C library, whose arrays are watched */
#else
#define SMALL_BYTES ((size_t)32 << 10)  /* from the C library */
#endif
enum { HEADER = 64, MAX_KEPT = 64 };    /* bytes before an array, which hold its size; arrays */

static struct {
    pthread_mutex_t lock;
    void *kept[MAX_KEPT];       /* the oldest first */
    size_t n, bytes;
} memory = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Nobody waits for the lock, which a forked child may have inherited locked: then nothing is kept. */
static int lock(void) { return pthread_mutex_trylock(&memory.lock) == 0; }

static size_t *size_of(void *array) { return (size_t *)((char *)array - HEADER); }

static void *take_out(size_t i)
{
    void *array = memory.kept[i];
    memory.bytes -= *size_of(array);
    memory.n--;
    memmove(memory.kept + i, memory.kept + i + 1, (memory.n - i) * sizeof *memory.kept);
    return array;
}

/* The smallest that is kept, large enough and not much larger; NULL: none. */
static void *find(size_t bytes)
{
    size_t best = memory.n;
    for (size_t i = 0; i < memory.n; i++) {
        size_t size = *size_of(memory.kept[i]);
        if (size >= bytes && size - bytes <= bytes / 4 && (best == memory.n || size < *size_of(memory.kept[best])))
            best = i;
    }
    return best < memory.n ? take_out(best) : NULL;
}

static void *begin(void *block, size_t bytes)
{
    void *array = (char *)block + HEADER;
    *size_of(array) = bytes;
    return array;
}

void *mg_take_memory(size_t bytes)
{
    void *array = NULL;
    if (bytes < SMALL_BYTES)
        return posix_memalign(&array, HEADER, bytes + HEADER) == 0 ? begin(array, bytes) : NULL;
    if (lock()) {
        array = find(bytes);
        pthread_mutex_unlock(&memory.lock);
    }
    if (array != NULL)
        return array;
    void *block = mmap(NULL, bytes + HEADER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    return block == MAP_FAILED ? NULL : begin(block, bytes);
}

static void unmap(void *array) { munmap((char *)array - HEADER, *size_of(array) + HEADER); }

void mg_give_memory(void *array)
{
    size_t bytes = *size_of(array);
    if (bytes < SMALL_BYTES) {
        free((char *)array - HEADER);
        return;
    }
    if (bytes > KEPT_BYTES / 2 || !lock()) {
        unmap(array);
        return;
    }
    while (memory.n > 0 && (memory.n == MAX_KEPT || memory.bytes + bytes > KEPT_BYTES))
        unmap(take_out(0));
    memory.kept[memory.n++] = array;
    memory.bytes += bytes;
    pthread_mutex_unlock(&memory.lock);
}

void mg_release_memory(void)
{
    if (!lock())
        return;
    while (memory.n > 0)
        unmap(take_out(0));
    pthread_mutex_unlock(&memory.lock);
}
