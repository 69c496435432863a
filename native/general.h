/* The general step: methods whose gradients run through layers (FT-*, LoRA-All, FT-All-LoRA).
 *
 * Layers p->first … L-1 go forward, the loss, then backward; a bit of ift_train that is not set is not computed.
 * fc layers work on rows, conv layers on lanes, panel after panel; the two meet at flatten. Gradients are kept, then
 * one SGD update goes over what is trained.
 */
#ifndef IFT_GENERAL_H
#define IFT_GENERAL_H

#include "linalg.h"
#include "loss.h"
#include "panels.h"

static void turn(const float *w, int N, int M, int Mp, float *wt, int Np) {
    int n = 0;
#if IFT_VL > 1
    for (; n + IFT_VL <= N; n += IFT_VL)
        for (int m = 0; m < M; m += IFT_VL) {
            vf v[IFT_VL];
            UNROLL for (int i = 0; i < IFT_VL; i++) v[i] = vload(w + (ptrdiff_t)(n + i) * Mp + m);
#if IFT_VL == 4
            transpose_4(v);
#else
            transpose_w(v);
#endif
            for (int i = 0; i < IFT_VL && m + i < M; i++) vstore(wt + (ptrdiff_t)(m + i) * Np + n, v[i]);
        }
#endif
    for (; n < Np; n++)
        for (int m = 0; m < M; m++) wt[(ptrdiff_t)m * Np + n] = n < N ? w[(ptrdiff_t)n * Mp + m] : 0;
}

static float *turned_conv(const ift_layer *y, float *ws) {
    return ws + y->wt + ift_pad((int64_t)y->d.out * y->ic * y->d.kh * y->d.kw);
}

/* Second copies of the weights, in the order the kernels read them. all: also those that are not trained. */
static void prepare(const ift_plan *p, const float *params, int all, float *ws) {
    for (int k = p->first; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        if (!all && !(y->d.train & IFT_W)) continue;
        const float *w = params + y->t[IFT_ROLE_W].offset;
        int gx = y->d.train & IFT_X;
        if (y->d.kind == IFT_FC) {
            if (gx) turn(w, y->N, y->M, y->Mp, ws + y->wt, y->Np);
            continue;
        }
        conv_pack(w, y->d.out, y->ic * y->d.kh * y->d.kw, ws + y->wt);
        if (gx) conv_pack_turned(w, y->d.out, y->ic, y->d.kh, y->d.kw, turned_conv(y, ws));
    }
}

static const float **row_pointers(const ift_plan *p, const float *rows, int64_t pitch, int S, float *ws) {
    const float **at = (const float **)(void *)(ws + p->ws_pointers);
    for (int s = 0; s < S; s++) at[s] = rows + s * pitch;
    return at;
}

/* h (Rp, batch_p) = A · rowsᵀ, zero past S */
static void project(const ift_plan *p, int S, const float *rows, int64_t pitch, const float *a, int n, float *h,
                    float *ws) {
    dot(S, row_pointers(p, rows, pitch, S, ws), 0, p->Rp, a, n, n, 0, h, p->batch_p);
    for (int r = 0; r < p->Rp; r++)
        for (int s = S; s < p->batch_p; s++) h[(ptrdiff_t)r * p->batch_p + s] = 0;
}

/* ---- Batch norm: over rows for fc layers, over positions and lanes for conv layers ---- */

/* The running statistics follow the batch's; only once its loss is known to be finite. */
static void bn_running(const ift_layer *y, float *params, int S, const float *bn) {
    const float *mean = bn + 3 * ift_pad(y->d.out), *var = bn + 4 * ift_pad(y->d.out);
    int64_t n = (int64_t)S * y->oh * y->ow;
    float *rm = params + y->t[IFT_ROLE_MEAN].offset, *rv = params + y->t[IFT_ROLE_VAR].offset;
    float unbiased = n > 1 ? (float)n / (float)(n - 1) : 1.0f;
    for (int o = 0; o < y->d.out; o++) {
        rm[o] += 0.1f * (mean[o] - rm[o]);
        rv[o] += 0.1f * (var[o] * unbiased - rv[o]);
    }
}

