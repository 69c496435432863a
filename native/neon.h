/* The hottest loops in assembly, for AArch64 processors that run in order (a Cortex-A53): there a load waits until the
 * multiply-adds before it are through. So loads bring four registers each, most of them a turn ahead, and counters and
 * addresses are worked out where a turn ends and nothing else can go on. Sums run in the order of the loops of lanes.h and
 * linalg.h, which do all other shapes; tools/embedded/kernels.c holds these to plain ones, bit for bit.
 */
#ifndef IFT_NEON_H
#define IFT_NEON_H

#include "vec.h"

#include <stddef.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverlength-strings"

#define VECTORS \
    "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", \
        "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "cc", "memory"

#define FMA(acc, x, w, lane) "fmla v" #acc ".4s, v" #x ".4s, v" #w ".s[" #lane "]\n"
#define FMA4(a0, a1, a2, a3, x0, x1, x2, x3, w, lane) \
    FMA(a0, x0, w, lane) FMA(a1, x1, w, lane) FMA(a2, x2, w, lane) FMA(a3, x3, w, lane)
#define LOAD4(a, b, c, d, from) "ld1 {v" #a ".4s, v" #b ".4s, v" #c ".4s, v" #d ".4s}, [%[" #from "]]\n"
#define LOAD3(a, b, c, from) "ld1 {v" #a ".4s, v" #b ".4s, v" #c ".4s}, [%[" #from "]]\n"
#define LOAD2(a, b, from) "ld1 {v" #a ".4s, v" #b ".4s}, [%[" #from "]]\n"
#define PAIR(op, a, b, at) #op " q" #a ", q" #b ", [%[acc], #" #at "]\n"
#define ROW4(op, a, b, c, d, at, next) PAIR(op, a, b, at) PAIR(op, c, d, next)

/* A kernel of five columns over a row of four outputs. x: v0-v7; weights of the row, output channels side by side: from v8
 * on; sums: four registers a channel from v16 on, in memory eight vectors apart. Rows of the kernel go on from channel to
 * channel of the input. */
#define WIDE_COLUMN(x0, x1, x2, x3, a, al, b, bl, c, cl) \
    FMA4(16, 17, 18, 19, x0, x1, x2, x3, a, al) FMA4(20, 21, 22, 23, x0, x1, x2, x3, b, bl) \
    FMA4(24, 25, 26, 27, x0, x1, x2, x3, c, cl)
#define WIDE4_COLUMN(x0, x1, x2, x3, w) \
    WIDE_COLUMN(x0, x1, x2, x3, w, 0, w, 1, w, 2) FMA4(28, 29, 30, 31, x0, x1, x2, x3, w, 3)
#define WIDE4_EARLY \
    "ldur q12, [%[w], #-16]\n" LOAD4(4, 5, 6, 7, high) WIDE4_COLUMN(0, 1, 2, 3, 8) WIDE4_COLUMN(1, 2, 3, 4, 9) \
    WIDE4_COLUMN(2, 3, 4, 5, 10) WIDE4_COLUMN(3, 4, 5, 6, 11)
#define WIDE4_LAST WIDE4_COLUMN(4, 5, 6, 7, 12)
#define WIDE3_EARLY \
    "ldur q11, [%[w], #-16]\n" LOAD4(4, 5, 6, 7, high) WIDE_COLUMN(0, 1, 2, 3, 8, 0, 8, 1, 8, 2) \
    WIDE_COLUMN(1, 2, 3, 4, 8, 3, 9, 0, 9, 1) WIDE_COLUMN(2, 3, 4, 5, 9, 2, 9, 3, 10, 0) \
    WIDE_COLUMN(3, 4, 5, 6, 10, 1, 10, 2, 10, 3)
#define WIDE3_LAST WIDE_COLUMN(4, 5, 6, 7, 11, 1, 11, 2, 11, 3)
/* The next row's inputs, and where the row after it begins. */
#define WIDE_NEXT(row) \
    LOAD4(0, 1, 2, 3, x) "subs %[left], %[left], #1\nadd %[w], %[w], #" #row \
                         "\nadd %[high], %[x], #64\nadd %[x], %[x], %[pitch]\n"
