/* The frozen network: records of samples. Convolutions run on panels, fc layers on the rows of the records themselves. */
#ifndef IFT_FROZEN_H
#define IFT_FROZEN_H

#include "linalg.h"
#include "panels.h"

static void fold(const ift_plan *p, const float *params, float *frozen) {
    memcpy(frozen, params, (size_t)p->params * sizeof *frozen);
    for (int k = 0; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        if (!y->d.batch_norm) continue;
        float *w = frozen + y->t[IFT_ROLE_W].offset, *b = frozen + y->t[IFT_ROLE_BIAS].offset;
        const float *gamma = params + y->t[IFT_ROLE_GAMMA].offset, *beta = params + y->t[IFT_ROLE_BETA].offset;
        const float *mean = params + y->t[IFT_ROLE_MEAN].offset, *var = params + y->t[IFT_ROLE_VAR].offset;
        const ift_tensor *t = &y->t[IFT_ROLE_W];
        for (int o = 0; o < y->d.out; o++) {
            float scale = gamma[o] / sqrtf(var[o] + 1e-5f);
            b[o] = (b[o] - mean[o]) * scale + beta[o];
            if (y->d.kind == IFT_CONV)
                for (int i = 0; i < t->cols; i++) w[(ptrdiff_t)o * t->pitch + i] *= scale;
            else
                for (int i = 0; i < t->rows; i++) w[(ptrdiff_t)i * t->pitch + o] *= scale;
        }
    }
}

/* Regroup every convolution's weights once for a run of panels. */
static void pack_frozen(const ift_plan *p, const float *frozen, float *ws) {
    float *packed = ws + p->ws_pack;
    for (int k = 0; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        if (y->d.kind != IFT_CONV) continue;
        int taps = y->ic * y->d.kh * y->d.kw;
        conv_pack(frozen + y->t[IFT_ROLE_W].offset, y->d.out, taps, packed);
        packed += ift_pad((int64_t)y->d.out * taps);
    }
}

/* rows (n, Mp) = x (n, N)·W + b of fc layer y, rectified where asked for; rows of x are ldx apart, of y `width`. */
#ifndef FROZEN_FC /* an embedded build may keep its weights in another form */
#define FROZEN_FC(p, y, frozen, n, x, ldx, rows, width, ws)                                                              \
    gemm(n, (y)->Mp, (y)->N, x, ldx, 1, (frozen) + (y)->t[IFT_ROLE_W].offset, (y)->Mp, rows, width, FROM_BIAS,            \
         (frozen) + (y)->t[IFT_ROLE_BIAS].offset, (y)->d.relu)
#define FROZEN_CONV(p, y, packed, at, ws) ((packed) + (at)) /* regrouped weights of conv layer y */
#endif

/* The conv layers' part of the records of one panel: n <= lanes samples at x[0…n), with packed weights one layer after the
 * other. */
INLINE void frozen_convs(const ift_plan *p, const float *frozen, const float *packed, const float *const *x, int n, int lw,
                         float *rows, float *ws) {
    (void)lw;
    float *a = ws + p->ws_lanes_a, *b = ws + p->ws_lanes_b;
    int64_t width = p->row_width, packed_at = 0;
    int k = 0;
    if (IFT_CONVS && p->layer[0].d.kind == IFT_CONV) {
        LANES(lw, from_rows, x, 0, n, p->layer[0].N, a);
        for (; k < p->L && p->layer[k].d.kind == IFT_CONV; k++) {
            const ift_layer *y = &p->layer[k];
            const float *bias = frozen + y->t[IFT_ROLE_BIAS].offset;
            if (y->d.ph || y->d.pw) {
                LANES(lw, pad_map, a, y->ic, y->ih, y->iw, y->d.ph, y->d.pw, b);
                float *t = a;
                a = b, b = t;
            }
            conv_args g = conv_shape(y);
            const float *w = FROZEN_CONV(p, y, packed, packed_at, ws);
            if (y->d.pool == 2) {
                g.pool2 = 1, g.relu = y->d.relu, g.oh = y->qh, g.ow = y->qw, g.y_plane = (ptrdiff_t)y->qh * y->qw;
                LANES(lw, conv, &g, a, w, bias, b);
                float *t = a;
                a = b, b = t;
            } else {
                LANES(lw, conv, &g, a, w, bias, b);
                LANES(lw, pool, b, y->d.out, y->oh, y->ow, y->d.pool, y->d.relu, a);
            }
            packed_at += ift_pad((int64_t)y->d.out * y->ic * y->d.kh * y->d.kw);
            int64_t at = k + 1 < p->L ? p->layer[k + 1].tap : p->output_at;
            LANES(lw, to_rows, a, n, y->n_out, rows + at, width);
        }
    }
}

/* The fc layers' part of the records of n samples, on the rows themselves. */
INLINE void frozen_dense(const ift_plan *p, const float *frozen, const float *const *x, int n, float *rows, float *ws) {
    (void)ws;
    int64_t width = p->row_width;
    int k = 0;
    while (k < p->L && p->layer[k].d.kind == IFT_CONV) k++;
    for (; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        int64_t at = k + 1 < p->L ? p->layer[k + 1].tap : p->output_at;
        if (k > 0) FROZEN_FC(p, y, frozen, n, rows + y->tap, width, rows + at, width, ws);
        else
            for (int s = 0; s < n;) { /* samples that lie evenly apart go through together */
                ptrdiff_t step = n - s > 1 ? x[s + 1] - x[s] : 0;
                int run = 1;
                while (s + run < n && x[s + run] - x[s + run - 1] == step) run++;
                FROZEN_FC(p, y, frozen, run, x[s], step, rows + s * width + at, width, ws);
                s += run;
            }
    }
}

/* The gaps between the segments of n rows: zero, so that padded sums see nothing. */
static void clear_gaps(const ift_plan *p, int64_t n, float *rows) {
    for (int64_t i = 0; i < n; i++, rows += p->row_width) {
        for (int k = 1; k < p->L; k++) {
            const ift_layer *y = &p->layer[k];
            for (int j = y->N; j < y->Np; j++) rows[y->tap + j] = 0;
        }
        for (int j = p->C; j < p->Cp; j++) rows[p->output_at + j] = 0;
    }
}

/* Records of n samples into rows; pack_frozen has been called. */
static void frozen_rows(const ift_plan *p, const float *frozen, const float *const *x, int n, float *rows, float *ws) {
    clear_gaps(p, n, rows);
    for (int s = 0; s < n;) {
        int lw = panel_lanes(n - s);
        if (p->layer[0].d.kind == IFT_FC) lw = IFT_CHUNK; /* rows only: no lanes to fill */
        int m = n - s < lw ? n - s : lw;
        frozen_convs(p, frozen, ws + p->ws_pack, x + s, m, lw, rows + s * p->row_width, ws);
        frozen_dense(p, frozen, x + s, m, rows + s * p->row_width, ws);
        s += m;
    }
}

static void records(const ift_plan *p, const float *frozen, const float *x, int64_t x_pitch, int64_t n, float *rows,
                    float *ws) {
    pack_frozen(p, frozen, ws);
    const float *at[IFT_CHUNK];
    for (int64_t i = 0; i < n; i += IFT_CHUNK) {
        int m = n - i < IFT_CHUNK ? (int)(n - i) : IFT_CHUNK;
        for (int s = 0; s < m; s++) at[s] = x + (i + s) * x_pitch;
        frozen_rows(p, frozen, at, m, rows + i * p->row_width, ws);
    }
}

#endif