/* bn: scale, shift (y = xhat-or-z·scale + shift), 1/std, mean, variance; out padded apart */
static void bn_coefficients(const ift_layer *y, const float *params, float *bn, int batch_stats) {
    int op = (int)ift_pad(y->d.out);
    const float *gamma = params + y->t[IFT_ROLE_GAMMA].offset, *beta = params + y->t[IFT_ROLE_BETA].offset;
    const float *rm = params + y->t[IFT_ROLE_MEAN].offset, *rv = params + y->t[IFT_ROLE_VAR].offset;
    float *scale = bn, *shift = bn + op, *inv = bn + 2 * op, *mean = bn + 3 * op;
    for (int o = 0; o < y->d.out; o++) {
        if (batch_stats) {
            scale[o] = gamma[o], shift[o] = beta[o];
            continue;
        }
        inv[o] = 1.0f / sqrtf(rv[o] + 1e-5f), mean[o] = rm[o];
        scale[o] = gamma[o] * inv[o];
        shift[o] = beta[o] - mean[o] * scale[o];
    }
    for (int o = y->d.out; o < op; o++) scale[o] = shift[o] = inv[o] = mean[o] = 0;
}

/* train: by the statistics of the batch where the plan says so; else by the running ones */
static void bn_rows(const ift_layer *y, const float *params, int S, int train, float *ws, float *out) {
    float *z = ws + y->z_rows, *xhat = ws + y->xhat, *bn = ws + y->bn;
    int Mp = y->Mp, stats = train && (y->d.train & IFT_BATCH_STATS);
    if (stats) {
        float *inv = bn + 2 * Mp, *mean = bn + 3 * Mp, *var = bn + 4 * Mp;
        for (int m = 0; m < Mp; m += IFT_VL) {
            vf sum = vset(0), square = vset(0), n = vset(1.0f / (float)S);
            for (int s = 0; s < S; s++) sum += vload(z + (ptrdiff_t)s * Mp + m);
            sum *= n;
            for (int s = 0; s < S; s++) {
                vf d = vload(z + (ptrdiff_t)s * Mp + m) - sum;
                square += d * d;
            }
            square *= n;
            vstore(mean + m, sum), vstore(var + m, square);
            for (int j = m; j < m + IFT_VL; j++) inv[j] = 1.0f / sqrtf(var[j] + 1e-5f);
            vf i = vload(inv + m);
            for (int s = 0; s < S; s++)
                vstore(xhat + (ptrdiff_t)s * Mp + m, (vload(z + (ptrdiff_t)s * Mp + m) - sum) * i);
        }
    }
    bn_coefficients(y, params, bn, stats);
    const float *from = stats ? xhat : z;
    for (int s = 0; s < S; s++)
        for (int m = 0; m < Mp; m += IFT_VL) {
            vf v = vload(from + (ptrdiff_t)s * Mp + m) * vload(bn + m) + vload(bn + Mp + m);
            vstore(out + (ptrdiff_t)s * Mp + m, y->d.relu ? vmax(vset(0), v) : v);
        }
}

static void bn_rows_back(const ift_layer *y, const float *params, float *grads, int S, float *ws) {
    float *g = ws + y->g_rows, *xhat = ws + y->xhat, *bn = ws + y->bn;
    const float *z = ws + y->z_rows;
    int Mp = y->Mp, stats = y->d.train & IFT_BATCH_STATS;
    const float *gamma = params + y->t[IFT_ROLE_GAMMA].offset;
    float *ggamma = grads + y->t[IFT_ROLE_GAMMA].offset, *gbeta = grads + y->t[IFT_ROLE_BETA].offset;
    const float *inv = bn + 2 * Mp, *mean = bn + 3 * Mp;
    for (int m = 0; m < Mp; m += IFT_VL) {
        vf sum = vset(0), dot_ = vset(0);
        for (int s = 0; s < S; s++) {
            vf gs = vload(g + (ptrdiff_t)s * Mp + m);
            vf h = stats ? vload(xhat + (ptrdiff_t)s * Mp + m)
                         : (vload(z + (ptrdiff_t)s * Mp + m) - vload(mean + m)) * vload(inv + m);
            sum += gs;
            dot_ += gs * h;
        }
        vstore(gbeta + m, sum), vstore(ggamma + m, dot_);
        vf scale = vload(gamma + m) * vload(inv + m), n = vset(1.0f / (float)S);
        for (int s = 0; s < S; s++) {
            float *p = g + (ptrdiff_t)s * Mp + m;
            vf gs = vload(p);
            if (stats) gs -= (sum + vload(xhat + (ptrdiff_t)s * Mp + m) * dot_) * n;
            vstore(p, gs * scale);
        }
    }
}

