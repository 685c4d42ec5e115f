/* Tapes on the threads of the OpenMP runtime that torch has loaded already. Between two matrix products its workers
 * spin for the next one: other threads would have to take their cores from them.
 */
#include "tape.h"

#include <stddef.h>

typedef void parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int number(void);

static parallel *begin;    /* GOMP_parallel */
static number *rank_here;  /* omp_get_thread_num */
static number *team_size;  /* omp_get_num_threads */

typedef struct {
    const step *steps;
    int64_t count;
} job;

static void body(void *given)
{
    const job *mine = given;
    const int rank = rank_here(), threads = team_size();
    for (int64_t i = 0; i < mine->count; i++)
        mine->steps[i].run(&mine->steps[i], rank, threads);
}

void smedjan_team_use(void *parallel_symbol, void *rank_symbol, void *size_symbol)
{
    begin = (parallel *)parallel_symbol;
    rank_here = (number *)rank_symbol;
    team_size = (number *)size_symbol;
}

/* Steps of which none reads what another one writes: nobody waits between them. */
void smedjan_team(const step *steps, int64_t count, int64_t threads)
{
    if (begin == NULL) {
        smedjan_run(steps, count, threads);
        return;
    }
    job mine = {steps, count};
    begin(body, &mine, (unsigned)threads, 0);
}
