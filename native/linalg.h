/* Dense kernels on rows. Every output element is summed in ascending k, whatever tile it falls into, so a sample's
 * result never depends on its neighbours.
 */
#ifndef IFT_LINALG_H
#define IFT_LINALG_H

#include "vec.h"

#if IFT_BY_LANE
#include "neon.h"
#endif

ALL_REGISTERS

enum gemm_start { FROM_ZERO, FROM_C, FROM_BIAS };

#if IFT_MANY_REGISTERS
enum { GEMM_M = 5, GEMM_V = 4, OUTER_V = 4, DOT_S = 4 };
#else
enum { GEMM_M = 5, GEMM_V = 2, OUTER_V = 2, DOT_S = 2 };
#endif

typedef struct gemm_args {
    ptrdiff_t K, ai, ak, ldb, ldc;
    enum gemm_start start;
    const float *bias;
    int relu;
} gemm_args;

/* c[i][j] = start + Σ_k a[i*ai + k*ak] · b[k*ldb + j] for m rows and v vectors; m and v are constants at every call. */
INLINE void gemm_tile(int m, int v, const gemm_args *g, const float *a, const float *b, float *c, const float *bias) {
    vf acc[GEMM_M][GEMM_V];
    UNROLL for (int i = 0; i < m; i++) {
        UNROLL for (int j = 0; j < v; j++) {
            if (g->start == FROM_ZERO) acc[i][j] = vset(0);
            else if (g->start == FROM_C) acc[i][j] = vload(c + i * g->ldc + j * IFT_VL);
            else acc[i][j] = vload(bias + j * IFT_VL);
        }
    }
    ptrdiff_t k = 0;
#if IFT_BY_LANE
    if (m == 4 && v == 4 && g->ak == 1 && g->K >= 4) {
#define SUMS UNROLL for (int i = 0; i < 4; i++) UNROLL for (int j = 0; j < 4; j++)
        SUMS vstore(c + i * g->ldc + j * IFT_VL, acc[i][j]);
        neon_rank(b, g->ldb, a, g->ai, g->K / 4, c, g->ldc);
        SUMS acc[i][j] = vload(c + i * g->ldc + j * IFT_VL);
#undef SUMS
        k = g->K / 4 * 4;
    } else if (g->ak == 1) {
        const int deep = m * v + 2 * v + m <= 29 ? 2 : 1; /* rows of b at a time */
        const float *ap = a, *bp[2] = {b, b + g->ldb};
        k = g->K / 4 * 4;
        for (ptrdiff_t left = g->K / 4; left;) {
            vf s[GEMM_M];
            UNROLL for (int i = 0; i < m; i++) s[i] = vload(ap + i * g->ai);
            UNROLL for (int i = m; i < 4; i++) s[i] = s[0];
            ap += 4, left--;
            UNROLL for (int t = 0; t < 4; t += deep) {
                vf row[2 * GEMM_V];
                UNROLL for (int d = 0; d < deep; d++) {
                    UNROLL for (int j = 0; j < v; j++) row[d * v + j] = vload(bp[d] + j * IFT_VL);
                    bp[d] += deep * g->ldb;
                }
                LOADED(s[0], s[1], s[2], s[3], bp[0], bp[1], left, s, m, row, deep * v);
                UNROLL for (int d = 0; d < deep; d++)
                    UNROLL for (int i = 0; i < m; i++)
                        UNROLL for (int j = 0; j < v; j++) acc[i][j] = vlane(acc[i][j], row[d * v + j], s[i], t + d);
            }
        }
    }
#endif
    for (; k < g->K; k++) {
        vf row[GEMM_V];
        UNROLL for (int j = 0; j < v; j++) row[j] = vload(b + k * g->ldb + j * IFT_VL);
        UNROLL for (int i = 0; i < m; i++) {
            vf s = vset(a[i * g->ai + k * g->ak]);
            UNROLL for (int j = 0; j < v; j++) acc[i][j] += s * row[j];
        }
    }
    UNROLL for (int i = 0; i < m; i++) {
        UNROLL for (int j = 0; j < v; j++) {
            vf y = acc[i][j];
            if (g->relu) y = vmax(vset(0), y);
            vstore(c + i * g->ldc + j * IFT_VL, y);
        }
    }
}