/* A channel of a map on lanes: call body for every panel's (z, lanes in use, lanes). */
#define EACH_PANEL(S) for (int s0 = 0, lw = panel_lanes(S); s0 < (S); s0 += lw, lw = panel_lanes((S) - s0))

static void bn_maps(const ift_layer *y, const float *params, int S, int train, float *ws) {
    float *bn = ws + y->bn;
    int op = (int)ift_pad(y->d.out), stats = train && (y->d.train & IFT_BATCH_STATS), area = y->oh * y->ow;
    if (stats) {
        float *inv = bn + 2 * op, *mean = bn + 3 * op, *var = bn + 4 * op;
        for (int o = 0; o < y->d.out; o++) {
            double sum = 0, square = 0, n = (double)area * S;
            EACH_PANEL(S) {
                const float *z = ws + y->z_lanes + (int64_t)y->M * s0 + (int64_t)o * area * lw;
                int used = S - s0 < lw ? S - s0 : lw;
                for (int i = 0; i < area; i++)
                    for (int l = 0; l < used; l++) sum += z[i * lw + l];
            }
            double mu = sum / n;
            EACH_PANEL(S) {
                const float *z = ws + y->z_lanes + (int64_t)y->M * s0 + (int64_t)o * area * lw;
                int used = S - s0 < lw ? S - s0 : lw;
                for (int i = 0; i < area; i++)
                    for (int l = 0; l < used; l++) square += (z[i * lw + l] - mu) * (z[i * lw + l] - mu);
            }
            mean[o] = (float)mu, var[o] = (float)(square / n);
            inv[o] = 1.0f / sqrtf(var[o] + 1e-5f);
        }
    }
    const float *inv = bn + 2 * op, *mean = bn + 3 * op;
    bn_coefficients(y, params, bn, stats);
    EACH_PANEL(S) for (int o = 0; o < y->d.out; o++) {
        int64_t at = (int64_t)y->M * s0 + (int64_t)o * area * lw;
        float *z = ws + y->z_lanes + at, *xhat = ws + y->xhat + at;
        for (int i = 0; i < area * lw; i++) {
            float h = (z[i] - mean[o]) * inv[o];
            xhat[i] = h;
            z[i] = stats ? h * bn[o] + bn[op + o] : z[i] * bn[o] + bn[op + o];
        }
    }
}

static void bn_maps_back(const ift_layer *y, const float *params, float *grads, int S, float *ws) {
    const float *bn = ws + y->bn, *gamma = params + y->t[IFT_ROLE_GAMMA].offset;
    float *ggamma = grads + y->t[IFT_ROLE_GAMMA].offset, *gbeta = grads + y->t[IFT_ROLE_BETA].offset;
    int op = (int)ift_pad(y->d.out), stats = y->d.train & IFT_BATCH_STATS;
    int64_t pitch = y->ow + 2 * y->gx_pad;
    for (int o = 0; o < y->d.out; o++) {
        double sum = 0, product = 0;
        for (int pass = 0; pass < 2; pass++) {
            float mean_g = (float)(sum / ((double)y->oh * y->ow * S));
            float mean_gh = (float)(product / ((double)y->oh * y->ow * S));
            float scale = gamma[o] * bn[2 * op + o];
            EACH_PANEL(S) {
                int used = S - s0 < lw ? S - s0 : lw;
                const float *xhat = ws + y->xhat + (int64_t)y->M * s0 + (int64_t)o * y->oh * y->ow * lw;
                float *g = ws + y->gz_lanes + ((int64_t)y->d.out * s0 + (int64_t)o * lw) * y->oh * pitch;
                for (int r = 0; r < y->oh; r++, xhat += y->ow * lw) {
                    float *gr = g + (r * pitch + y->gx_pad) * lw;
                    for (int c = 0; c < y->ow; c++)
                        for (int l = 0; l < used; l++) {
                            float *v = gr + c * lw + l, h = xhat[c * lw + l];
                            if (pass == 0) sum += *v, product += (double)*v * h;
                            else *v = (*v - (stats ? mean_g + h * mean_gh : 0)) * scale;
                        }
                }
            }
        }
        gbeta[o] = (float)sum, ggamma[o] = (float)product;
    }
}

/* ---- Forward ---------------------------------------------------------------------------------------------------- */

