/* A tape is a list of steps, each a kernel with its arrays and numbers. All threads run the same list: a kernel takes
 * the share of the work that belongs to `rank` of `threads`, and nobody begins a step before everybody has finished the
 * one before it. A whole token is one tape: one call from Python, one wake-up of the threads.
 */
#ifndef SMEDJAN_TAPE_H
#define SMEDJAN_TAPE_H

#include <stdint.h>

#define STEP_ARRAYS 16
#define STEP_NUMBERS 12
#define STEP_REALS 4

typedef struct step step;
typedef void kernel(const step *s, int rank, int threads);

struct step {
    kernel *run;
    void *array[STEP_ARRAYS];      /* optional ones are NULL */
    int64_t number[STEP_NUMBERS];
    float real[STEP_REALS];
};

void smedjan_run(const step *steps, int64_t count, int64_t threads);

/* [*from, *to): the share of `count` items that belongs to `rank`, in multiples of `unit`. */
static inline void share(int64_t count, int64_t unit, int rank, int threads, int64_t *from, int64_t *to)
{
    const int64_t units = (count + unit - 1) / unit;
    const int64_t first = units * rank / threads * unit, last = units * (rank + 1) / threads * unit;
    *from = first < count ? first : count;
    *to = last < count ? last : count;
}

#endif