#define WIDE_LOOP(early, weights, late, next) \
    "1:\n" early weights late next "b.ne 1b\n" \
    "add %[x], %[x], %[jump]\nmov %[left], %[kh]\nsubs %[ic], %[ic], #1\nb.ne 1b\n" early late

/* oc·4 sums += Σ over ic channels, kh >= 2 rows and 5 columns; oc is 3 or 4 and constant at every call. Pitches and planes
 * are in floats. */
INLINE void neon_conv_row(int oc, ptrdiff_t ic, ptrdiff_t kh, const float *x, ptrdiff_t x_pitch, ptrdiff_t x_plane,
                          const float *w, float *acc) {
    const ptrdiff_t pitch = 4 * x_pitch, jump = 4 * (x_plane - kh * x_pitch);
    const float *high = x + 16;
    ptrdiff_t left = kh - 1;
#define OPERANDS \
    : [x] "+&r"(x), [high] "+&r"(high), [w] "+&r"(w), [left] "+&r"(left), [ic] "+&r"(ic) \
    : [acc] "r"(acc), [pitch] "r"(pitch), [jump] "r"(jump), [kh] "r"(kh) \
    : VECTORS
    if (oc == 4)
        __asm__ volatile(
            ROW4(ldp, 16, 17, 18, 19, 0, 32) ROW4(ldp, 20, 21, 22, 23, 128, 160) ROW4(ldp, 24, 25, 26, 27, 256, 288)
            ROW4(ldp, 28, 29, 30, 31, 384, 416) LOAD4(0, 1, 2, 3, x) LOAD4(8, 9, 10, 11, w)
            "add %[x], %[x], %[pitch]\nadd %[w], %[w], #80\n"
            WIDE_LOOP(WIDE4_EARLY, LOAD4(8, 9, 10, 11, w), WIDE4_LAST, WIDE_NEXT(80))
            ROW4(stp, 16, 17, 18, 19, 0, 32) ROW4(stp, 20, 21, 22, 23, 128, 160) ROW4(stp, 24, 25, 26, 27, 256, 288)
            ROW4(stp, 28, 29, 30, 31, 384, 416) OPERANDS);
    else
        __asm__ volatile(
            ROW4(ldp, 16, 17, 18, 19, 0, 32) ROW4(ldp, 20, 21, 22, 23, 128, 160) ROW4(ldp, 24, 25, 26, 27, 256, 288)
            LOAD4(0, 1, 2, 3, x) LOAD3(8, 9, 10, w)
            "add %[x], %[x], %[pitch]\nadd %[w], %[w], #60\n"
            WIDE_LOOP(WIDE3_EARLY, LOAD3(8, 9, 10, w), WIDE3_LAST, WIDE_NEXT(60))
            ROW4(stp, 16, 17, 18, 19, 0, 32) ROW4(stp, 20, 21, 22, 23, 128, 160) ROW4(stp, 24, 25, 26, 27, 256, 288)
            OPERANDS);
#undef OPERANDS
}

/* The same over two rows of two outputs, four channels. x: v0-v3, v12, v13 of the upper row, v4-v7, v14, v15 of the lower
 * one; weights: v8-v11, the fifth in v8; sums: of the upper row, then of the lower one. */
#define TALL_COLUMN(a0, a1, b0, b1, w) \
    FMA4(16, 17, 18, 19, a0, a1, b0, b1, w, 0) FMA4(20, 21, 22, 23, a0, a1, b0, b1, w, 1) \
    FMA4(24, 25, 26, 27, a0, a1, b0, b1, w, 2) FMA4(28, 29, 30, 31, a0, a1, b0, b1, w, 3)
