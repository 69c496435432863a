/* Tests of the exported code on the machine that builds it: made-up samples, every call, every error, and a power cut at
 * every write. Prints what failed; status 0 if nothing did. */
#include "../include/instantft_device.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static _Alignas(16) uint8_t arena[INSTANTFT_ARENA + 16], second[INSTANTFT_ARENA];
static instantft_value sample[INSTANTFT_N];
static int failed;
#define CHECK(what) ((void)((what) || (failed++, printf("failed, line %d: %s\n", __LINE__, #what))))

static uint32_t seed;
static uint32_t draw(void) { /* xorshift */
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return seed;
}
/* Class i % C is a stretch of larger values. */
static int make(int i) {
    seed = (uint32_t)i * 2654435761u + 1;
    int label = i % INSTANTFT_C;
    for (int j = 0; j < INSTANTFT_N; j++) {
        int high = j * INSTANTFT_C / INSTANTFT_N == label;
        sample[j] = (instantft_value)((draw() % 64 + (high ? 96 : 0)) / (sizeof(instantft_value) > 1 ? 128.0 : 1.0));
    }
    return label;
}

static int train(instantft *t, int steps) {
    int status;
    while ((status = instantft_train(t, steps)) == INSTANTFT_MORE) continue;
    return status;
}
static void logits_of(instantft *t, int i, float *to) {
    (void)make(i);
    CHECK(instantft_infer(t, sample, to) >= 0);
}

/* Storage that fails, and stops writing in the middle, after so many bytes. */
static uint8_t slots[2][INSTANTFT_SLOT], kept[INSTANTFT_SAMPLES_SLOT];
static uint8_t *place(int slot) { return slot < 2 ? slots[slot] : kept; }
static long budget;
static int slot_read(void *user, int slot, uint32_t at, void *to, uint32_t bytes) {
    (void)user;
    memcpy(to, place(slot) + at, bytes);
    return 0;
}
static int slot_erase(void *user, int slot) {
    (void)user;
    if (--budget < 0) return 1;
    memset(place(slot), 0xff, slot < 2 ? sizeof slots[0] : sizeof kept);
    return 0;
}
static int slot_write(void *user, int slot, uint32_t at, const void *from, uint32_t bytes) {
    (void)user;
    uint32_t n = budget < (long)bytes ? (uint32_t)(budget < 0 ? 0 : budget) : bytes;
    memcpy(place(slot) + at, from, n);
    budget -= (long)bytes;
    return n < bytes;
}
static const instantft_storage storage = {NULL, slot_read, slot_erase, slot_write};

