/* Dense algebra of the closed form: X·Xᵀ, the inverse of a Cholesky factor, diagonal blocks of an inverse. A template:
 * the includer sets D (number), DV (its vector), DL (lanes of one), DN (how names end) and, where there is one, DT
 * (turns a square of DL vectors).
 *
 * All of it is one product: the left side is read where it lies, the right side is packed into panels of PANEL_N columns
 * that stay in the near cache. Every element is summed in ascending k, in blocks whose limits depend on its column
 * alone, so it is the same to the bit whichever rows are asked for.
 *
 * Is not: a BLAS. Only what the closed form needs; rows of a matrix hold their values side by side.
 */
#ifndef IFT_DENSE_H
#define IFT_DENSE_H

#include "instantft.h"
#include "vec.h"

enum dense_how { C_IS, C_IS_MINUS, C_PLUS, C_MINUS }; /* C = P, C = −P, C += P, C −= P */

/* Which sums are cut short because a matrix is a triangle (i row, j column of C). */
enum dense_cut {
    C_LOWER = 1,  /* only j ≤ i is wanted */
    K_TO_J = 2,   /* the right side is zero for k > j */
    K_FROM_J = 4, /* … for k < j */
    K_TO_I = 8,   /* the left side is zero for k > i */
};

enum { DENSE_V = 3, DENSE_LEAF = IFT_DENSE_LEAF }; /* vectors in a panel's row */
#endif

/* The tile's sums, one panel row and one value of the left side fill the registers. */
#if IFT_VL == 1
#define TILE_M 3
#elif IFT_MANY_REGISTERS
#define TILE_M 8
#else
#define TILE_M 4
#endif
#define PANEL_N (DENSE_V * DL)
#define PANEL_K ((ptrdiff_t)(IFT_DENSE_BYTES / (sizeof(D) * PANEL_N)))