INLINE void gemm_columns(int v, int m, const gemm_args *g, const float *a, const float *b, float *c, const float *bias) {
    while (m > 0) {
        /* balanced tiles: 16 rows are 4+4+4+4, not 5+5+5+1 */
        int tiles = (m + GEMM_M - 1) / GEMM_M, step = (m + tiles - 1) / tiles;
        switch (step) {
        case 5: gemm_tile(5, v, g, a, b, c, bias); break;
        case 4: gemm_tile(4, v, g, a, b, c, bias); break;
        case 3: gemm_tile(3, v, g, a, b, c, bias); break;
        case 2: gemm_tile(2, v, g, a, b, c, bias); break;
        default: gemm_tile(1, v, g, a, b, c, bias); break;
        }
        a += step * g->ai, c += step * g->ldc, m -= step;
    }
}

/* c (m, n) = start + a · b, n a multiple of IFT_PAD; a is read by strides, so it may be transposed. */
static void gemm(int m, int n, ptrdiff_t K, const float *a, ptrdiff_t ai, ptrdiff_t ak, const float *b, ptrdiff_t ldb,
                 float *c, ptrdiff_t ldc, enum gemm_start start, const float *bias, int relu) {
    gemm_args g = {K, ai, ak, ldb, ldc, start, bias, relu};
    int vectors = n / IFT_VL;
    for (int j = 0; j < vectors;) {
        int tiles = (vectors - j + GEMM_V - 1) / GEMM_V, step = (vectors - j + tiles - 1) / tiles;
        const float *bj = b + j * IFT_VL, *bias_j = bias ? bias + j * IFT_VL : bias;
        float *cj = c + j * IFT_VL;
        switch (step) {
#if IFT_MANY_REGISTERS
        case 4: gemm_columns(4, m, &g, a, bj, cj, bias_j); break;
        case 3: gemm_columns(3, m, &g, a, bj, cj, bias_j); break;
#endif
        case 2: gemm_columns(2, m, &g, a, bj, cj, bias_j); break;
        default: gemm_columns(1, m, &g, a, bj, cj, bias_j); break;
        }
        j += step;
    }
}

/* acc[s][r] summed within each vector, to h[r][s]: in-register adds and shuffles, the same tree for every sample. */
INLINE void reduce_tile(int ns, vf acc[4][4], float *h, ptrdiff_t ldh) {
#if IFT_VL == 1
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int s = 0; s < ns; s++) h[r * ldh + s] = acc[s][r];
#else
    vf w[4]; /* in each quarter: the four ranks' sums over that quarter */
    UNROLL for (int s = 0; s < 4; s++) {
        vf *a = acc[s];
        if (s >= ns) {
            w[s] = vset(0);
            continue;
        }
#if IFT_VL == 16
#define LOWS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGHS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define FIRSTS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LASTS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif IFT_VL == 8
#define LOWS 0, 8, 1, 9, 4, 12, 5, 13
#define HIGHS 2, 10, 3, 11, 6, 14, 7, 15
#define FIRSTS 0, 1, 8, 9, 4, 5, 12, 13
#define LASTS 2, 3, 10, 11, 6, 7, 14, 15
#else
#define LOWS 0, 4, 1, 5
#define HIGHS 2, 6, 3, 7
#define FIRSTS 0, 1, 4, 5
#define LASTS 2, 3, 6, 7
#endif
        vf u = SHUFFLE(vi, a[0], a[1], LOWS) + SHUFFLE(vi, a[0], a[1], HIGHS);
        vf v = SHUFFLE(vi, a[2], a[3], LOWS) + SHUFFLE(vi, a[2], a[3], HIGHS);
        w[s] = SHUFFLE(vi, u, v, FIRSTS) + SHUFFLE(vi, u, v, LASTS);
    }
    v4 t[4]; /* t[s] = the four ranks of sample s */
