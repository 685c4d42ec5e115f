/* The threads that run tapes. The caller is rank 0; the others are started once, spin for a moment when a tape ends,
 * since the next one usually follows at once, and then sleep. They are threads of our own: a second OpenMP runtime
 * beside torch's would keep a second set of workers spinning.
 */
#define _GNU_SOURCE
#include "tape.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MAX_THREADS 255     /* what a ticket's low byte holds */
#define SPINS 20000         /* about 1 ms: longer than the pause between two tokens' tapes */
#define YIELD_AFTER 2000

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ __volatile__("yield")
#else
#define RELAX() ((void)0)
#endif

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* one tape at a time */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int started; /* workers that live */
static long born[MAX_THREADS]; /* the ticket that was the last one when a worker was started */
static atomic_int sleeping;
static atomic_long ticket; /* rises with each tape that has work for workers; the low byte is its number of threads */

static const step *tape;
static int64_t tape_length;
static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_int phase;

static void barrier(int threads)
{
    if (threads == 1)
        return;
    const int now = atomic_load_explicit(&phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&phase, now + 1, memory_order_release);
        return;
    }
    for (int spin = 0; atomic_load_explicit(&phase, memory_order_acquire) == now; spin++) {
        if (spin > YIELD_AFTER)
            sched_yield(); /* more threads than free cores */
        else
            RELAX();
    }
}

static void play(int rank, int threads)
{
    for (int64_t i = 0; i < tape_length; i++) {
        tape[i].run(&tape[i], rank, threads);
        barrier(threads);
    }
}

static void *worker(void *given)
{
    const int rank = (int)(intptr_t)given;
    long seen = born[rank], now;
    for (;;) {
        int spin = 0;
        while ((now = atomic_load_explicit(&ticket, memory_order_acquire)) == seen && spin++ < SPINS)
            RELAX();
        if (now == seen) {
            pthread_mutex_lock(&lock);
            atomic_fetch_add(&sleeping, 1);
            while ((now = atomic_load(&ticket)) == seen)
                pthread_cond_wait(&wake, &lock);
            atomic_fetch_sub(&sleeping, 1);
            pthread_mutex_unlock(&lock);
        }
        seen = now;
        /* The tape cannot be taken away from a rank that it waits for; the others must not look at it. */
        const int threads = (int)(now & 255);
        if (rank < threads)
            play(rank, threads);
    }
    return NULL;
}

/* A forked child has none of the threads. */
static void after_fork(void)
{
    started = 0;
    atomic_store(&sleeping, 0);
    atomic_store(&arrived, 0);
    pthread_mutex_init(&owner, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static int start(int wanted)
{
    static int registered;
    if (!registered) {
        pthread_atfork(NULL, NULL, after_fork);
        registered = 1;
    }
    for (; started < wanted; started++) {
        pthread_t thread;
        pthread_attr_t attr;
        born[started + 1] = atomic_load(&ticket);
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        const int failed = pthread_create(&thread, &attr, worker, (void *)(intptr_t)(started + 1));
        pthread_attr_destroy(&attr);
        if (failed)
            break;
    }
    return started;
}

void smedjan_run(const step *steps, int64_t count, int64_t threads)
{
    pthread_mutex_lock(&owner);
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads > 1 && started < threads - 1)
        threads = start((int)threads - 1) + 1;
    tape = steps;
    tape_length = count;
    if (threads > 1) {
        const long last = atomic_load(&ticket);
        atomic_store(&ticket, ((last >> 8) + 1) << 8 | (long)threads);
        if (atomic_load(&sleeping)) {
            pthread_mutex_lock(&lock);
            pthread_cond_broadcast(&wake);
            pthread_mutex_unlock(&lock);
        }
    }
    play(0, (int)threads);
    pthread_mutex_unlock(&owner);
}
