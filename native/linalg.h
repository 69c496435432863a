/* Dense kernels on rows. Every output element is summed in ascending k, whatever tile it falls into, so a sample's
 * result never depends on its neighbours.
 */
#ifndef IFT_LINALG_H
#define IFT_LINALG_H

#include "vec.h"

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
    for (ptrdiff_t k = 0; k < g->K; k++) {
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

/* h[r][s] = Σ_n x[s][n] · a[r][n] for four ranks and ns samples; a zero stands in for samples that are not there, so
 * that every sample's sum is taken in the same order. */
INLINE void dot_tile(int ns, const float *const *x, ptrdiff_t shift, const float *a, ptrdiff_t lda, int n, float *h,
                     ptrdiff_t ldh) {
    vf acc[4][4];
    UNROLL for (int s = 0; s < ns; s++) UNROLL for (int r = 0; r < 4; r++) acc[s][r] = vset(0);
    const float *p[4];
    UNROLL for (int s = 0; s < ns; s++) p[s] = x[s] + shift;
    for (int i = 0; i < n; i += IFT_VL) {
        vf ar[4];
        UNROLL for (int r = 0; r < 4; r++) ar[r] = vload(a + r * lda + i);
        UNROLL for (int s = 0; s < ns; s++) {
            vf v = vload(p[s] + i);
            UNROLL for (int r = 0; r < 4; r++) acc[s][r] += v * ar[r];
        }
    }
#if IFT_VL == 1
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int s = 0; s < ns; s++) h[r * ldh + s] = acc[s][r];
#else
    /* sums of one sample over its four ranks, then turned so that samples lie together */
    float t[4][4];
    UNROLL for (int s = 0; s < ns; s++) v4store(t[s], vsum4(acc[s][0], acc[s][1], acc[s][2], acc[s][3]));
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int s = 0; s < ns; s++) h[r * ldh + s] = t[s][r];
#endif
}

/* h (R, ldh) = A · Xᵀ: rows x[s] + shift of n floats (a multiple of IFT_PAD), R a multiple of 4. */
static void dot(int S, const float *const *x, ptrdiff_t shift, int R, const float *a, ptrdiff_t lda, int n, float *h,
                ptrdiff_t ldh) {
    for (int r = 0; r < R; r += 4) {
        int s = 0;
        for (; s + DOT_S <= S; s += DOT_S) dot_tile(DOT_S, x + s, shift, a + r * lda, lda, n, h + r * ldh + s, ldh);
        for (; s < S; s++) dot_tile(1, x + s, shift, a + r * lda, lda, n, h + r * ldh + s, ldh);
    }
}

/* a[r][i…] += Σ_s g[r][s] · x[s][i…] for four ranks and v vectors. */
INLINE void outer_tile(int v, int S, const float *g, ptrdiff_t ldg, const float *const *x, ptrdiff_t shift, float *a,
                       ptrdiff_t lda) {
    vf acc[4][OUTER_V];
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int j = 0; j < v; j++) acc[r][j] = vload(a + r * lda + j * IFT_VL);
    for (int s = 0; s < S; s++) {
        const float *p = x[s] + shift;
        vf row[OUTER_V];
        UNROLL for (int j = 0; j < v; j++) row[j] = vload(p + j * IFT_VL);
        UNROLL for (int r = 0; r < 4; r++) {
            vf w = vset(g[r * ldg + s]);
            UNROLL for (int j = 0; j < v; j++) acc[r][j] += w * row[j];
        }
    }
    UNROLL for (int r = 0; r < 4; r++) UNROLL for (int j = 0; j < v; j++) vstore(a + r * lda + j * IFT_VL, acc[r][j]);
}

/* A (R, n) += G (R, S) · X (S, n): the update of an adapter in one pass, without a gradient buffer. */
static void outer(int S, const float *const *x, ptrdiff_t shift, int R, const float *g, ptrdiff_t ldg, float *a,
                  ptrdiff_t lda, int n) {
    for (int r = 0; r < R; r += 4) {
        const float *gr = g + r * ldg;
        float *ar = a + r * lda;
        int i = 0;
        for (; i + OUTER_V * IFT_VL <= n; i += OUTER_V * IFT_VL)
            outer_tile(OUTER_V, S, gr, ldg, x, shift + i, ar + i, lda);
        for (; i < n; i += IFT_VL) outer_tile(1, S, gr, ldg, x, shift + i, ar + i, lda);
    }
}

#endif