/* A conv layer's input on lanes, with its border: where panel s0 of it lies. */
static float *conv_input(const ift_plan *p, int k, int s0, float *ws) {
    const ift_layer *y = &p->layer[k];
    if (k > p->first && !y->d.ph && !y->d.pw) return ws + p->layer[k - 1].q_lanes + (int64_t)y->N * s0;
    return ws + y->x_lanes + (int64_t)y->ic * (y->ih + 2 * y->d.ph) * (y->iw + 2 * y->d.pw) * s0;
}

static void conv_forward(const ift_plan *p, const float *params, int k, int S, const float *const *x, int train,
                         float *ws) {
    const ift_layer *y = &p->layer[k];
    int adapter = y->d.train & IFT_LAYER_ADAPTER, from_rows = k == p->first;
    if (adapter) {
        float *rows = ws + y->x_rows;
        for (int s = 0; s < S && from_rows; s++) {
            memcpy(rows + (int64_t)s * y->Np, x[s], (size_t)y->N * sizeof *rows);
            for (int j = y->N; j < y->Np; j++) rows[(int64_t)s * y->Np + j] = 0;
        }
        if (!from_rows) {
            const ift_layer *below = &p->layer[k - 1];
            EACH_PANEL(S) {
                int n = S - s0 < lw ? S - s0 : lw;
                float *to = rows + (int64_t)s0 * y->Np;
                LANES(lw, to_rows, ws + below->q_lanes + (int64_t)y->N * s0, n, y->N, to, y->Np);
                for (int s = 0; s < n; s++)
                    for (int j = y->N; j < y->Np; j++) to[(int64_t)s * y->Np + j] = 0;
            }
        }
        project(p, S, rows, y->Np, params + y->t[IFT_ROLE_LAYER_A].offset, y->Np, ws + y->h, ws);
    }
    conv_args g = conv_shape(y);
    EACH_PANEL(S) {
        int n = S - s0 < lw ? S - s0 : lw;
        float *in = conv_input(p, k, s0, ws), *z = ws + y->z_lanes + (int64_t)y->M * s0;
        int bordered = y->d.ph || y->d.pw;
        float *compact = from_rows ? (bordered ? ws + p->ws_lanes_a : in)
                                   : ws + p->layer[k - 1].q_lanes + (int64_t)y->N * s0;
        if (from_rows) LANES(lw, from_rows, x + s0, 0, n, y->N, compact);
        if (bordered) LANES(lw, pad_map, compact, y->ic, y->ih, y->iw, y->d.ph, y->d.pw, in);
        LANES(lw, conv, &g, in, ws + y->wt, params + y->t[IFT_ROLE_BIAS].offset, z);
        if (adapter)
            LANES(lw, expand, p->Rp, ws + y->h + s0, p->batch_p, params + y->t[IFT_ROLE_LAYER_B].offset, y->Mp, y->M, z);
    }
    if (y->d.batch_norm) bn_maps(y, params, S, train, ws);
    int to_fc = k + 1 < p->L && p->layer[k + 1].d.kind == IFT_FC;
    EACH_PANEL(S) {
        float *q = ws + y->q_lanes + (int64_t)y->n_out * s0;
        LANES(lw, pool, ws + y->z_lanes + (int64_t)y->M * s0, y->d.out, y->oh, y->ow, y->d.pool, y->d.relu, q);
        if (!to_fc) continue;
        const ift_layer *above = &p->layer[k + 1];
        int n = S - s0 < lw ? S - s0 : lw;
        float *rows = ws + above->x_rows + (int64_t)s0 * above->Np;
        LANES(lw, to_rows, q, n, y->n_out, rows, above->Np);
        for (int s = 0; s < n; s++)
            for (int j = above->N; j < above->Np; j++) rows[(int64_t)s * above->Np + j] = 0;
    }
}

/* y = gain·c + …: the gain is the frozen output's alone, not the adapters'. */
static void scale_rows(float gain, int S, int Mp, float *z) {
    if (gain == 1.0f) return;
    for (ptrdiff_t i = 0; i < (ptrdiff_t)S * Mp; i++) z[i] *= gain;
}

