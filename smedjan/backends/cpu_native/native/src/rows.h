/* Kernels over rows, written once for both dtypes of activations: each is a macro over a suffix, and `ROWS` gives the
 * share of a rank. A row of an array begins `stride` elements behind the one before it, its elements lie side by side.
 */
#ifndef SMEDJAN_ROWS_H
#define SMEDJAN_ROWS_H

#include "scalar.h"
#include "tape.h"
#include "vector.h"

#define KERNEL __attribute__((visibility("default"))) void
/* A result may lie where an operand lay, element for element: each is read before its place is written. */
#define EACH_ELEMENT _Pragma("GCC ivdep")

#define FOR_ROWS(count)                                                                                                \
    int64_t first_row, last_row;                                                                                       \
    share(count, 1, rank, threads, &first_row, &last_row);                                                             \
    for (int64_t row = first_row; row < last_row; row++)

#endif
