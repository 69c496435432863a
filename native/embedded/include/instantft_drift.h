/* Has the world changed? Two detectors that look at one number a sample, in memory of fixed size.
 *
 * Is: plain C11; the detectors of a watcher on a Linux board (src/instantft/watch/detectors.py, the readable form):
 * alarms and scores of ADWIN and CUSUM are alike to the bit. The caller owns the memory. No malloc, no globals, of libm
 * sqrt and log (exp in instantft_doubt).
 * Is not: tied to instantft_device.h; either can be used alone. 2 KB of flash on a Cortex-M4F, linked only if called.
 *
 *     instantft_errors    with labels: ADWIN on right and wrong answers; knows nothing beforehand
 *     instantft_cusum     without: CUSUM on a number whose mean and deviation are known, as doubt or distance
 *
 * Both say how many values belong to the new world.
 */
#ifndef INSTANTFT_DRIFT_H
#define INSTANTFT_DRIFT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    INSTANTFT_DRIFT_ROWS = 16, /* buckets of 1, 2, 4, … 2^15 answers: a window of 5·(2^16 - 1) at most */
    INSTANTFT_DRIFT_ROW = 5,   /* buckets of one size */
};

/* Of the newest answers, in buckets of 2^i, how many were wrong; 232 bytes. */
typedef struct instantft_errors {
    uint32_t n, wrong;                                            /* in the window; wrong / n is its error rate */
    double score;                                                 /* of the last comparison; above 1 is a change */
    uint16_t bucket[INSTANTFT_DRIFT_ROWS][INSTANTFT_DRIFT_ROW + 1]; /* row i: of 2^i answers each, oldest first */
    uint8_t buckets[INSTANTFT_DRIFT_ROWS];
    uint8_t since; /* answers since the last comparison */
} instantft_errors;

void instantft_errors_init(instantft_errors *d);
/* Put n answers of this error rate (0 to 1) before all others: what is known of the world so far. */
void instantft_errors_expect(instantft_errors *d, double rate, uint32_t n);
/* The next answer; 1 where the error rate has risen, and the window holds the answers since, else 0. */
int instantft_errors_add(instantft_errors *d, int wrong);

typedef struct instantft_cusum {
    double mean, deviation; /* of the world before */
    double sum[2];          /* of rises, and of falls if both count */
    uint32_t run[2];        /* values since each left zero */
    uint8_t sums;
} instantft_cusum;

/* both: whether a fall counts too. deviation must be above 0. */
void instantft_cusum_init(instantft_cusum *d, double mean, double deviation, int both);
/* The next value; 1 where it is an alarm, else 0. */
int instantft_cusum_add(instantft_cusum *d, double value);
/* How near an alarm is: 1 is one. */
double instantft_cusum_score(const instantft_cusum *d);
/* Values since the sum that stands highest left zero: those of the new world. */
uint32_t instantft_cusum_begun(const instantft_cusum *d);

/* One minus the largest probability of C logits. */
double instantft_doubt(const float *logits, int C);
/* √(mean_j min(((x_j - mean_j) / deviation_j)², 16)), of one tap of n values. */
double instantft_distance(const float *x, const float *mean, const float *deviation, int n);

#ifdef __cplusplus
}
#endif
#endif