static void fc_forward(const ift_plan *p, const float *params, int k, int S, int train, float *ws) {
    const ift_layer *y = &p->layer[k];
    int adapter = y->d.train & IFT_LAYER_ADAPTER;
    const float *rows = ws + y->x_rows, *w = params + y->t[IFT_ROLE_W].offset;
    const float *bias = params + y->t[IFT_ROLE_BIAS].offset;
    float *z = ws + y->z_rows, *out = k + 1 < p->L ? ws + p->layer[k + 1].x_rows : z;
    if (!y->d.batch_norm) z = out;
    gemm(S, y->Mp, y->N, rows, y->Np, 1, w, y->Mp, z, y->Mp, FROM_BIAS, bias,
         y->d.relu && !adapter && !y->d.batch_norm);
    if (k + 1 == p->L) scale_rows(params[p->gain], S, y->Mp, z);
    if (adapter) {
        project(p, S, rows, y->Np, params + y->t[IFT_ROLE_LAYER_A].offset, y->Np, ws + y->h, ws);
        gemm(S, y->Mp, p->Rp, ws + y->h, 1, p->batch_p, params + y->t[IFT_ROLE_LAYER_B].offset, y->Mp, z, y->Mp, FROM_C,
             NULL, y->d.relu && !y->d.batch_norm);
    }
    if (y->d.batch_norm) bn_rows(y, params, S, train, ws, out);
}

/* From layer p->first on; its input is x (layer 0) or the records' tap. Logits end in z_rows of the last layer. */
static void general_forward(const ift_plan *p, const float *params, int S, const float *const *x,
                            const float *const *rec, int train, float *ws) {
    const ift_layer *first = &p->layer[p->first];
    if (first->d.kind == IFT_FC) {
        float *rows = ws + first->x_rows;
        for (int s = 0; s < S; s++, rows += first->Np) {
            const float *from = p->first ? rec[s] + first->tap : x[s];
            memcpy(rows, from, (size_t)first->N * sizeof *rows);
            for (int j = first->N; j < first->Np; j++) rows[j] = 0;
        }
    }
    for (int k = p->first; k < p->L; k++) {
        if (p->layer[k].d.kind == IFT_FC) fc_forward(p, params, k, S, train, ws);
        else conv_forward(p, params, k, S, x, train, ws);
    }
}

/* ---- Backward --------------------------------------------------------------------------------------------------- */

/* Gradients of a layer adapter from the rows x_rows and g_rows: gB = hᵀ·g, gh = g·Bᵀ, gA = xᵀ·gh (eqs. 10-12). */
static void adapter_back(const ift_plan *p, const ift_layer *y, const float *params, float *grads, int S, float *ws) {
    const float *g = ws + y->g_rows, *b = params + y->t[IFT_ROLE_LAYER_B].offset;
    gemm(p->Rp, y->Mp, S, ws + y->h, p->batch_p, 1, g, y->Mp, grads + y->t[IFT_ROLE_LAYER_B].offset, y->Mp, FROM_ZERO,
         NULL, 0);
    project(p, S, g, y->Mp, b, y->Mp, ws + y->gh, ws);
    gemm(p->Rp, y->Np, S, ws + y->gh, p->batch_p, 1, ws + y->x_rows, y->Np, grads + y->t[IFT_ROLE_LAYER_A].offset, y->Np,
         FROM_ZERO, NULL, 0);
}

static void column_sums(const float *g, int S, int Mp, float *sum) {
    for (int m = 0; m < Mp; m += IFT_VL) {
        vf acc = vset(0);
        for (int s = 0; s < S; s++) acc += vload(g + (ptrdiff_t)s * Mp + m);
        vstore(sum + m, acc);
    }
}

