/* instantft on a microcontroller: adapts the network in instantft_model.h to samples met on the device.
 *
 * Is: plain C11 with no dependency but libm, on one arena of INSTANTFT_ARENA bytes that the caller gives. No malloc, no
 * stdio, no globals that change. The network's weights are const. Every call does a bounded amount of work.
 * Is not: safe to call from two threads at once.
 *
 *     add_sample … add_sample      the frozen network runs once, its record is kept in 8 or 4 bits a value
 *     train … train                steps on a second adapter; infer goes on with the first
 *     commit                       the second one goes live, the first one is kept
 *     rollback                     back to the one before; or, before commit, the training is dropped
 *     save, load                   the live adapter, in two slots, of which a power cut leaves one whole
 *     save_samples, load_samples   what was learnt from, so that a restart does not lose it
 */
#ifndef INSTANTFT_DEVICE_H
#define INSTANTFT_DEVICE_H

#include "instantft_model.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Errors are below 0. */
enum instantft_result {
    INSTANTFT_DONE = 0,
    INSTANTFT_MORE = 1,          /* train: call again */
    INSTANTFT_BAD_INPUT = -1,    /* NaN or Inf in a sample, a label outside 0 … C-1, a count below 1 */
    INSTANTFT_FULL = -2,         /* add_sample: INSTANTFT_SAMPLES are there; clear_samples makes room */
    INSTANTFT_NO_SAMPLES = -3,   /* train: nothing to learn from */
    INSTANTFT_NOTHING = -4,      /* commit: no finished training; rollback: nothing to go back to */
    INSTANTFT_DIVERGED = -5,     /* train: the loss is not finite; the live adapter is untouched */
    INSTANTFT_IO = -6,           /* save, load: a callback failed */
    INSTANTFT_NOT_FOUND = -7,    /* load: no slot holds a whole adapter, or samples, of this model */
};

typedef struct instantft instantft;

/* Start on an arena of at least INSTANTFT_ARENA bytes, aligned to 16. The live adapter is the one that was exported, or
 * none: the frozen network. Returns NULL if the arena is too small or misaligned. */
instantft *instantft_init(void *arena, size_t bytes);

/* Class of a sample of INSTANTFT_N values, by the live adapter, or an error. logits: INSTANTFT_C floats, or NULL. */
int instantft_infer(instantft *t, const instantft_value *x, float *logits);

/* Keep a sample and its label (0 … INSTANTFT_C-1). */
int instantft_add_sample(instantft *t, const instantft_value *x, int label);
/* The same for n of them, one after the other in x; with vectors of 4 this is faster. */
int instantft_add_samples(instantft *t, const instantft_value *x, const int *labels, int n);
/* Forget all samples, and overwrite them with zeros. A training that has begun is dropped. */
void instantft_clear_samples(instantft *t);

/* Up to `steps` steps of training (SGD: a batch each; ridge: rows of the system, or one factorisation). The first call
 * after a commit or rollback starts anew, on the samples there are. Returns INSTANTFT_MORE until it is done. */
int instantft_train(instantft *t, int steps);
/* The trained adapter goes live; the one before is kept until the next training. */
int instantft_commit(instantft *t);
/* Before commit: drop the training. After it: go back to the adapter before. */
int instantft_rollback(instantft *t);

typedef struct instantft_report {
    int32_t samples, steps, epochs; /* kept; done since training began */
    float loss;                     /* SGD: mean of the last whole epoch; ridge: left-out squared error, a sample */
    float lambda;                   /* ridge */
    int32_t right_before, right_after; /* samples classified correctly: by the frozen network; SGD: in the last epoch,
                                        * before each step; ridge: each left out of the fit */
} instantft_report;
void instantft_status(const instantft *t, instantft_report *report);

/* Where save and load keep two slots of INSTANTFT_SLOT bytes each, and samples a third one, number 2, of
 * INSTANTFT_SAMPLES_SLOT bytes. Callbacks return 0, or anything else for failure. What
 * was written must be there before the next call begins. */
typedef struct instantft_storage {
    void *user;
    int (*read)(void *user, int slot, uint32_t at, void *to, uint32_t bytes);
    int (*erase)(void *user, int slot); /* the slot may now be written from its start */
    int (*write)(void *user, int slot, uint32_t at, const void *from, uint32_t bytes);
} instantft_storage;

/* Write the live adapter into the slot that does not hold the newest. */
int instantft_save(instantft *t, const instantft_storage *storage);
/* The newest whole one of this model goes live; the adapter before is kept for rollback. */
int instantft_load(instantft *t, const instantft_storage *storage);

/* Write all samples, with their labels and records, into slot 2. A power cut in the middle leaves it empty. */
int instantft_save_samples(instantft *t, const instantft_storage *storage);
/* The samples of slot 2 take the place of those that are kept; a training that has begun is dropped. With NOT_FOUND nothing
 * has changed; with IO no samples are left. */
int instantft_load_samples(instantft *t, const instantft_storage *storage);

#ifdef __cplusplus
}
#endif
#endif
