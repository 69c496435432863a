/* The whole loop on the samples that came with the export: how many are right before, after training, after saving and
 * loading. The first INSTANTFT_SAMPLES samples are learnt from; those behind them, or all where there are none, are asked.
 * printf is the example's; the library needs none. */
#include "../../include/instantft_data.h"
#include "../../include/instantft_device.h"

#include <stdio.h>
#include <string.h>

static _Alignas(16) uint8_t arena[INSTANTFT_ARENA];

/* Two slots; a board would keep them in flash. */
static uint8_t slots[2][INSTANTFT_SLOT];
static int slot_read(void *user, int slot, uint32_t at, void *to, uint32_t bytes) {
    (void)user;
    memcpy(to, slots[slot] + at, bytes);
    return 0;
}
static int slot_erase(void *user, int slot) {
    (void)user;
    memset(slots[slot], 0xff, sizeof slots[slot]);
    return 0;
}
static int slot_write(void *user, int slot, uint32_t at, const void *from, uint32_t bytes) {
    (void)user;
    memcpy(slots[slot] + at, from, bytes);
    return 0;
}

enum {
    TAUGHT = (int)INSTANTFT_DATA < (int)INSTANTFT_SAMPLES ? (int)INSTANTFT_DATA : (int)INSTANTFT_SAMPLES,
    ASKED_FROM = TAUGHT < (int)INSTANTFT_DATA ? TAUGHT : 0,
};

static void ask(instantft *t, const char *when) {
    int right = 0, n = 0;
    for (int i = ASKED_FROM; i < INSTANTFT_DATA; i++, n++)
        right += instantft_infer(t, instantft_data_x + (size_t)i * INSTANTFT_N, NULL) == instantft_data_y[i];
    printf("%s: %d of %d right\n", when, right, n);
}

int main(void) {
    instantft *t = instantft_init(arena, sizeof arena);
    if (!t) return 1;
    ask(t, "before");
    for (int i = 0; i < TAUGHT; i++)
        if (instantft_add_sample(t, instantft_data_x + (size_t)i * INSTANTFT_N, instantft_data_y[i])) return 1;
    int status;
    while ((status = instantft_train(t, 1)) == INSTANTFT_MORE) continue; /* a board does its other work here */
    if (status || instantft_commit(t)) return 1;
    ask(t, "after");
    const instantft_storage storage = {NULL, slot_read, slot_erase, slot_write};
    if (instantft_save(t, &storage)) return 1;
    t = instantft_init(arena, sizeof arena); /* as after a power cut */
    if (!t || instantft_load(t, &storage)) return 1;
    ask(t, "loaded");
    return 0;
}