#define TALL_EARLY \
    LOAD2(12, 13, high) LOAD2(14, 15, low) TALL_COLUMN(0, 1, 4, 5, 8) \
    "ldr q8, [%[w], #64]\nadd %[high], %[x], #64\nadd %[low], %[y], #64\nadd %[w], %[w], #80\n" \
    TALL_COLUMN(1, 2, 5, 6, 9) TALL_COLUMN(2, 3, 6, 7, 10) TALL_COLUMN(3, 12, 7, 14, 11)
#define TALL_LAST TALL_COLUMN(12, 13, 14, 15, 8)
#define TALL_SUMS(op) \
    ROW4(op, 16, 17, 18, 19, 0, 64) ROW4(op, 20, 21, 22, 23, 128, 192) ROW4(op, 24, 25, 26, 27, 256, 320) \
    ROW4(op, 28, 29, 30, 31, 384, 448)
INLINE void neon_conv_square(ptrdiff_t ic, ptrdiff_t kh, const float *x, ptrdiff_t x_pitch, ptrdiff_t x_plane,
                             const float *w, float *acc) {
    const ptrdiff_t pitch = 4 * x_pitch, jump = 4 * (x_plane - kh * x_pitch);
    const float *y = x + x_pitch, *high = x + 16, *low = y + 16;
    ptrdiff_t left = kh - 1;
    __asm__ volatile(
        TALL_SUMS(ldp) LOAD4(0, 1, 2, 3, x) LOAD4(4, 5, 6, 7, y) LOAD4(8, 9, 10, 11, w)
        "add %[x], %[x], %[pitch]\nadd %[y], %[y], %[pitch]\n"
        "1:\n" TALL_EARLY LOAD4(0, 1, 2, 3, x) TALL_LAST LOAD4(4, 5, 6, 7, y)
        "subs %[left], %[left], #1\nadd %[x], %[x], %[pitch]\nadd %[y], %[y], %[pitch]\n"
        LOAD4(8, 9, 10, 11, w) "b.ne 1b\n"
        "add %[x], %[x], %[jump]\nadd %[y], %[y], %[jump]\nmov %[left], %[kh]\nsubs %[ic], %[ic], #1\nb.ne 1b\n"
        TALL_EARLY TALL_LAST TALL_SUMS(stp)
        : [x] "+&r"(x), [y] "+&r"(y), [high] "+&r"(high), [low] "+&r"(low), [w] "+&r"(w),
          [left] "+&r"(left), [ic] "+&r"(ic)
        : [acc] "r"(acc), [pitch] "r"(pitch), [jump] "r"(jump), [kh] "r"(kh)
        : VECTORS);
}

/* Four rows of 16 sums: sum[r] += Σ_s w[r][s]·x[s] for s < 4·groups, rows of x `pitch` floats apart. x: v0-v3 (the
 * first and the last of four rows), v4-v7, v8-v11; w: v12-v15; sums: v16-v31. */
#define RANK_ROW(x0, x1, x2, x3, lane) \
    RANK_HALF(16, 17, 18, 19, 20, 21, 22, 23, x0, x1, x2, x3, 12, 13, lane) \
    RANK_HALF(24, 25, 26, 27, 28, 29, 30, 31, x0, x1, x2, x3, 14, 15, lane)
#define RANK_HALF(a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, w, v, lane) \
    FMA4(a0, a1, a2, a3, x0, x1, x2, x3, w, lane) FMA4(b0, b1, b2, b3, x0, x1, x2, x3, v, lane)
#define RANK_FOUR \
    "ldr q12, [%[w0], %[at]]\nldr q13, [%[w1], %[at]]\nldr q14, [%[w2], %[at]]\nldr q15, [%[w3], %[at]]\n" \
    LOAD4(4, 5, 6, 7, x1) RANK_ROW(0, 1, 2, 3, 0) LOAD4(8, 9, 10, 11, x2) FMA(16, 4, 12, 1) FMA(17, 5, 12, 1) \
    LOAD4(0, 1, 2, 3, x3) FMA(18, 6, 12, 1) FMA(19, 7, 12, 1) FMA4(20, 21, 22, 23, 4, 5, 6, 7, 13, 1) \
    RANK_HALF(24, 25, 26, 27, 28, 29, 30, 31, 4, 5, 6, 7, 14, 15, 1) RANK_ROW(8, 9, 10, 11, 2) RANK_ROW(0, 1, 2, 3, 3)