#if IFT_VL == 16
    vf p = SHUFFLE(vi, w[0], w[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(vi, w[0], w[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vf q = SHUFFLE(vi, w[2], w[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(vi, w[2], w[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vf all = SHUFFLE(vi, p, q, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             SHUFFLE(vi, p, q, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    all = SHUFFLE(vi, all, all, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    memcpy(t, &all, sizeof t);
    UNROLL for (int r = 0; r < 4; r++) {
        if (ns == 4) v4store(h + r * ldh, t[r]);
        else UNROLL for (int s = 0; s < ns; s++) h[r * ldh + s] = t[r][s];
    }
#else
    UNROLL for (int s = 0; s < ns; s++) t[s] = vfold(w[s]);
#if IFT_MANY_REGISTERS
    if (ns == 4) {
        v4 a = SHUFFLE(i4, t[0], t[2], 0, 4, 1, 5), b = SHUFFLE(i4, t[0], t[2], 2, 6, 3, 7);
        v4 c = SHUFFLE(i4, t[1], t[3], 0, 4, 1, 5), d = SHUFFLE(i4, t[1], t[3], 2, 6, 3, 7);
        v4store(h, SHUFFLE(i4, a, c, 0, 4, 1, 5)), v4store(h + ldh, SHUFFLE(i4, a, c, 2, 6, 3, 7));
        v4store(h + 2 * ldh, SHUFFLE(i4, b, d, 0, 4, 1, 5)), v4store(h + 3 * ldh, SHUFFLE(i4, b, d, 2, 6, 3, 7));
        return;
    }
#endif
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int s = 0; s < ns; s++) h[r * ldh + s] = t[s][r];
#endif
#undef LOWS
#undef HIGHS
#undef FIRSTS
#undef LASTS
#endif
}

/* h[r][s] = Σ_n x[s][n] · a[r][n] for four ranks and ns samples, or += where `add`. */
INLINE void dot_tile(int ns, const float *const *x, ptrdiff_t shift, const float *a, ptrdiff_t lda, int n, int add, float *h,
                     ptrdiff_t ldh) {
    vf acc[4][4];
    UNROLL for (int s = 0; s < ns; s++) UNROLL for (int r = 0; r < 4; r++) acc[s][r] = vset(0);
    if (add) UNROLL for (int s = 0; s < ns; s++) UNROLL for (int r = 0; r < 4; r++) acc[s][r] = vfirst(h[r * ldh + s]);
    const float *p[4];
    UNROLL for (int s = 0; s < ns; s++) p[s] = x[s] + shift;
#if IFT_BY_LANE
    const float *const ap[4] = {a, a + lda, a + 2 * lda, a + 3 * lda};
    ptrdiff_t i = 0, j = 4; /* two indices for eight rows; one would take a sum for every other load */
    for (int left = n / 8; left;) {
        vf ar[8], v[8];
        UNROLL for (int r = 0; r < 4; r++) ar[2 * r] = vload(ap[r] + i), ar[2 * r + 1] = vload(ap[r] + j);
        UNROLL for (int s = 0; s < ns; s++) v[2 * s] = vload(p[s] + i), v[2 * s + 1] = vload(p[s] + j);
        UNROLL for (int s = 2 * ns; s < 8; s += 2) v[s] = v[0];
        i += 8, j += 8, left--;
        LOADED(v[0], v[2], v[4], v[6], i, j, left, ar, 8, v, 2 * ns);
        UNROLL for (int d = 0; d < 2; d++)
            UNROLL for (int s = 0; s < ns; s++)
                UNROLL for (int r = 0; r < 4; r++) acc[s][r] += v[2 * s + d] * ar[2 * r + d];
    }
#else
    for (int i = 0; i < n; i += IFT_VL) {
        vf ar[4];
        UNROLL for (int r = 0; r < 4; r++) ar[r] = vload(a + r * lda + i);
        vf v[4];
        UNROLL for (int s = 0; s < ns; s++) v[s] = vload(p[s] + i);
        UNROLL for (int s = 0; s < ns; s++)
            UNROLL for (int r = 0; r < 4; r++) acc[s][r] += v[s] * ar[r];
    }
#endif
    reduce_tile(ns, acc, h, ldh);
}

/* h (R, ldh) = A · Xᵀ, or += where `add`: rows x[s] + shift of n floats (a multiple of IFT_PAD), R a multiple of 4. */
static void dot(int S, const float *const *x, ptrdiff_t shift, int R, const float *a, ptrdiff_t lda, int n, int add,
                float *h, ptrdiff_t ldh) {
    for (int r = 0; r < R; r += 4) {
        int s = 0;
        for (; s + DOT_S <= S; s += DOT_S) dot_tile(DOT_S, x + s, shift, a + r * lda, lda, n, add, h + r * ldh + s, ldh);
        for (; s < S; s++) dot_tile(1, x + s, shift, a + r * lda, lda, n, add, h + r * ldh + s, ldh);
    }
}

/* a[r][i…] += Σ_s g[r][s] · x[s][i…] for four ranks and v vectors. */
INLINE void outer_tile(int v, int S, const float *g, ptrdiff_t ldg, const float *const *x, const float *const *next,
                       ptrdiff_t shift, float *a, ptrdiff_t lda) {
    vf acc[4][OUTER_V];
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int j = 0; j < v; j++) acc[r][j] = vload(a + r * lda + j * IFT_VL);
    int s = 0;
#if IFT_BY_LANE
    const float *gp = g;
    for (int left = S / 4; left;) {
        vf w[4];
        UNROLL for (int r = 0; r < 4; r++) w[r] = vload(gp + r * ldg);
        const float *p[4];
        UNROLL for (int t = 0; t < 4; t++) p[t] = x[s + t] + shift;
        if (next) UNROLL for (int t = 0; t < 4; t++)
            UNROLL for (int j = 0; j < v * IFT_VL; j += IFT_PAD) __builtin_prefetch(next[s + t] + shift + j, 0, 2);
        gp += 4, s += 4, left--;
        UNROLL for (int t = 0; t < 4; t += 2) {
            vf row[2 * OUTER_V];
            UNROLL for (int d = 0; d < 2; d++)
                UNROLL for (int j = 0; j < v; j++) row[d * v + j] = vload(p[t + d] + j * IFT_VL);
            LOADED(w[0], w[1], w[2], w[3], p[2], p[3], left, w, 4, row, 2 * v);
            UNROLL for (int d = 0; d < 2; d++)
                UNROLL for (int r = 0; r < 4; r++)
                    UNROLL for (int j = 0; j < v; j++) acc[r][j] = vlane(acc[r][j], row[d * v + j], w[r], t + d);
        }
    }
#endif
    for (; s < S; s++) {
        const float *p = x[s] + shift;
        vf row[OUTER_V];
        UNROLL for (int j = 0; j < v; j++) row[j] = vload(p + j * IFT_VL);
        if (next) UNROLL for (int j = 0; j < v * IFT_VL; j += IFT_PAD) __builtin_prefetch(next[s] + shift + j, 0, 2);
        UNROLL for (int r = 0; r < 4; r++) {
            vf w = vset(g[r * ldg + s]);
            UNROLL for (int j = 0; j < v; j++) acc[r][j] += w * row[j];
        }
    }
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int j = 0; j < v; j++) vstore(a + r * lda + j * IFT_VL, acc[r][j]);
}

/* A (R, n) += G (R, S) · X (S, n): the update of an adapter in one pass, without a gradient buffer. What the next batch
 * will read is fetched meanwhile (next: its rows, as many as x), since records mostly wait in a far cache. */
static void outer(int S, const float *const *x, const float *const *next, ptrdiff_t shift, int R, const float *g, ptrdiff_t ldg, float *a,
                  ptrdiff_t lda, int n) {
    for (int r = 0; r < R; r += 4) {
        const float *gr = g + r * ldg;
        float *ar = a + r * lda;
        int i = 0;
#if IFT_BY_LANE
        int apart = S > 3 && !next; /* rows lie evenly apart */
        for (int s = 2; s < S && apart; s++) apart = x[s] - x[s - 1] == x[1] - x[0];
        if (apart) {
            const int done = S / 4 * 4;
            for (; i + 16 <= n; i += 16) {
                neon_rank(x[0] + shift + i, x[1] - x[0], gr, ldg, S / 4, ar + i, lda);
                if (done < S) outer_tile(OUTER_V, S - done, gr + done, ldg, x + done, NULL, shift + i, ar + i, lda);
            }
        }
#endif
        for (; i + OUTER_V * IFT_VL <= n; i += OUTER_V * IFT_VL)
            outer_tile(OUTER_V, S, gr, ldg, x, r ? NULL : next, shift + i, ar + i, lda);
        for (; i < n; i += IFT_VL) outer_tile(1, S, gr, ldg, x, NULL, shift + i, ar + i, lda);
    }
}

#endif