#if IFT_VL == 1
INLINE DV DN(load)(const D *p) { return *p; }
INLINE void DN(store)(D *p, DV v) { *p = v; }
#else
INLINE DV DN(load)(const D *p) {
    DV v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void DN(store)(D *p, DV v) { memcpy(p, &v, sizeof v); }
#endif

/* C (m, n) = A (m, K) · B (K, n), as `how` and `cut` have it. */
typedef struct DN(product) {
    const D *a, *b;
    D *c;
    ptrdiff_t lda, ldb, ldc;
    ptrdiff_t first, m, n, K; /* rows first … m−1 of C are wanted */
    int a_turned, b_turned;   /* a, b hold Aᵀ (K, m), Bᵀ (n, K) */
    enum dense_how how;
    int cut;
} DN(product);

/* panel[k][j] = B[k0 + k][j0 + j], zeros beyond column n. */
static void DN(pack)(const DN(product) * p, ptrdiff_t j0, ptrdiff_t k0, ptrdiff_t K, D *panel) {
    ptrdiff_t n = p->n - j0 < PANEL_N ? p->n - j0 : PANEL_N;
    if (n == PANEL_N && !p->b_turned) {
        const D *b = p->b + k0 * p->ldb + j0;
        for (ptrdiff_t k = 0; k < K; k++)
            UNROLL for (int j = 0; j < DENSE_V; j++) DN(store)(panel + k * PANEL_N + j * DL, DN(load)(b + k * p->ldb + j * DL));
        return;
    }
    if (n < PANEL_N) memset(panel, 0, (size_t)(K * PANEL_N) * sizeof *panel);
    if (!p->b_turned) {
        const D *b = p->b + k0 * p->ldb + j0;
        for (ptrdiff_t k = 0; k < K; k++) memcpy(panel + k * PANEL_N, b + k * p->ldb, (size_t)n * sizeof *panel);
        return;
    }
    const D *b = p->b + j0 * p->ldb + k0;
    ptrdiff_t j = 0;
#ifdef DT
    for (; j + DL <= n; j += DL, b += DL * p->ldb) {
        ptrdiff_t k = 0;
        for (; k + DL <= K; k += DL) {
            DV v[DL];
            UNROLL for (int r = 0; r < DL; r++) v[r] = DN(load)(b + r * p->ldb + k);
            DT(v);
            UNROLL for (int r = 0; r < DL; r++) DN(store)(panel + (k + r) * PANEL_N + j, v[r]);
        }
        for (; k < K; k++)
            for (int r = 0; r < DL; r++) panel[k * PANEL_N + j + r] = b[r * p->ldb + k];
    }
#endif
    for (; j < n; j++, b += p->ldb)
        for (ptrdiff_t k = 0; k < K; k++) panel[k * PANEL_N + j] = b[k];
}

/* acc[r][j…] = Σ_k a[r·ai + k·ak] · panel[k][j…] for m rows, m a constant at every call. */
INLINE void DN(sums)(int m, ptrdiff_t K, const D *a, ptrdiff_t ai, ptrdiff_t ak, const D *panel,
                     DV acc[TILE_M][DENSE_V]) {
    UNROLL for (int r = 0; r < m; r++) UNROLL for (int j = 0; j < DENSE_V; j++) acc[r][j] = (DV){0};
    for (ptrdiff_t k = 0; k < K;) {
        ptrdiff_t stop = K - k < IFT_PAD ? K : k + IFT_PAD;
        if (ak == 1) /* what the next tile will read */
            UNROLL for (int r = 0; r < m; r++) __builtin_prefetch(a + (r + m) * ai + k, 0, 2);
        for (; k < stop; k++, panel += PANEL_N) {
            DV row[DENSE_V];
            UNROLL for (int j = 0; j < DENSE_V; j++) row[j] = DN(load)(panel + j * DL);
            UNROLL for (int r = 0; r < m; r++) {
                DV s = a[r * ai + k * ak] - (DV){0};
                UNROLL for (int j = 0; j < DENSE_V; j++) acc[r][j] += s * row[j];
            }
        }
    }
}

INLINE void DN(tile)(int m, int turned, const DN(product) * p, enum dense_how how, ptrdiff_t i, ptrdiff_t j,
                     ptrdiff_t k, ptrdiff_t K, const D *panel) {
    DV acc[TILE_M][DENSE_V];
    D *c = p->c + i * p->ldc + j;
    UNROLL for (int r = 0; r < m; r++) {
        __builtin_prefetch(c + r * p->ldc, 1);
        __builtin_prefetch(c + r * p->ldc + PANEL_N - 1, 1);
    }
    if (turned) DN(sums)(m, K, p->a + i + k * p->lda, 1, p->lda, panel, acc);
    else DN(sums)(m, K, p->a + i * p->lda + k, p->lda, 1, panel, acc);
    if (how == C_IS_MINUS || how == C_MINUS)
        UNROLL for (int r = 0; r < m; r++) UNROLL for (int v = 0; v < DENSE_V; v++) acc[r][v] = -acc[r][v];
    int add = how == C_PLUS || how == C_MINUS;
    if (j + PANEL_N <= p->n && (!(p->cut & C_LOWER) || j + PANEL_N <= i + 1)) {
        UNROLL for (int r = 0; r < m; r++) UNROLL for (int v = 0; v < DENSE_V; v++) {
            D *at = c + r * p->ldc + v * DL;
            DN(store)(at, add ? DN(load)(at) + acc[r][v] : acc[r][v]);
        }
        return;
    }
    D edge[PANEL_N];
    UNROLL for (int r = 0; r < m; r++) {
        ptrdiff_t n = p->cut & C_LOWER && i + r + 1 < p->n ? i + r + 1 : p->n;
        UNROLL for (int v = 0; v < DENSE_V; v++) DN(store)(edge + v * DL, acc[r][v]);
        for (ptrdiff_t l = 0; l < n - j && l < PANEL_N; l++) c[r * p->ldc + l] = add ? c[r * p->ldc + l] + edge[l] : edge[l];
    }
}

INLINE void DN(multiply_as)(const DN(product) * p, int turned, D *panel) {
    for (ptrdiff_t j = 0; j < p->n; j += PANEL_N) {
        ptrdiff_t from = p->cut & K_FROM_J ? j : 0, to = p->cut & K_TO_J && j + PANEL_N < p->K ? j + PANEL_N : p->K;
        enum dense_how how = p->how;
        ptrdiff_t parts = (to - from + PANEL_K - 1) / PANEL_K, step = parts ? (to - from + parts - 1) / parts : 1;
        for (ptrdiff_t k = from; k < to; k += step) { /* balanced: 784 are 262 + 262 + 260, not 3 · 256 + 16 */
            ptrdiff_t K = to - k < step ? to - k : step;
            ptrdiff_t i = p->cut & C_LOWER && j > p->first ? j : p->first;
            if (p->cut & K_TO_I && k > i) i = k;
            if (i >= p->m) break;
            DN(pack)(p, j, k, K, panel);
            while (i < p->m) {
                int m = p->m - i >= TILE_M ? TILE_M : p->m - i >= 2 ? 2 : 1;
                ptrdiff_t Ki = p->cut & K_TO_I && i + m - k < K ? i + m - k : K;
                if (m == TILE_M) DN(tile)(TILE_M, turned, p, how, i, j, k, Ki, panel);
                else if (m == 2) DN(tile)(2, turned, p, how, i, j, k, Ki, panel);
                else DN(tile)(1, turned, p, how, i, j, k, Ki, panel);
                i += m;
            }
            how = how == C_IS ? C_PLUS : how == C_IS_MINUS ? C_MINUS : how;
        }
    }
}

static void DN(multiply)(const DN(product) * p, D *panel) {
    if (p->a_turned) DN(multiply_as)(p, 1, panel);
    else DN(multiply_as)(p, 0, panel);
}

/* G[i][j] = x_i·x_j, or G[i][j] += x_i·x_j, for first ≤ i < last and j ≤ i; x_i has K values and starts at x + i·pitch. */
static void DN(gram)(const D *x, int64_t pitch, int64_t K, int64_t first, int64_t last, int add, D *g, int64_t ldg,
                     void *workspace) {
    DN(product) p = {0};
    p.a = p.b = x, p.lda = p.ldb = (ptrdiff_t)pitch, p.b_turned = 1;
    p.c = g, p.ldc = (ptrdiff_t)ldg;
    p.first = (ptrdiff_t)first, p.m = p.n = (ptrdiff_t)last, p.K = (ptrdiff_t)K;
    p.how = add ? C_PLUS : C_IS, p.cut = C_LOWER;
    DN(multiply)(&p, (D *)workspace);
}

/* The same as `inverse_factor`, for n ≤ DENSE_LEAF: u[j][i] = L[i][j], so that all loops run along rows. */
static int64_t DN(leaf)(const D *g, ptrdiff_t ldg, D *v, ptrdiff_t ldv, int n, D *u) {
    D *w = u + DENSE_LEAF * DENSE_LEAF;
    for (int j = 0; j < DENSE_LEAF; j++)
        for (int i = 0; i < DENSE_LEAF; i++) u[j * DENSE_LEAF + i] = i < n && j <= i ? g[i * ldg + j] : 0;
    memset(w, 0, sizeof *w * DENSE_LEAF * DENSE_LEAF);
    for (int j = 0; j < n; j++) {
        D *row = u + j * DENSE_LEAF, *inverse = w + j * DENSE_LEAF;
        if (!(row[j] > 0) || !isfinite(row[j])) return j + 1;
        D scale = 1 / (D)sqrt((double)row[j]);
        for (int i = 0; i < DENSE_LEAF; i++) row[i] *= scale;
        for (int k = j + 1; k < n; k++) {
            D s = row[k], *other = u + k * DENSE_LEAF;
            for (int i = 0; i < DENSE_LEAF; i++) other[i] -= s * row[i];
        }
        /* row j of V from those above, which have been taken off already */
        inverse[j] = 1;
        for (int i = 0; i < DENSE_LEAF; i++) inverse[i] *= scale;
        for (int k = j + 1; k < n; k++) {
            D s = row[k], *other = w + k * DENSE_LEAF;
            for (int i = 0; i < DENSE_LEAF; i++) other[i] -= s * inverse[i];
        }
    }
    for (int i = 0; i < n; i++) memcpy(v + i * ldv, w + i * DENSE_LEAF, (size_t)(i + 1) * sizeof *v);
    return 0;
}

/* V = L⁻¹ with L·Lᵀ = G, of which the lower triangle is read and used up. V must be zero above its diagonal, and stays
 * so. By halves, as solvers/factor.py draws it, in four products. Returns 0, or the 1-based row at which G turned out
 * not to be positive definite, or not finite. */
static int64_t DN(inverse_factor)(D *g, int64_t ldg, D *v, int64_t ldv, int64_t n, void *workspace) {
    if (n <= DENSE_LEAF) return DN(leaf)(g, (ptrdiff_t)ldg, v, (ptrdiff_t)ldv, (int)n, (D *)workspace);
    int64_t h = (n / 2 + PANEL_N - 1) / PANEL_N * PANEL_N;
    D *b = g + h * ldg, *d = b + h, *v21 = v + h * ldv, *v22 = v21 + h;
    int64_t at = DN(inverse_factor)(g, ldg, v, ldv, h, workspace);
    if (at) return at;
    DN(product) p = {0};
    p.K = p.n = (ptrdiff_t)h, p.m = (ptrdiff_t)(n - h);
    /* L21 = B·V11ᵀ, kept where V21 will be */
    p.a = b, p.lda = (ptrdiff_t)ldg, p.b = v, p.ldb = (ptrdiff_t)ldv, p.b_turned = 1, p.c = v21, p.ldc = (ptrdiff_t)ldv;
    p.cut = K_TO_J;
    DN(multiply)(&p, (D *)workspace);
    /* D −= L21·L21ᵀ */
    p.a = p.b = v21, p.lda = p.ldb = (ptrdiff_t)ldv, p.c = d, p.ldc = (ptrdiff_t)ldg, p.n = p.m;
    p.how = C_MINUS, p.cut = C_LOWER;
    DN(multiply)(&p, (D *)workspace);
    /* B = L21·V11 */
    p.b = v, p.b_turned = 0, p.c = b, p.n = (ptrdiff_t)h, p.how = C_IS, p.cut = K_FROM_J;
    DN(multiply)(&p, (D *)workspace);
    at = DN(inverse_factor)(d, ldg, v22, ldv, n - h, workspace);
    if (at) return h + at;
    /* V21 = −V22·B */
    p.a = v22, p.b = b, p.ldb = (ptrdiff_t)ldg, p.c = v21, p.ldc = (ptrdiff_t)ldv, p.K = p.m;
    p.how = C_IS_MINUS, p.cut = K_TO_I;
    DN(multiply)(&p, (D *)workspace);
    return 0;
}

/* G[i][j] = d_i·d_j·Σ_p w_p·part_p[r_i][r_j] + c_i·c_j for j ≤ i < n, r = rows or 0 … n−1; one pass, row by row. */
static void DN(combine)(const D *const *part, const D *w, int64_t count, int64_t ld, const int64_t *rows, const D *d,
                        const D *c, int64_t n, D *g, int64_t ldg) {
    for (int64_t i = 0; i < n; i++, g += ldg) {
        for (int64_t p = 0; p < count; p++) {
            const D *from = part[p] + (rows ? rows[i] : i) * ld;
            if (p && rows) for (int64_t j = 0; j <= i; j++) g[j] += w[p] * from[rows[j]];
            else if (p) for (int64_t j = 0; j <= i; j++) g[j] += w[p] * from[j];
            else if (rows) for (int64_t j = 0; j <= i; j++) g[j] = w[p] * from[rows[j]];
            else for (int64_t j = 0; j <= i; j++) g[j] = w[p] * from[j];
        }
        if (!count) memset(g, 0, (size_t)(i + 1) * sizeof *g);
        for (int64_t j = 0; j <= i; j++) g[j] = d[i] * d[j] * g[j] + c[i] * c[j];
    }
}

/* The blocks of VᵀV on its diagonal, for rows starts[b] … starts[b+1]−1; out holds one tight block after the other. */
static void DN(inverse_blocks)(const D *v, int64_t ldv, int64_t n, const int64_t *starts, int64_t count, D *out,
                               void *workspace) {
    for (int64_t b = 0; b < count; b++) {
        int64_t m = starts[b + 1] - starts[b];
        DN(product) p = {0};
        p.a = p.b = v + starts[b] * ldv + starts[b], p.lda = p.ldb = (ptrdiff_t)ldv, p.a_turned = 1;
        p.c = out, p.ldc = p.m = p.n = (ptrdiff_t)m, p.K = (ptrdiff_t)(n - starts[b]);
        DN(multiply)(&p, (D *)workspace);
        out += m * m;
    }
}

#undef TILE_M
#undef PANEL_N
#undef PANEL_K
