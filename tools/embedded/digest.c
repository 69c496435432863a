/* Runs an export with its data (instantft_data.h) and prints what must be the same on every machine: checksums of the codes,
 * the trained adapter and the logits; behind ~ logits, for machines that round otherwise; behind = what differs: stack, and
 * instructions where the emulator counts them. */
#include "../include/instantft_data.h"
#include "../include/instantft_device.h"

#include "instantft.h"

#include <stdio.h>

#ifndef ARENA_AT
#define ARENA_AT
#endif
ARENA_AT static _Alignas(16) uint8_t arena[INSTANTFT_ARENA];

enum { TAUGHT = INSTANTFT_DATA < INSTANTFT_SAMPLES ? INSTANTFT_DATA : INSTANTFT_SAMPLES };

#if defined(__arm__)
/* SysTick at the board's 25 MHz: with -icount shift=0 an instruction takes a nanosecond, so a tick is 40 of them. It counts
 * down from 2^24 - 1; a call between two looks stays below that. */
static uint64_t instructions(void) {
    static uint64_t total;
    static uint32_t last;
    volatile uint32_t *systick = (volatile uint32_t *)0xe000e010u;
    if (!(systick[0] & 1)) systick[1] = last = 0xffffffu, systick[2] = 0, systick[0] = 5;
    uint32_t now = systick[2];
    total += (last - now) & 0xffffffu, last = now;
    return 40 * total;
}
#elif defined(__riscv)
static uint64_t instructions(void) {
    uint32_t low, high, again;
    do __asm__ volatile("rdinstreth %0\n rdinstret %1\n rdinstreth %2" : "=r"(high), "=r"(low), "=r"(again));
    while (high != again);
    return (uint64_t)high << 32 | low;
}
#else
static uint64_t instructions(void) { return 0; }
#endif

/* What lies below this frame is painted before a call and looked at after it. */
enum { DEEP = 12288, SHALLOW = 256 };
static volatile uint8_t *bottom;
static void paint(void) {
    for (volatile uint8_t *p = bottom - DEEP; p < bottom - SHALLOW; p++) *p = 0x5a;
}
static int depth(void) {
    volatile uint8_t *p = bottom - DEEP;
    while (p < bottom - SHALLOW && *p == 0x5a) p++;
    return (int)(bottom - p);
}

static uint32_t crc(const void *data, size_t n) {
    const uint8_t *p = data;
    uint32_t c = 0xffffffffu;
    for (; n; n--) {
        c ^= *p++;
        for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
    }
    return ~c;
}

static float logits[INSTANTFT_C];
static uint32_t ask(instantft *t, int *right) {
    uint32_t sum = 0;
    *right = 0;
    for (int i = 0; i < INSTANTFT_DATA; i++) {
        *right += instantft_infer(t, instantft_data_x + (size_t)i * INSTANTFT_N, logits) == instantft_data_y[i];
        sum = (sum << 1 | sum >> 31) ^ crc(logits, sizeof logits);
    }
    return sum;
}

int main(void) {
    bottom = __builtin_frame_address(0);
    instantft *t = instantft_init(arena, sizeof arena);
    if (!t) return 1;
    int right, deepest[3] = {0};
    uint64_t cost[3], start;
    uint32_t before = ask(t, &right);
    printf("frozen: %d of %d right, logits %08lx\n", right, INSTANTFT_DATA, (unsigned long)before);

    paint();
    start = instructions();
    for (int i = 0; i < TAUGHT; i++)
        if (instantft_add_sample(t, instantft_data_x + (size_t)i * INSTANTFT_N, instantft_data_y[i])) return 1;
    cost[0] = (instructions() - start) / TAUGHT;
    deepest[0] = depth();
    printf("codes %08lx\n", (unsigned long)crc(arena + IFT_AT_CACHE, (size_t)TAUGHT * IFT_STRIDE));

    paint();
    int status, steps = 0;
    uint64_t most = 0;
    start = instructions();
    uint64_t last = start;
    do {
        status = instantft_train(t, 1);
        uint64_t now = instructions();
        most = now - last > most ? now - last : most, last = now;
        steps++;
    } while (status == INSTANTFT_MORE);
    if (status || instantft_commit(t)) return 1;
    cost[1] = (last - start) / (uint64_t)steps;
    deepest[1] = depth();
    printf("adapter %08lx\n", (unsigned long)crc(arena + IFT_AT_ADAPTER1, IFT_ADAPTER_BYTES));

    paint();
    start = instructions();
    (void)instantft_infer(t, instantft_data_x, logits);
    cost[2] = instructions() - start;
    deepest[2] = depth();
    uint32_t after = ask(t, &right);
    instantft_report report;
    instantft_status(t, &report);
    printf("adapted: %d of %d right, logits %08lx, %d steps, before %ld after %ld\n", right, INSTANTFT_DATA,
           (unsigned long)after, steps, (long)report.right_before, (long)report.right_after);
    (void)instantft_infer(t, instantft_data_x, logits);
    printf("~");
    for (int c = 0; c < INSTANTFT_C; c++) printf(" %.6g", (double)logits[c]);
    printf("\n= stack %d add, %d train, %d infer\n", deepest[0], deepest[1], deepest[2]);
    printf("= instructions %lu add, %lu train, %lu infer, %lu most in a step\n", (unsigned long)cost[0],
           (unsigned long)cost[1], (unsigned long)cost[2], (unsigned long)most);
    return 0;
}
