/* The thread pool.  A caller publishes one job, works on it himself, closes it when no task is left, and waits only for
   those workers that have joined: one that wakes too late, or is not scheduled on a busy machine, is not waited for.
   Workers spin for SPIN_NS after a job, since the next one often follows at once, then sleep.

   One job at a time: a caller who finds the pool busy does all of his tasks himself, in his own thread.  A forked child
   inherits no workers; it starts its own when it first needs them. */
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define SPIN_NS 50000           /* of a worker without a job */
#define WAIT_NS 10000           /* of a caller whose last workers finish; then he sleeps and leaves them his core */
#define STACK_BYTES (256 * 1024)
#define OPEN 0x10000u           /* state: the job may be joined; below it the number of workers inside */

static struct {
    pthread_mutex_t busy;       /* held by the caller whose job it is, and while workers start or stop */
    pthread_mutex_t sleep;
    pthread_cond_t work, done;
    atomic_uint generation;     /* of the job; counts up at each one */
    atomic_uint state, sleepers, waiting, stop;
    atomic_int caller_cpu;      /* on which the caller ran when he last woke workers */
    atomic_size_t wanted;       /* threads, the caller included */
    size_t running;             /* workers; guarded by busy */
    pthread_t threads[MG_MAX_THREADS];
    mg_task task;
    void *context;
    size_t n_tasks, n_workers;
    atomic_size_t next;
} pool = {
    .busy = PTHREAD_MUTEX_INITIALIZER,
    .sleep = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
    .wanted = 1,
};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Waits until *word is no longer what it was, or for so many nanoseconds; -> its value. */
static unsigned spin(atomic_uint *word, unsigned was, long long ns)
{
    unsigned value;
    long long end = now_ns() + ns;
    do {
        for (int i = 0; i < 16; i++) {
            value = atomic_load(word);
            if (value != was)
                return value;
            relax();
        }
    } while (now_ns() < end);
    return value;
}

static void run_tasks(size_t worker)
{
    size_t i;
    while ((i = atomic_fetch_add(&pool.next, 1)) < pool.n_tasks)
        pool.task(pool.context, i, worker);
}

static int join(size_t worker)
{
    unsigned state = atomic_load(&pool.state);
    do {
        if (!(state & OPEN))
            return 0;
    } while (!atomic_compare_exchange_weak(&pool.state, &state, state + 1));
    return worker < pool.n_workers ? 2 : 1;
}

static void leave(void)
{
    if (atomic_fetch_sub(&pool.state, 1) == 1 && atomic_load(&pool.waiting)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.sleep);
    }
}

/* Linux may wake a worker on the caller's own processor, though another one is idle, and go on doing so: the two then
   take turns, and are slower than the caller alone.  Forbidding that processor for a moment moves this thread. */
static void leave_caller_cpu(void)
{
#ifdef __linux__
    cpu_set_t allowed, others;
    int cpu = sched_getcpu();
    if (cpu < 0 || cpu != atomic_load(&pool.caller_cpu) || sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return;
    others = allowed;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0)
        sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

static void await_work(unsigned seen)
{
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.generation) == seen)
        pthread_cond_wait(&pool.work, &pool.sleep);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.sleep);
    leave_caller_cpu();
}

static void *work(void *arg)
{
    size_t worker = (size_t)(uintptr_t)arg;
    unsigned seen = 0;
    for (;;) {
        if (spin(&pool.generation, seen, SPIN_NS) == seen)
            await_work(seen);
        seen = atomic_load(&pool.generation);
        if (atomic_load(&pool.stop))
            return NULL;
        int joined = join(worker);
        if (joined == 2)
            run_tasks(worker);
        if (joined)
            leave();
    }
}

static void announce(void)
{
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleepers)) {
#ifdef __linux__
        atomic_store(&pool.caller_cpu, sched_getcpu());
#endif
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.sleep);
    }
}

static void in_child(void)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    pool.busy = pool.sleep = mutex;
    pool.work = pool.done = cond;
    pool.running = 0;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.state, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.waiting, 0);
    atomic_store(&pool.stop, 0);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, in_child); }

/* Brings the number of workers to what is wanted, as far as the system grants threads.  The caller holds busy. */
static void resize(void)
{
    size_t target = atomic_load(&pool.wanted) - 1;
    pthread_attr_t attr;
    sigset_t all, before;
    if (pool.running > target) {
        atomic_store(&pool.stop, 1);
        announce();
        while (pool.running > 0)
            pthread_join(pool.threads[--pool.running], NULL);
        atomic_store(&pool.stop, 0);
        atomic_store(&pool.generation, 0);
    }
    if (pthread_attr_init(&attr) != 0)
        return;
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);    /* which the workers inherit: signals are for the others */
    while (pool.running < target) {
        void *worker = (void *)(uintptr_t)(pool.running + 1);
        if (pthread_create(&pool.threads[pool.running], &attr, work, worker) != 0)
            break;
        pool.running++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

static void run_shared(mg_task task, void *context, size_t n_tasks, size_t n_workers)
{
    pool.task = task;
    pool.context = context;
    pool.n_tasks = n_tasks;
    pool.n_workers = n_workers;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.state, OPEN);
    announce();
    run_tasks(0);
    unsigned inside = atomic_fetch_and(&pool.state, ~OPEN) & ~OPEN;
    long long end = now_ns() + WAIT_NS;
    while (inside != 0 && now_ns() < end)
        inside = spin(&pool.state, inside, WAIT_NS);
    if (inside != 0) {
        pthread_mutex_lock(&pool.sleep);
        atomic_exchange(&pool.waiting, 1);  /* QEMU's Arm lets the load below pass a mere store: then nobody wakes us */
        while (atomic_load(&pool.state) != 0)
            pthread_cond_wait(&pool.done, &pool.sleep);
        atomic_store(&pool.waiting, 0);
        pthread_mutex_unlock(&pool.sleep);
    }
}

void mg_run(mg_task task, void *context, size_t n_tasks, size_t n_workers)
{
    if (n_tasks > 1 && n_workers > 1 && mg_threads() > 1 && pthread_mutex_trylock(&pool.busy) == 0) {
        if (pool.running + 1 != mg_threads())
            resize();
        run_shared(task, context, n_tasks, n_workers);
        pthread_mutex_unlock(&pool.busy);
        return;
    }
    for (size_t i = 0; i < n_tasks; i++)
        task(context, i, 0);
}

size_t mg_threads(void) { return atomic_load(&pool.wanted); }

enum mg_status mg_set_threads(size_t n)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (n < 1 || n > MG_MAX_THREADS)
        return MG_BAD_VALUE;
    pthread_once(&once, watch_forks);   /* before the first lock, which a child would inherit locked */
    pthread_mutex_lock(&pool.busy);
    atomic_store(&pool.wanted, n);
    if (pool.running > n - 1)
        resize();
    pthread_mutex_unlock(&pool.busy);
    return MG_OK;
}
