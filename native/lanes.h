/* Convolution and its neighbours on lanes: LW samples side by side in every value, so that any kernel, padding and
 * width runs at full vector speed and each sample's arithmetic is the same whoever its neighbours are.
 *
 * A template: include it with LW (lanes), LV (vector of LW floats) and LN(name) defined. Maps are [channel][y][x][LW].
 */

#define LANE_OUT 6 /* output channels in a tile, at most */

#if LW == 1
INLINE LV LN(load)(const float *p) { return *p; }
INLINE void LN(store)(float *p, LV v) { *p = v; }
INLINE LV LN(set)(float x) { return x; }
INLINE LV LN(max)(LV a, LV b) { return a > b ? a : b; }
#else
INLINE LV LN(load)(const float *p) {
    LV v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void LN(store)(float *p, LV v) { memcpy(p, &v, sizeof v); }
INLINE LV LN(set)(float x) { return x - (LV){0}; }
#if LW == IFT_VL
INLINE LV LN(max)(LV a, LV b) { return vmax(a, b); }
#elif defined(__SSE__)
INLINE LV LN(max)(LV a, LV b) { return (LV)_mm_max_ps((__m128)a, (__m128)b); }
#endif
#endif

/* LW samples of w values each, source[s] + at (valid where s < n), to dst[f][LW]. */
static void LN(from_rows)(const float *const *rows, ptrdiff_t at, int n, int w, float *dst) {
    int f = 0;
#if LW > 1
    for (; f + LW <= w; f += LW) {
        LV v[LW];
        for (int s = 0; s < LW; s++) v[s] = s < n ? LN(load)(rows[s] + at + f) : LN(set)(0);
        LN(transpose)(v);
        UNROLL for (int s = 0; s < LW; s++) LN(store)(dst + (f + s) * LW, v[s]);
    }
#endif
    for (; f < w; f++)
        for (int s = 0; s < LW; s++) dst[f * LW + s] = s < n ? rows[s][at + f] : 0;
}

/* The reverse: src[f][LW] to dst[s*pitch + f] for s < n. */
static void LN(to_rows)(const float *src, int n, int w, float *dst, ptrdiff_t pitch) {
    int f = 0;
#if LW > 1
    for (; f + LW <= w; f += LW) {
        LV v[LW];
        UNROLL for (int s = 0; s < LW; s++) v[s] = LN(load)(src + (f + s) * LW);
        LN(transpose)(v);
        UNROLL for (int s = 0; s < LW; s++) if (s < n) LN(store)(dst + s * pitch + f, v[s]);
    }
#endif
    for (; f < w; f++)
        for (int s = 0; s < n; s++) dst[s * pitch + f] = src[f * LW + s];
}

/* A compact map into one with a border of zeros. */
static void LN(pad_map)(const float *src, int c, int h, int w, int ph, int pw, float *dst) {
    size_t row = (size_t)(w + 2 * pw) * LW;
    for (int i = 0; i < c; i++) {
        memset(dst, 0, (size_t)ph * row * sizeof *dst);
        dst += (size_t)ph * row;
        for (int y = 0; y < h; y++, dst += row, src += (size_t)w * LW) {
            memset(dst, 0, (size_t)pw * LW * sizeof *dst);
            memcpy(dst + pw * LW, src, (size_t)w * LW * sizeof *dst);
            memset(dst + (pw + w) * LW, 0, (size_t)pw * LW * sizeof *dst);
        }
        memset(dst, 0, (size_t)ph * row * sizeof *dst);
        dst += (size_t)ph * row;
    }
}

#if IFT_BY_LANE
/* acc[o][0] += Σ w·x as below, of one row of outputs and a kernel of kw columns: inputs for one row of the kernel and its
 * weights, four to a register, are all there before the first product. oc, cb, kw are constants at every call; oc·kw is at
 * least 4, and oc·cb + (cb + kw - 1) + oc·kw/4 no more than the registers. */
INLINE void LN(conv_kernel)(int oc, int cb, int kw, const conv_args *g, const float *x, const float *w, int ky0, int ky1,
                            LV acc[LANE_OUT][2][4]) {
    const int n = oc * kw, packed = (n + 3) / 4, columns = cb + kw - 1;
    const ptrdiff_t pitch = g->x_pitch * LW;
    for (int i = 0; i < g->ic; i++) {
        const float *xi = x + i * g->x_plane * LW + ky0 * pitch, *wi = w + ((ptrdiff_t)i * g->kh + ky0) * n;
        for (int left = ky1 - ky0; left;) {
            LV v[8], s[5];
#define COLUMN(c) if (c < columns) v[c] = LN(load)(xi + c * LW); /* of a loop clang makes a copy in memory */
#define FACTORS(j) if (j < packed) s[j] = LN(load)(wi + (j + 1 < packed ? 4 * j : n - 4));
            FACTORS(0) FACTORS(1) FACTORS(2) FACTORS(3) FACTORS(4)
            COLUMN(0) COLUMN(1) COLUMN(2) COLUMN(3) COLUMN(4) COLUMN(5) COLUMN(6) COLUMN(7)
#undef COLUMN
#undef FACTORS
            xi += pitch, wi += n, left--;
            LOADED(s[0], v[0], v[1], v[2], xi, wi, left, s, packed, v, columns);
            UNROLL for (int kx = 0; kx < kw; kx++)
                UNROLL for (int o = 0; o < oc; o++) {
                    const int at = kx * oc + o, j = at / 4, lane = j + 1 < packed ? at % 4 : at + 4 - n;
                    UNROLL for (int c = 0; c < cb; c++) acc[o][0][c] = vlane(acc[o][0][c], v[kx + c], s[j], lane);
                }
        }
    }
}
#endif

/* out channels o…o+oc at rb × cb positions: acc = bias + Σ w·x over channels c, kernel rows ky0…ky1 and all columns.
 * w holds oc values for every (c, ky, kx). oc, rb, cb are constants at every call. */
INLINE void LN(conv_tile)(int oc, int rb, int cb, const conv_args *g, const float *x, const float *w, int ky0, int ky1,
                          const float *bias, LV acc[LANE_OUT][2][4]) {
    UNROLL for (int o = 0; o < oc; o++)
        UNROLL for (int r = 0; r < rb; r++)
            UNROLL for (int c = 0; c < cb; c++) acc[o][r][c] = LN(set)(bias ? bias[o] : 0);
#if IFT_BY_LANE
    if ((oc == 3 || oc == 4) && rb == 1 && cb == 4 && g->kw == 5 && g->kh > 1 && ky1 - ky0 == g->kh) {
        neon_conv_row(oc, g->ic, g->kh, x, g->x_pitch * LW, g->x_plane * LW, w, (float *)acc);
        return;
    }
    if (oc == 4 && rb == 2 && cb == 2 && g->kw == 5 && g->kh > 1 && ky1 - ky0 == g->kh) {
        neon_conv_square(g->ic, g->kh, x, g->x_pitch * LW, g->x_plane * LW, w, (float *)acc);
        return;
    }
    if (oc > 1 && rb == 1 && g->kw == 5) {
        LN(conv_kernel)(oc, cb, 5, g, x, w, ky0, ky1, acc);
        return;
    }
    if (oc > 1 && rb == 1 && g->kw == 3) {
        LN(conv_kernel)(oc, cb, 3, g, x, w, ky0, ky1, acc);
        return;
    }
#endif
    ptrdiff_t pitch = g->x_pitch * LW;
    for (int i = 0; i < g->ic; i++) {
        const float *xi = x + i * g->x_plane * LW + ky0 * pitch;
        const float *wi = w + ((ptrdiff_t)i * g->kh + ky0) * g->kw * oc;
        for (int ky = ky0; ky < ky1; ky++, xi += pitch)
            for (int kx = 0; kx < g->kw; kx++, wi += oc) {
                LV v[2][4];
                UNROLL for (int r = 0; r < rb; r++)
                    UNROLL for (int c = 0; c < cb; c++) v[r][c] = LN(load)(xi + r * pitch + (kx + c) * LW);
                UNROLL for (int o = 0; o < oc; o++) {
                    LV s = LN(set)(wi[o]);
                    UNROLL for (int r = 0; r < rb; r++)
                        UNROLL for (int c = 0; c < cb; c++) acc[o][r][c] += s * v[r][c];
                }
            }
    }
}

/* One row of outputs, oc channels: tiles of up to LANE_COLUMNS columns. */
INLINE void LN(conv_row)(int oc, const conv_args *g, const float *x, const float *w, int ky0, int ky1,
                         const float *bias, float *y) {
    for (int c = 0; c < g->ow;) {
        int left = g->ow - c, tiles = (left + LANE_COLUMNS - 1) / LANE_COLUMNS, step = (left + tiles - 1) / tiles;
        LV acc[LANE_OUT][2][4];
#define ROW(cb)                                                                                        \
    case cb:                                                                                           \
        LN(conv_tile)(oc, 1, cb, g, x + c * LW, w, ky0, ky1, bias, acc);                               \
        UNROLL for (int o = 0; o < oc; o++)                                                            \
            UNROLL for (int j = 0; j < cb; j++) LN(store)(y + (o * g->y_plane + c + j) * LW, acc[o][0][j]); \
        break;
        switch (step) {
#if LANE_COLUMNS == 4
            ROW(4)
            ROW(3)
#endif
            ROW(2)
            ROW(1)
        }
#undef ROW
        c += step;
    }
}

/* One pooled output of each channel, from two rows of two. */
INLINE void LN(conv_pool_square)(int oc, const conv_args *g, const float *x, const float *w, const float *bias, float *y) {
    LV acc[LANE_OUT][2][4];
    LN(conv_tile)(oc, 2, 2, g, x, w, 0, g->kh, bias, acc);
    UNROLL for (int o = 0; o < oc; o++) {
        LV m = LN(max)(LN(max)(acc[o][0][0], acc[o][0][1]), LN(max)(acc[o][1][0], acc[o][1][1]));
        if (g->relu) m = LN(max)(LN(set)(0), m);
        LN(store)(y + o * g->y_plane * LW, m);
    }
}
/* Two rows of outputs and the 2×2 maximum of each pair of columns, ReLU where asked for. */
#if IFT_BY_LANE /* row by row: four columns of one need fewer loads than two of two */
INLINE void LN(conv_pool_tile)(int oc, int cb, const conv_args *g, const float *x, const float *w, const float *bias,
                               float *y) {
    LV high[LANE_OUT][2][4], low[LANE_OUT][2][4];
    LN(conv_tile)(oc, 1, cb, g, x, w, 0, g->kh, bias, high);
    LN(conv_tile)(oc, 1, cb, g, x + g->x_pitch * LW, w, 0, g->kh, bias, low);
    UNROLL for (int o = 0; o < oc; o++)
        UNROLL for (int c = 0; c < cb; c += 2) {
            LV m = LN(max)(LN(max)(high[o][0][c], high[o][0][c + 1]), LN(max)(low[o][0][c], low[o][0][c + 1]));
            if (g->relu) m = LN(max)(LN(set)(0), m);
            LN(store)(y + (o * g->y_plane + c / 2) * LW, m);
        }
}
INLINE void LN(conv_pool_row)(int oc, const conv_args *g, const float *x, const float *w, const float *bias, float *y) {
    int c = 0;
    for (; c + 2 <= g->ow; c += 2) LN(conv_pool_tile)(oc, 4, g, x + 2 * c * LW, w, bias, y + c * LW);
    if (c == g->ow) return;
    if (oc == 4 && g->kw == 5 && g->kh > 1) LN(conv_pool_square)(oc, g, x + 2 * c * LW, w, bias, y + c * LW);
    else LN(conv_pool_tile)(oc, 2, g, x + 2 * c * LW, w, bias, y + c * LW);
}
#else
INLINE void LN(conv_pool_row)(int oc, const conv_args *g, const float *x, const float *w, const float *bias, float *y) {
    for (int c = 0; c < g->ow; c++) LN(conv_pool_square)(oc, g, x + 2 * c * LW, w, bias, y + c * LW);
}
#endif

/* Convolution, stride 1. w is packed (conv_pack). Rows of x above the first and below the last count as zeros
 * (g->clip of them); columns must really be there. With g->pool2: outputs are pooled 2×2, and clip is 0. */
static void LN(conv)(const conv_args *g, const float *x, const float *w, const float *bias, float *y) {
    int done = 0;
    while (done < g->oc) {
        int left = g->oc - done, tiles = (left + LANE_TILE - 1) / LANE_TILE, oc = (left + tiles - 1) / tiles;
        const float *b = bias ? bias + done : bias;
        for (int r = 0; r < g->oh; r++) {
            int ky0 = g->clip - r > 0 ? g->clip - r : 0, ky1 = g->x_rows + g->clip - r < g->kh ? g->x_rows + g->clip - r : g->kh;
            const float *xr = x + (ptrdiff_t)(g->pool2 ? 2 * r : r - g->clip) * g->x_pitch * LW;
            float *yr = y + (done * g->y_plane + (ptrdiff_t)r * g->ow) * LW;
#define CHANNELS(n)                                                              \
    case n:                                                                      \
        if (g->pool2) LN(conv_pool_row)(n, g, xr, w, b, yr);                     \
        else LN(conv_row)(n, g, xr, w, ky0, ky1, b, yr);                         \
        break;
            switch (oc) {
#if LANE_TILE == 6
                CHANNELS(6)
                CHANNELS(5)
#endif
#if LANE_TILE >= 4
                CHANNELS(4)
#endif
                CHANNELS(3)
                CHANNELS(2)
                CHANNELS(1)
            }
#undef CHANNELS
        }
        w += (ptrdiff_t)oc * g->ic * g->kh * g->kw;
        done += oc;
    }
}

/* gw[o][i][ky][kx…] += Σ over positions and lanes of gz[o] · x[i], for oc channels and kc columns of the kernel. */
INLINE void LN(conv_gw_tile)(int oc, int kc, const conv_args *g, const float *x, const float *gz, ptrdiff_t gz_pitch,
                             ptrdiff_t gz_plane, float *gw, ptrdiff_t gw_plane) {
    LV acc[LANE_OUT][5];
    UNROLL for (int o = 0; o < oc; o++) UNROLL for (int k = 0; k < kc; k++) acc[o][k] = LN(set)(0);
    for (int r = 0; r < g->oh; r++) {
        const float *xr = x + r * g->x_pitch * LW, *gr = gz + r * gz_pitch * LW;
        for (int c = 0; c < g->ow; c++, xr += LW, gr += LW) {
            LV v[5];
            UNROLL for (int k = 0; k < kc; k++) v[k] = LN(load)(xr + k * LW);
            UNROLL for (int o = 0; o < oc; o++) {
                LV s = LN(load)(gr + o * gz_plane * LW);
                UNROLL for (int k = 0; k < kc; k++) acc[o][k] += s * v[k];
            }
        }
    }
    UNROLL for (int o = 0; o < oc; o++) UNROLL for (int k = 0; k < kc; k++) gw[o * gw_plane + k] += LN(sum)(acc[o][k]);
}

static void LN(conv_gw)(const conv_args *g, const float *x, const float *gz, ptrdiff_t gz_pitch, ptrdiff_t gz_plane,
                        float *gw) {
    ptrdiff_t gw_plane = (ptrdiff_t)g->ic * g->kh * g->kw;
    for (int o = 0; o < g->oc;) {
        int left = g->oc - o, tiles = (left + LANE_GW - 1) / LANE_GW, oc = (left + tiles - 1) / tiles;
        for (int i = 0; i < g->ic; i++)
            for (int ky = 0; ky < g->kh; ky++)
                for (int kx = 0; kx < g->kw;) {
                    int kleft = g->kw - kx, ktiles = (kleft + 4) / 5, kc = (kleft + ktiles - 1) / ktiles;
                    const float *xi = x + (i * g->x_plane + ky * g->x_pitch + kx) * LW;
                    const float *go = gz + o * gz_plane * LW;
                    float *w = gw + o * gw_plane + ((ptrdiff_t)i * g->kh + ky) * g->kw + kx;
#define TILE(n, m) case 8 * n + m: LN(conv_gw_tile)(n, m, g, xi, go, gz_pitch, gz_plane, w, gw_plane); break;
#define TILES(n) TILE(n, 5) TILE(n, 4) TILE(n, 3) TILE(n, 2) TILE(n, 1)
                    switch (8 * oc + kc) {
#if LANE_GW == 4
                        TILES(4)
                        TILES(3)
#endif
                        TILES(2)
                        TILES(1)
                    }
#undef TILES
#undef TILE
                    kx += kc;
                }
        o += oc;
    }
}

/* y[m][LW] += Σ_r h[r][LW] · b[r][m] for four ranks: a layer adapter's output, on lanes. */
static void LN(expand)(int R, const float *h, ptrdiff_t ldh, const float *b, ptrdiff_t ldb, int M, float *y) {
    for (int r = 0; r < R; r += 4) {
        LV v[4];
        UNROLL for (int j = 0; j < 4; j++) v[j] = LN(load)(h + (r + j) * ldh);
        for (int m = 0; m < M; m++) {
            LV acc = LN(load)(y + m * LW);
            UNROLL for (int j = 0; j < 4; j++) acc += v[j] * LN(set)(b[(r + j) * ldb + m]);
            LN(store)(y + m * LW, acc);
        }
    }
}

/* q = pooled (and rectified) z. */
static void LN(pool)(const float *z, int c, int h, int w, int pool, int relu, float *q) {
    int qh = h / pool, qw = w / pool;
    for (int i = 0; i < c; i++, z += (ptrdiff_t)h * w * LW)
        for (int r = 0; r < qh; r++)
            for (int s = 0; s < qw; s++, q += LW) {
                const float *p = z + ((ptrdiff_t)r * pool * w + s * pool) * LW;
                LV m = LN(load)(p);
                for (int a = 0; a < pool; a++)
                    for (int b = 0; b < pool; b++) m = LN(max)(m, LN(load)(p + (a * w + b) * LW));
                LN(store)(q, relu ? LN(max)(LN(set)(0), m) : m);
            }
}

/* gz = gradient of z from that of q: to the first maximum of each window, and only where ReLU lets it through.
 * Rows of gz are w + 2*pad wide; the border and what pooling left over are zero. */
static void LN(pool_back)(const float *z, const float *gq, int c, int h, int w, int pool, int relu, int pad, float *gz) {
    int qh = h / pool, qw = w / pool;
    ptrdiff_t row = (ptrdiff_t)(w + 2 * pad) * LW;
    int covered = !pad && qh * pool == h && qw * pool == w; /* every cell is written below */
    if (!covered) memset(gz, 0, (size_t)(c * h * row) * sizeof *gz);
    for (int i = 0; i < c; i++, z += (ptrdiff_t)h * w * LW, gz += h * row)
        for (int r = 0; r < qh; r++)
            for (int s = 0; s < qw; s++, gq += LW) {
                const float *p = z + ((ptrdiff_t)r * pool * w + s * pool) * LW;
                float *o = gz + r * pool * row + (pad + s * pool) * LW;
                LV m = LN(load)(p), g = LN(load)(gq);
                for (int a = 0; a < pool; a++)
                    for (int b = 0; b < pool; b++) m = LN(max)(m, LN(load)(p + (a * w + b) * LW));
                if (relu) g = LN(where)(m > LN(set)(0), g);
                for (int a = 0; a < pool; a++)
                    for (int b = 0; b < pool; b++) {
                        LI hit = LN(load)(p + (a * w + b) * LW) == m;
                        LV here = LN(where)(hit, g);
                        LN(store)(o + a * row + b * LW, here);
                        g -= here; /* exact: here is g or 0 in every lane */
                    }
            }
}
#undef LANE_OUT
