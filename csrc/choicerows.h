/* The choice among logits as a kernel for rows.h: suppression, the largest, and the sum of exponentials. */
#ifndef MG_CHOICEROWS_H
#define MG_CHOICEROWS_H

#include "lanes.h"

struct mg_choice {
    int64_t *ids;               /* and the others, as mg_choose has them */
    float *values;
    double *totals;
    float *logits;
    const int64_t *never, *ranges;
    size_t n_never, begin, k, n;
    int prefer;
};

MG_INLINE void mg_forbid(float *x, size_t first, size_t end)
{
    for (size_t i = first; i < end; i++)
        x[i] = -INFINITY;
}

/* sum_i exp(x[i] - top), where no x is above top; 0 where that is -infinity; not a number if an x is none */
MG_INLINE double mg_sum_exponentials(const float *x, float top, size_t n)
{
    double sum = 0.0;
    int none = 0;
    for (size_t start = 0; start < n; start += MG_SUM_BLOCK) {
        size_t end = mg_min(start + MG_SUM_BLOCK, n), i = start;
        float lanes[MG_LANES] = {0};
        for (; i + MG_LANES <= end; i += MG_LANES)
            for (int l = 0; l < MG_LANES; l++) {
                lanes[l] += mg_exp2((x[i + l] - top) * (float)MG_LOG2_E);
                none |= x[i + l] != x[i + l];
            }
        for (; i < end; i++) {
            none |= x[i] != x[i];
            lanes[0] += mg_exp2((x[i] - top) * (float)MG_LOG2_E);
        }
        sum += (double)mg_total(lanes);
    }
    return none ? NAN : sum;
}

/* The first x that is top; 0 if none is. */
MG_INLINE size_t mg_first(const float *x, float top, size_t n)
{
    for (size_t start = 0; start < n; start += MG_SUM_BLOCK) {
        size_t end = mg_min(start + MG_SUM_BLOCK, n);
        int found = 0;
        for (size_t i = start; i < end; i++)
            found |= x[i] == top;
        for (size_t i = start; found && i < end; i++)
            if (x[i] == top)
                return i;
    }
    return 0;
}

/* Whether x[middle] to x[last-1] together are likelier than the largest of x[first] to x[end-1]. */
MG_INLINE int mg_outweigh(const float *x, size_t first, size_t end, size_t middle, size_t last)
{
    if (middle >= last)
        return 0;
    float top = mg_largest(x + middle, last - middle);
    float text = first < end ? mg_largest(x + first, end - first) : -INFINITY;
    return top > -INFINITY && (double)top + log(mg_sum_exponentials(x + middle, top, last - middle)) > (double)text;
}

MG_INLINE void mg_choose_row(const struct mg_choice *j, size_t row)
{
    float *x = j->logits + row * j->n, *values = j->values + row * j->k;
    const int64_t *ranges = j->ranges + 4 * row;
    int64_t *ids = j->ids + row * j->k;
    size_t first = (size_t)ranges[0], end = (size_t)ranges[1], middle = (size_t)ranges[2], last = (size_t)ranges[3];
    for (size_t i = 0; i < j->n_never; i++)
        x[j->never[i]] = -INFINITY;
    mg_forbid(x, 0, first);
    mg_forbid(x, end, j->begin);
    mg_forbid(x, j->begin, middle);
    mg_forbid(x, last, j->n);
    if (j->prefer && mg_outweigh(x, first, end, middle, last))
        mg_forbid(x, first, end);
    for (size_t i = 0; i < j->k; i++) {
        values[i] = mg_largest(x, j->n);
        ids[i] = (int64_t)mg_first(x, values[i], j->n);
        x[ids[i]] = -INFINITY;
    }
    for (size_t i = j->k; i-- > 1;)     /* what was hidden from the next ones */
        x[ids[i]] = values[i];
    j->totals[row] = values[0] == values[0] ? 1.0 + mg_sum_exponentials(x, values[0], j->n) : NAN;
    x[ids[0]] = values[0];
}

MG_INLINE void mg_choose_rows(const void *context, size_t first, size_t end, void *room)
{
    (void)room;
    for (size_t row = first; row < end; row++)
        mg_choose_row(context, row);
}

#endif