static void fc_back(const ift_plan *p, const float *params, float *grads, int k, int S, float *ws) {
    const ift_layer *y = &p->layer[k];
    int bits = y->d.train;
    float *g = ws + y->g_rows;
    const float *rows = ws + y->x_rows;
    if (y->d.relu) { /* k is not the last layer */
        const float *out = ws + p->layer[k + 1].x_rows;
        for (ptrdiff_t i = 0; i < (ptrdiff_t)S * y->Mp; i++) g[i] = out[i] > 0 ? g[i] : 0;
    }
    if (y->d.batch_norm) bn_rows_back(y, params, grads, S, ws);
    if (bits & IFT_LAYER_ADAPTER) adapter_back(p, y, params, grads, S, ws);
    if (k + 1 == p->L) scale_rows(params[p->gain], S, y->Mp, g);
    if (bits & IFT_B) column_sums(g, S, y->Mp, grads + y->t[IFT_ROLE_BIAS].offset);
    if (bits & IFT_W)
        gemm(y->N, y->Mp, S, rows, 1, y->Np, g, y->Mp, grads + y->t[IFT_ROLE_W].offset, y->Mp, FROM_ZERO, NULL, 0);
    if (!(bits & IFT_X)) return;
    /* gx in rows: the gradient of the layer below, or, below a flatten, on its way to lanes */
    const ift_layer *below = &p->layer[k - 1];
    int flatten = below->d.kind == IFT_CONV;
    float *gx = ws + (flatten ? p->ws_decoded : below->g_rows);
    gemm(S, y->Np, y->M, g, y->Mp, 1, ws + y->wt, y->Np, gx, y->Np, FROM_ZERO, NULL, 0);
    if (bits & IFT_LAYER_ADAPTER)
        gemm(S, y->Np, p->Rp, ws + y->gh, 1, p->batch_p, params + y->t[IFT_ROLE_LAYER_A].offset, y->Np, gx, y->Np, FROM_C,
             NULL, 0);
    if (!flatten) return;
    EACH_PANEL(S) {
        int n = S - s0 < lw ? S - s0 : lw;
        const float **at = row_pointers(p, gx + (int64_t)s0 * y->Np, y->Np, n, ws);
        LANES(lw, from_rows, at, 0, n, y->N, ws + below->gq_lanes + (int64_t)y->N * s0);
    }
}

/* Σ of a conv's gradient over positions and lanes. */
static void conv_bias_back(const ift_layer *y, float *grads, int S, const float *ws) {
    float *gb = grads + y->t[IFT_ROLE_BIAS].offset;
    int64_t pitch = y->ow + 2 * y->gx_pad; /* the border is zero and may be summed along */
    for (int o = 0; o < y->d.out; o++) gb[o] = 0;
    EACH_PANEL(S) {
        const float *g = ws + y->gz_lanes + (int64_t)y->d.out * y->oh * pitch * s0;
        int64_t n = y->oh * pitch * lw;
        for (int o = 0; o < y->d.out; o++, g += n) {
            float part[IFT_PAD] = {0};
            int64_t i = 0;
            for (; i + IFT_PAD <= n; i += IFT_PAD)
                for (int l = 0; l < IFT_PAD; l++) part[l] += g[i + l];
            for (; i < n; i++) part[i % IFT_PAD] += g[i];
            float sum = 0;
            for (int l = 0; l < IFT_PAD; l++) sum += part[l];
            gb[o] += sum;
        }
    }
}

static void conv_back(const ift_plan *p, const float *params, float *grads, int k, int S, float *ws) {
    const ift_layer *y = &p->layer[k];
    int bits = y->d.train;
    int64_t pitch = y->ow + 2 * y->gx_pad, plane = y->oh * pitch;
    EACH_PANEL(S)
        LANES(lw, pool_back, ws + y->z_lanes + (int64_t)y->M * s0, ws + y->gq_lanes + (int64_t)y->n_out * s0, y->d.out,
              y->oh, y->ow, y->d.pool, y->d.relu, y->gx_pad, ws + y->gz_lanes + (int64_t)y->d.out * plane * s0);
    if (y->d.batch_norm) bn_maps_back(y, params, grads, S, ws);
    if (bits & IFT_B) conv_bias_back(y, grads, S, ws);
    if (bits & IFT_LAYER_ADAPTER) {
        EACH_PANEL(S) {
            int n = S - s0 < lw ? S - s0 : lw;
            const float *g = ws + y->gz_lanes + (int64_t)y->d.out * plane * s0;
            float *rows = ws + y->g_rows + (int64_t)s0 * y->Mp;
            for (int r = 0; r < y->d.out * y->oh; r++)
                LANES(lw, to_rows, g + (r * pitch + y->gx_pad) * lw, n, y->ow, rows + (int64_t)r * y->ow, y->Mp);
            for (int s = 0; s < n; s++)
                for (int j = y->M; j < y->Mp; j++) rows[(int64_t)s * y->Mp + j] = 0;
        }
        adapter_back(p, y, params, grads, S, ws);
    }
    conv_args g = conv_shape(y);
    if (bits & IFT_W) {
        const ift_tensor *t = &y->t[IFT_ROLE_W];
        memset(grads + t->offset, 0, (size_t)t->rows * (size_t)t->pitch * sizeof *grads);
        EACH_PANEL(S)
            LANES(lw, conv_gw, &g, conv_input(p, k, s0, ws),
                  ws + y->gz_lanes + (int64_t)y->d.out * plane * s0 + y->gx_pad * lw, pitch, plane, grads + t->offset);
    }
    if (!(bits & IFT_X)) return;
    conv_args b = {0};
    b.ic = y->d.out, b.oc = y->ic, b.kh = y->d.kh, b.kw = y->d.kw, b.oh = y->ih, b.ow = y->iw;
    b.x_pitch = pitch, b.x_plane = plane, b.x_rows = y->oh, b.clip = y->d.kh - 1 - y->d.ph;
    b.y_plane = (ptrdiff_t)y->ih * y->iw;
    float *gq = ws + p->layer[k - 1].gq_lanes;
    EACH_PANEL(S) {
        float *gx = gq + (int64_t)y->N * s0;
        LANES(lw, conv, &b, ws + y->gz_lanes + (int64_t)y->d.out * plane * s0, turned_conv(y, ws), NULL, gx);
        if (bits & IFT_LAYER_ADAPTER)
            LANES(lw, expand, p->Rp, ws + y->gh + s0, p->batch_p, params + y->t[IFT_ROLE_LAYER_A].offset, y->Np, y->N, gx);
    }
}

