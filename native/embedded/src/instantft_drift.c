/* ADWIN (Bifet and Gavaldà, 2007) and CUSUM (Page, 1954); see instantft_drift.h, and for the reasons
 * src/instantft/watch/detectors.py, whose arithmetic this repeats operation by operation. */
#include "../include/instantft_drift.h"

#include <math.h>
#include <string.h>

/* Alarms must come at the same samples on all machines: no fused multiply-adds. */
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

enum { ROWS = INSTANTFT_DRIFT_ROWS, ROW = INSTANTFT_DRIFT_ROW, EVERY = 8, LEAST = 10 };
static const double CONFIDENCE = 0.002, ALLOWANCE = 0.5, THRESHOLD = 20.0, CLIPPED = 4.0;

_Static_assert(sizeof(instantft_errors) <= 232, "as the header says");

void instantft_errors_init(instantft_errors *d) { memset(d, 0, sizeof *d); }

static void take_first(instantft_errors *d, int row, int count) {
    uint16_t *bucket = d->bucket[row];
    d->buckets[row] = (uint8_t)(d->buckets[row] - count);
    memmove(bucket, bucket + count, d->buckets[row] * sizeof *bucket);
}

/* Drop the oldest bucket; returns how many answers it stood for. */
static uint32_t drop_oldest(instantft_errors *d) {
    int row = ROWS - 1;
    while (row > 0 && !d->buckets[row]) row--;
    d->wrong -= d->bucket[row][0];
    d->n -= 1u << row;
    take_first(d, row, 1);
    return 1u << row;
}

static void push(instantft_errors *d, uint16_t wrong) {
    d->wrong += wrong;
    d->n++;
    for (int row = 0;; row++) {
        uint16_t *bucket = d->bucket[row];
        bucket[d->buckets[row]++] = wrong;
        if (d->buckets[row] <= ROW) return;
        if (row == ROWS - 1) {
            drop_oldest(d);
            return;
        }
        wrong = (uint16_t)(bucket[0] + bucket[1]);
        take_first(d, row, 2);
    }
}

void instantft_errors_expect(instantft_errors *d, double rate, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
        push(d, (uint16_t)((uint32_t)((double)(i + 1) * rate) - (uint32_t)((double)i * rate)));
}

/* How much the newer part is above the older one where they differ most, and how many answers the older one has; 0
 * where chance explains it. */
static uint32_t change(instantft_errors *d, double *difference) {
    const double n = d->n, sum = d->wrong, mean = d->n ? sum / n : 0, variance = mean * (1 - mean);
    const double confidence = log(2 * log(d->n > 3 ? n : 3) / CONFIDENCE);
    double worst = 0, sum0 = 0;
    uint32_t older = 0, at = 0;
    for (int row = ROWS - 1; row >= 0; row--)
        for (int k = 0; k < d->buckets[row]; k++) {
            at += 1u << row;
            sum0 += d->bucket[row][k];
            if (at < LEAST || d->n - at < LEAST) continue;
            const double n0 = at, n1 = d->n - at, m = 1 / (1 / n0 + 1 / n1);
            const double cut = sqrt(2 / m * variance * confidence) + 2 / (3 * m) * confidence;
            const double found = (sum - sum0) / n1 - sum0 / n0, size = fabs(found);
            if (size > worst * cut) worst = size / cut, *difference = found, older = at;
        }
    if (worst > d->score) d->score = worst;
    return worst > 1 ? older : 0;
}

int instantft_errors_add(instantft_errors *d, int wrong) {
    push(d, wrong != 0);
    if (++d->since < EVERY) return 0;
    d->since = 0;
    d->score = 0;
    int risen = 0;
    double difference = 0;
    for (uint32_t older; (older = change(d, &difference)) != 0;) {
        risen |= difference > 0;
        while (older > 0) older -= drop_oldest(d);
    }
    return risen;
}

void instantft_cusum_init(instantft_cusum *d, double mean, double deviation, int both) {
    memset(d, 0, sizeof *d);
    d->mean = mean, d->deviation = deviation, d->sums = both ? 2 : 1;
}

int instantft_cusum_add(instantft_cusum *d, double value) {
    double z = (value - d->mean) / d->deviation;
    if (z < -CLIPPED) z = -CLIPPED;
    if (z > CLIPPED) z = CLIPPED;
    int alarm = 0;
    for (int i = 0; i < d->sums; i++) {
        const double next = d->sum[i] + (i ? -z : z) - ALLOWANCE;
        d->sum[i] = next > 0 ? next : 0; /* of NaN, 0 */
        d->run[i] = d->sum[i] > 0 ? d->run[i] + 1 : 0;
        alarm |= d->sum[i] >= THRESHOLD;
    }
    return alarm;
}

static int highest(const instantft_cusum *d) { return d->sum[1] > d->sum[0]; }

double instantft_cusum_score(const instantft_cusum *d) { return d->sum[highest(d)] / THRESHOLD; }

uint32_t instantft_cusum_begun(const instantft_cusum *d) { return d->run[highest(d)]; }

double instantft_doubt(const float *logits, int C) {
    float most = logits[0];
    for (int j = 1; j < C; j++)
        if (logits[j] > most) most = logits[j];
    double sum = 0;
    for (int j = 0; j < C; j++) sum += exp((double)logits[j] - (double)most);
    return 1 - 1 / sum;
}

double instantft_distance(const float *x, const float *mean, const float *deviation, int n) {
    double total = 0;
    for (int j = 0; j < n; j++) {
        const double z = ((double)x[j] - (double)mean[j]) / (double)deviation[j];
        total += z * z < CLIPPED * CLIPPED ? z * z : CLIPPED * CLIPPED;
    }
    return n > 0 ? sqrt(total / n) : 0;
}