int main(void) {
    float before[INSTANTFT_C], after[INSTANTFT_C], now[INSTANTFT_C];
    const size_t logits = sizeof now;
    CHECK(instantft_init(NULL, sizeof arena) == NULL);
    CHECK(instantft_init(arena, INSTANTFT_ARENA - 1) == NULL);
    CHECK(instantft_init(arena + 1, INSTANTFT_ARENA) == NULL);
    memset(arena, 0xa5, sizeof arena);
    instantft *t = instantft_init(arena, INSTANTFT_ARENA);
    CHECK(t != NULL);
    if (!t) return 1;

    CHECK(instantft_train(t, 1) == INSTANTFT_NO_SAMPLES);
    CHECK(instantft_commit(t) == INSTANTFT_NOTHING && instantft_rollback(t) == INSTANTFT_NOTHING);
    CHECK(instantft_load(t, &storage) == INSTANTFT_NOT_FOUND);
    int label = make(0);
    CHECK(instantft_add_sample(t, sample, -1) == INSTANTFT_BAD_INPUT);
    CHECK(instantft_add_sample(t, sample, INSTANTFT_C) == INSTANTFT_BAD_INPUT);
    CHECK(instantft_add_samples(t, sample, &label, 0) == INSTANTFT_BAD_INPUT);
    CHECK(instantft_train(t, 0) == INSTANTFT_BAD_INPUT);
    if (sizeof(instantft_value) > 1) {
        sample[INSTANTFT_N - 1] = (instantft_value)(double)NAN;
        CHECK(instantft_add_sample(t, sample, 0) == INSTANTFT_BAD_INPUT);
        CHECK(instantft_infer(t, sample, NULL) == INSTANTFT_BAD_INPUT);
    }
    for (int i = 0; i < INSTANTFT_SAMPLES; i++) {
        label = make(i);
        CHECK(instantft_add_sample(t, sample, label) == INSTANTFT_DONE);
    }
    CHECK(instantft_add_sample(t, sample, 0) == INSTANTFT_FULL);

    /* the old adapter predicts until commit; rollback brings it back to the bit */
    logits_of(t, 1, before);
    CHECK(instantft_train(t, 1) >= 0);
    logits_of(t, 1, now);
    CHECK(!memcmp(before, now, logits));
    CHECK(instantft_rollback(t) == INSTANTFT_DONE);
    CHECK(instantft_commit(t) == INSTANTFT_NOTHING);
    CHECK(train(t, 1) == INSTANTFT_DONE);
    CHECK(instantft_train(t, 1) == INSTANTFT_DONE);
    CHECK(instantft_commit(t) == INSTANTFT_DONE);
    logits_of(t, 1, after);
    CHECK(memcmp(before, after, logits));
    instantft_report report;
    instantft_status(t, &report);
    CHECK(report.samples == INSTANTFT_SAMPLES && report.steps > 0 && isfinite(report.loss));
    CHECK(report.right_after >= 0 && report.right_after <= INSTANTFT_SAMPLES);
    CHECK(instantft_rollback(t) == INSTANTFT_DONE);
    logits_of(t, 1, now);
    CHECK(!memcmp(before, now, logits));

    /* the same again, however the work is cut, and on another arena */
    instantft *u = instantft_init(second, sizeof second);
    CHECK(u != NULL);
    if (!u) return 1;
    for (int i = 0; i < INSTANTFT_SAMPLES; i++) {
        label = make(i);
        CHECK(instantft_add_samples(u, sample, &label, 1) == INSTANTFT_DONE);
    }
    CHECK(train(u, 1000000) == INSTANTFT_DONE && instantft_commit(u) == INSTANTFT_DONE);
    logits_of(u, 1, now);
    CHECK(!memcmp(after, now, logits));

    /* save, load; then a power cut at many moments of the next save leaves the first */
    budget = 1L << 30;
    CHECK(train(t, 7) == INSTANTFT_DONE && instantft_commit(t) == INSTANTFT_DONE);
    CHECK(instantft_save(t, &storage) == INSTANTFT_DONE);
    instantft *fresh = instantft_init(second, sizeof second);
    CHECK(instantft_load(fresh, &storage) == INSTANTFT_DONE);
    logits_of(fresh, 1, now);
    CHECK(!memcmp(after, now, logits));
    CHECK(instantft_rollback(fresh) == INSTANTFT_DONE);
    CHECK(instantft_rollback(t) == INSTANTFT_DONE); /* the adapter before is saved next */
    const long whole = INSTANTFT_SLOT + 1, step = whole / 97 + 1;
    for (long cut = 0; cut < whole + step; cut += step) {
        budget = cut < whole ? cut : whole - 1; /* the last one: all but one byte */
        CHECK(instantft_save(t, &storage) == INSTANTFT_IO);
        fresh = instantft_init(second, sizeof second);
        CHECK(instantft_load(fresh, &storage) == INSTANTFT_DONE);
        logits_of(fresh, 1, now);
        CHECK(!memcmp(after, now, logits));
    }
    budget = 1L << 30;
    CHECK(instantft_save(t, &storage) == INSTANTFT_DONE);
    fresh = instantft_init(second, sizeof second);
    CHECK(instantft_load(fresh, &storage) == INSTANTFT_DONE);
    logits_of(fresh, 1, now);
    CHECK(!memcmp(before, now, logits));
    /* any damaged bit of the newest: the one before it is loaded; of both: none */
    for (uint32_t at = 0; at < INSTANTFT_SLOT; at += INSTANTFT_SLOT / 61 + 1) {
        slots[1][at] ^= 4;
        fresh = instantft_init(second, sizeof second);
        CHECK(instantft_load(fresh, &storage) == INSTANTFT_DONE);
        logits_of(fresh, 1, now);
        CHECK(!memcmp(after, now, logits));
        slots[0][at] ^= 4;
        CHECK(instantft_load(fresh, &storage) == INSTANTFT_NOT_FOUND);
        slots[0][at] ^= 4, slots[1][at] ^= 4;
    }

    /* samples outlive a restart, and training on them comes to the same; a power cut or a damaged bit leaves none */
    CHECK(instantft_load_samples(t, &storage) == INSTANTFT_NOT_FOUND);
    CHECK(instantft_save_samples(t, &storage) == INSTANTFT_DONE);
    fresh = instantft_init(second, sizeof second);
    CHECK(instantft_train(fresh, 1) == INSTANTFT_NO_SAMPLES);
    CHECK(instantft_load_samples(fresh, &storage) == INSTANTFT_DONE);
    instantft_report again;
    instantft_status(t, &report), instantft_status(fresh, &again);
    CHECK(again.samples == report.samples && again.right_before == report.right_before);
    CHECK(instantft_add_sample(fresh, sample, 0) == INSTANTFT_FULL);
    CHECK(train(fresh, 3) == INSTANTFT_DONE && instantft_commit(fresh) == INSTANTFT_DONE);
    logits_of(fresh, 1, now);
    CHECK(!memcmp(after, now, logits));
    for (uint32_t at = 0; at < INSTANTFT_SAMPLES_SLOT; at += INSTANTFT_SAMPLES_SLOT / 61 + 1) {
        kept[at] ^= 4;
        CHECK(instantft_load_samples(fresh, &storage) == INSTANTFT_NOT_FOUND);
        kept[at] ^= 4;
    }
    for (long cut = 0; cut < INSTANTFT_SAMPLES_SLOT; cut += INSTANTFT_SAMPLES_SLOT / 31 + 1) {
        budget = cut;
        CHECK(instantft_save_samples(t, &storage) == INSTANTFT_IO);
        if (cut) CHECK(instantft_load_samples(fresh, &storage) == INSTANTFT_NOT_FOUND);
    }
    budget = 1L << 30;

    instantft_clear_samples(t);
    instantft_status(t, &report);
    CHECK(report.samples == 0 && instantft_train(t, 1) == INSTANTFT_NO_SAMPLES);
    label = make(3);
    CHECK(instantft_add_sample(t, sample, label) == INSTANTFT_DONE && train(t, 1) == INSTANTFT_DONE);
    CHECK(arena[INSTANTFT_ARENA] == 0xa5 && arena[INSTANTFT_ARENA + 15] == 0xa5);
    if (!failed) printf("all passed\n");
    return failed != 0;
}