#define RANK_SUMS(op) \
    ROW4(op, 16, 17, 18, 19, 0, 32) "add %[acc], %[acc], %[next]\n" ROW4(op, 20, 21, 22, 23, 0, 32) \
    "add %[acc], %[acc], %[next]\n" ROW4(op, 24, 25, 26, 27, 0, 32) "add %[acc], %[acc], %[next]\n" \
    ROW4(op, 28, 29, 30, 31, 0, 32)
INLINE void neon_rank(const float *x, ptrdiff_t pitch, const float *w, ptrdiff_t w_pitch, ptrdiff_t groups, float *sum,
                      ptrdiff_t sum_pitch) {
    const float *x1 = x + pitch, *x2 = x1 + pitch, *x3 = x2 + pitch;
    const float *w1 = w + w_pitch, *w2 = w1 + w_pitch, *w3 = w2 + w_pitch;
    ptrdiff_t at = 0, left = groups - 1;
    __asm__ volatile(
        RANK_SUMS(ldp) LOAD4(0, 1, 2, 3, x0) "cbz %[left], 2f\nadd %[x0], %[x0], %[pitch]\n"
        "1:\n" RANK_FOUR LOAD4(0, 1, 2, 3, x0)
        "add %[x0], %[x0], %[pitch]\nadd %[x1], %[x1], %[pitch]\nadd %[x2], %[x2], %[pitch]\n"
        "add %[x3], %[x3], %[pitch]\n"
        "add %[at], %[at], #16\nsubs %[left], %[left], #1\nb.ne 1b\n"
        "2:\n" RANK_FOUR "sub %[acc], %[acc], %[next], lsl #1\nsub %[acc], %[acc], %[next]\n" RANK_SUMS(stp)
        : [x0] "+&r"(x), [x1] "+&r"(x1), [x2] "+&r"(x2), [x3] "+&r"(x3), [at] "+&r"(at), [left] "+&r"(left),
          [acc] "+&r"(sum)
        : [w0] "r"(w), [w1] "r"(w1), [w2] "r"(w2), [w3] "r"(w3), [pitch] "r"(16 * pitch), [next] "r"(4 * sum_pitch)
        : VECTORS);
}

/* 32 codes of 4 bits of two rows at a time. Four tables of 16 bytes hold the bytes of 16 values, levels times the row's
 * scale: v0-v3 of one row, v4-v7 of the other; codes: v8, v9 and v10, v11. st4 puts four bytes together. */
#define BYTES3(op, d, a, b) #op " v" #d ".16b, v" #a ".16b, v" #b ".16b\n"
#define LOOK(d, table, code) "tbl v" #d ".16b, {v" #table ".16b}, v" #code ".16b\n"
#define VALUES(d0, d1, d2, d3, t0, t1, t2, t3, code) \
    LOOK(d0, t0, code) LOOK(d1, t1, code) LOOK(d2, t2, code) LOOK(d3, t3, code)
#define PUT(a, b, c, d, to) "st4 {v" #a ".16b, v" #b ".16b, v" #c ".16b, v" #d ".16b}, [%[" #to "]]\n"
#define SCALED(d, level, scale) "fmul v" #d ".4s, v" #level ".4s, v" #scale ".s[0]\n"
/* Codes at p and q to v8-v11; where the first one is a high half, high and low half of a byte belong to neighbours. */
#define HALVES_EVEN \
    "ushr v30.16b, v28.16b, #4\n" BYTES3(and, 28, 28, 12) "ushr v31.16b, v29.16b, #4\n" BYTES3(and, 29, 29, 12)
#define HALVES_ODD \
    "ushr v28.16b, v28.16b, #4\n" BYTES3(and, 30, 30, 12) "ushr v29.16b, v29.16b, #4\n" BYTES3(and, 31, 31, 12)