/* ---- Update ----------------------------------------------------------------------------------------------------- */

/* v = momentum·v + g; p −= lr·v (PyTorch's form); without velocity p −= lr·g */
static void sgd(ift_job *job, const ift_tensor *t) {
    int64_t n = (int64_t)t->rows * t->pitch;
    float *w = job->params + t->offset, lr = job->lr, mu = job->momentum;
    const float *g = job->grads + t->offset;
    if (!job->velocity) {
        for (int64_t i = 0; i < n; i++) w[i] -= lr * g[i];
        return;
    }
    float *v = job->velocity + t->offset;
    for (int64_t i = 0; i < n; i++) {
        v[i] = mu * v[i] + g[i];
        w[i] -= lr * v[i];
    }
}

static double general_step(const ift_plan *p, ift_job *job, int S, const float *const *x, const float *const *rec,
                           const int32_t *rows, const int32_t *labels, int64_t *correct) {
    float *ws = job->workspace, *z = ws + p->ws_z;
    const ift_layer *last = &p->layer[p->L - 1];
    int ld = (int)ift_pad(S);
    general_forward(p, job->params, S, x, rec, 1, ws);
    const float *bias = job->params + p->bias;
    for (int s = 0; s < S; s++)
        for (int c = 0; c < p->C; c++)
            z[(ptrdiff_t)c * ld + s] = ws[last->z_rows + (ptrdiff_t)s * last->Mp + c] + bias[c];
    for (int c = 0; c < p->C; c++)
        for (int s = S; s < ld; s++) z[(ptrdiff_t)c * ld + s] = 0;
    int64_t hits = 0;
    double loss = batch_loss(job, p->C, S, ld, rows, labels, 1.0f / (float)S, z, z + (ptrdiff_t)p->C * ld, &hits);
    if (!isfinite(loss)) return loss;
    *correct += hits;
    for (int k = p->first; k < p->L; k++)
        if (p->layer[k].d.train & IFT_BATCH_STATS) bn_running(&p->layer[k], job->params, S, ws + p->layer[k].bn);
    float *g = ws + last->g_rows;
    for (int s = 0; s < S; s++)
        for (int c = p->C; c < last->Mp; c++) g[(ptrdiff_t)s * last->Mp + c] = 0;
    to_class_rows(p->C, last->Mp, S, ld, z, g);
    for (int k = p->L - 1; k >= p->first; k--) {
        if (p->layer[k].d.kind == IFT_FC) fc_back(p, job->params, job->grads, k, S, ws);
        else conv_back(p, job->params, job->grads, k, S, ws);
    }
    for (int k = p->first; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        static const int bit[IFT_ROLE_SKIP_A] = {
            IFT_W, IFT_B, IFT_GAMMA, IFT_BETA, 0, 0, IFT_LAYER_ADAPTER, IFT_LAYER_ADAPTER};
        for (int r = 0; r < IFT_ROLE_SKIP_A; r++)
            if (bit[r] & y->d.train) sgd(job, &y->t[r]);
    }
    prepare(p, job->params, 0, ws);
    return loss;
}

#endif
