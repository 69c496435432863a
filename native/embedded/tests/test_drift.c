/* The detectors of instantft_drift.h on streams that anybody can draw again: prints at which samples they raise an
 * alarm and how many values are of the new world then. What must come out is in vectors/drift.json of the project. */
#include "../include/instantft_drift.h"

#include <math.h>
#include <stdio.h>

static uint32_t state;

/* 0 to 1, exactly the same everywhere. */
static double draw(void) {
    state = state * 1664525u + 1013904223u;
    return (double)(state >> 8) / 16777216.0;
}

typedef struct stream {
    uint32_t seed, expected, length[2];
    double known, rate[2]; /* of errors; of CUSUM, means in deviations */
} stream;

static const stream ERRORS[] = {
    {1, 0, {1000, 200}, 0, {0.1, 0.6}},      {2, 0, {3000, 1500}, 0, {0.05, 0.12}}, {3, 200, {100, 0}, 0.1, {0.5, 0}},
    {4, 0, {500, 500}, 0, {0.6, 0.1}},       {5, 0, {5000, 0}, 0, {0.2, 0}},
    {6, 256, {40, 60}, 0.02, {0.02, 0.9}},   {7, 400000, {64, 400}, 0.3, {0.3, 0.6}},
};
static const stream MOVES[] = {
    {11, 0, {5000, 300}, 0, {0, 1}}, {12, 1, {2000, 300}, 0, {0, -1}}, {13, 0, {2000, 300}, 0, {0, -1}},
    {14, 1, {3000, 100}, 0, {0, 3}},
};
enum { COUNT = sizeof ERRORS / sizeof *ERRORS, MOVED = sizeof MOVES / sizeof *MOVES };

int main(void) {
    for (int k = 0; k < COUNT; k++) {
        const stream *s = &ERRORS[k];
        instantft_errors d;
        instantft_errors_init(&d);
        instantft_errors_expect(&d, s->known, s->expected);
        state = s->seed;
        printf("errors %d:", k);
        uint32_t at = 0;
        for (int part = 0; part < 2; part++)
            for (uint32_t i = 0; i < s->length[part]; i++, at++)
                if (instantft_errors_add(&d, draw() < s->rate[part]))
                    printf(" %lu(%lu)", (unsigned long)at, (unsigned long)d.n);
        printf(", %lu of %lu\n", (unsigned long)d.wrong, (unsigned long)d.n);
    }
    for (int k = 0; k < MOVED; k++) {
        const stream *s = &MOVES[k];
        instantft_cusum d;
        instantft_cusum_init(&d, 2.0, 0.5, (int)s->expected);
        state = s->seed;
        printf("moves %d:", k);
        uint32_t at = 0;
        for (int part = 0; part < 2; part++)
            for (uint32_t i = 0; i < s->length[part]; i++, at++) {
                const double value = 2 + 0.5 * (s->rate[part] + (draw() + draw() + draw() + draw() - 2) * 1.75);
                if (instantft_cusum_add(&d, value)) {
                    printf(" %lu(%lu)", (unsigned long)at, (unsigned long)instantft_cusum_begun(&d));
                    instantft_cusum_init(&d, 2.0, 0.5, (int)s->expected);
                }
            }
        printf("\n");
    }
    const float logits[3] = {1.0f, 3.0f, -2.0f}, zero[2] = {0, 0}, one[2] = {1, 1}, far[2] = {3, 400};
    const int good = fabs(instantft_doubt(logits, 3) - 0.12439940) < 1e-7 &&
                     fabs(instantft_distance(far, zero, one, 2) - sqrt(12.5)) < 1e-12;
    puts(good ? "doubt and distance as they should be" : "doubt or distance is wrong");
    return !good;
}