#define READ_EVEN "ldr q28, [%[p]]\nldr q29, [%[q]]\n"
#define READ_ODD READ_EVEN "ldur q30, [%[p], #1]\nldur q31, [%[q], #1]\n"
#define CODES BYTES3(zip1, 8, 28, 30) BYTES3(zip2, 9, 28, 30) BYTES3(zip1, 10, 29, 31) BYTES3(zip2, 11, 29, 31)
#define FIRST_VALUES VALUES(16, 17, 18, 19, 0, 1, 2, 3, 8) VALUES(20, 21, 22, 23, 4, 5, 6, 7, 10)
#define OTHER_VALUES \
    PUT(16, 17, 18, 19, to) VALUES(16, 17, 18, 19, 4, 5, 6, 7, 11) PUT(20, 21, 22, 23, other) \
    VALUES(24, 25, 26, 27, 0, 1, 2, 3, 9)
#define LOOK_UP(read, halves) \
    __asm__ volatile( \
        "ldp s13, s14, [%[scale]]\n" read "add %[p], %[p], #16\nadd %[q], %[q], #16\n" \
        "ld1 {v20.4s, v21.4s, v22.4s, v23.4s}, [%[levels]]\nmovi v12.16b, #15\n" halves \
        SCALED(16, 20, 13) SCALED(17, 21, 13) SCALED(18, 22, 13) SCALED(19, 23, 13) \
        SCALED(20, 20, 14) SCALED(21, 21, 14) SCALED(22, 22, 14) SCALED(23, 23, 14) \
        BYTES3(uzp1, 24, 16, 17) BYTES3(uzp1, 25, 18, 19) BYTES3(uzp2, 26, 16, 17) BYTES3(uzp2, 27, 18, 19) \
        CODES \
        BYTES3(uzp1, 28, 20, 21) BYTES3(uzp1, 29, 22, 23) BYTES3(uzp2, 30, 20, 21) BYTES3(uzp2, 31, 22, 23) \
        BYTES3(uzp1, 0, 24, 25) BYTES3(uzp1, 1, 26, 27) BYTES3(uzp2, 2, 24, 25) BYTES3(uzp2, 3, 26, 27) \
        BYTES3(uzp1, 4, 28, 29) BYTES3(uzp1, 5, 30, 31) BYTES3(uzp2, 6, 28, 29) BYTES3(uzp2, 7, 30, 31) \
        "cbz %[left], 2f\n" \
        "1:\n" read FIRST_VALUES halves OTHER_VALUES CODES PUT(16, 17, 18, 19, other_high) PUT(24, 25, 26, 27, to_high) \
        "add %[p], %[p], #16\nadd %[q], %[q], #16\nadd %[to], %[to], #128\nadd %[to_high], %[to_high], #128\n" \
        "add %[other], %[other], #128\nadd %[other_high], %[other_high], #128\nsubs %[left], %[left], #1\nb.ne 1b\n" \
        "2:\n" FIRST_VALUES OTHER_VALUES PUT(16, 17, 18, 19, other_high) PUT(24, 25, 26, 27, to_high) \
        : [p] "+&r"(p), [q] "+&r"(q), [to] "+&r"(to), [other] "+&r"(other), [to_high] "+&r"(to_high), \
          [other_high] "+&r"(other_high), [left] "+&r"(left) \
        : [levels] "r"(levels), [scale] "r"(scale) \
        : VECTORS)
/* 32·turns codes at p and at q, the first of them in a high half where `odd`, to rows `to` and `to` + pitch. */
INLINE void neon_look_up(const float *levels, const float scale[2], const uint8_t *p, const uint8_t *q, int odd,
                         ptrdiff_t turns, float *to, ptrdiff_t pitch) {
    float *other = to + pitch, *to_high = to + 16, *other_high = other + 16;
    ptrdiff_t left = turns - 1;
    if (odd) LOOK_UP(READ_ODD, HALVES_ODD);
    else LOOK_UP(READ_EVEN, HALVES_EVEN);
}

#pragma GCC diagnostic pop
#endif
