/* One instruction set's core: compiled once for each, with IFT_VL and IFT_CORE set by the build.
 *
 * In order: lanes, frozen network (records), cache, the skip step (Algorithm 1 of Skip2-LoRA after the forward pass),
 * the general step (methods whose gradients run through layers), epochs.
 */
#include "instantft.h"

#include "codecs.h"
#include "linalg.h"

#define GLUE2(a, b) a##b
#define GLUE(a, b) GLUE2(a, b)

#if IFT_MANY_REGISTERS
#define LANE_TILE 6
#define LANE_GW 4
#else
#define LANE_TILE 3
#define LANE_GW 2
#endif
#define LANE_COLUMNS 4

/* A convolution's shape on lanes; pitches and planes count positions. */
typedef struct conv_args {
    int ic, oc, kh, kw;
    int oh, ow; /* output rows and columns (after pooling where pool2) */
    ptrdiff_t x_pitch, x_plane, y_plane;
    int x_rows, clip;
    int pool2, relu;
} conv_args;

/* Weights [oc][ic][kh][kw] regrouped so that a tile reads its channels side by side; undone by nothing. */
static void conv_pack(const float *w, int oc, int taps, float *packed) {
    for (int done = 0; done < oc;) {
        int left = oc - done, tiles = (left + LANE_TILE - 1) / LANE_TILE, n = (left + tiles - 1) / tiles;
        for (int t = 0; t < taps; t++)
            for (int o = 0; o < n; o++) *packed++ = w[(ptrdiff_t)(done + o) * taps + t];
        done += n;
    }
}

/* The same for the gradient of the input: in and out channels swapped, the kernel turned by 180 degrees. */
static void conv_pack_turned(const float *w, int oc, int ic, int kh, int kw, float *packed) {
    int taps = kh * kw;
    for (int done = 0; done < ic;) {
        int left = ic - done, tiles = (left + LANE_TILE - 1) / LANE_TILE, n = (left + tiles - 1) / tiles;
        for (int o = 0; o < oc; o++)
            for (int t = taps - 1; t >= 0; t--)
                for (int i = 0; i < n; i++) *packed++ = w[((ptrdiff_t)o * ic + done + i) * taps + t];
        done += n;
    }
}

#if IFT_VL == 1
#define LW 1
#define LV float
#define LI int
#define LN(name) GLUE(name, _w)
INLINE float sum_w(float v) { return v; }
INLINE float where_w(int take, float v) { return take ? v : 0; }
#include "lanes.h"
#undef LW
#undef LV
#undef LI
#undef LN
#else

#if IFT_VL > 4
#define LW IFT_VL
#define LV vf
#define LI vi
#define LN(name) GLUE(name, _w)
#if IFT_VL == 16
#define ZIP_LOW(a, b) SHUFFLE(vi, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) SHUFFLE(vi, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define ZIP_LOW(a, b) SHUFFLE(vi, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) SHUFFLE(vi, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
/* A square of LW × LW turned by log2(LW) perfect shuffles. */
INLINE void transpose_w(vf v[LW]) {
    UNROLL for (int stage = 1; stage < LW; stage *= 2) {
        vf t[LW];
        UNROLL for (int i = 0; i < LW / 2; i++) {
            t[2 * i] = ZIP_LOW(v[i], v[i + LW / 2]);
            t[2 * i + 1] = ZIP_HIGH(v[i], v[i + LW / 2]);
        }
        UNROLL for (int i = 0; i < LW; i++) v[i] = t[i];
    }
}
INLINE float sum_w(vf v) { return vsum(v); }
INLINE vf where_w(vi take, vf v) { return (vf)(take & (vi)v); }
#include "lanes.h"
#undef LW
#undef LV
#undef LI
#undef LN
#endif

#define LW 4
#define LV v4
#define LI i4
#define LN(name) GLUE(name, _4)
INLINE void transpose_4(v4 v[4]) {
    v4 a = SHUFFLE(i4, v[0], v[2], 0, 4, 1, 5), b = SHUFFLE(i4, v[0], v[2], 2, 6, 3, 7);
    v4 c = SHUFFLE(i4, v[1], v[3], 0, 4, 1, 5), d = SHUFFLE(i4, v[1], v[3], 2, 6, 3, 7);
    v[0] = SHUFFLE(i4, a, c, 0, 4, 1, 5), v[1] = SHUFFLE(i4, a, c, 2, 6, 3, 7);
    v[2] = SHUFFLE(i4, b, d, 0, 4, 1, 5), v[3] = SHUFFLE(i4, b, d, 2, 6, 3, 7);
}
INLINE float sum_4(v4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
INLINE v4 where_4(i4 take, v4 v) { return (v4)(take & (i4)v); }
#if IFT_VL > 4 && !defined(__SSE__)
INLINE v4 max_4(v4 a, v4 b) {
    i4 take = a > b;
    return (v4)((take & (i4)a) | (~take & (i4)b));
}
#endif
#include "lanes.h"
#undef LW
#undef LV
#undef LI
#undef LN
#endif

/* How many lanes the next panel of a batch has when `left` samples remain: full vectors while they are more than half
 * used, then fours. */
INLINE int panel_lanes(int left) {
#if IFT_VL <= 4
    (void)left;
    return IFT_VL;
#else
    return left > IFT_VL / 2 ? IFT_VL : 4;
#endif
}

/* Call the lane kernel of the width at hand. */
#if IFT_VL > 4
#define LANES(lw, call, ...) ((lw) == 4 ? call##_4(__VA_ARGS__) : call##_w(__VA_ARGS__))
#elif IFT_VL == 4
#define LANES(lw, call, ...) call##_4(__VA_ARGS__)
#else
#define LANES(lw, call, ...) call##_w(__VA_ARGS__)
#endif

/* ---- The frozen network ------------------------------------------------------------------------------------- */

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

static conv_args conv_shape(const ift_layer *y) {
    conv_args g = {0};
    g.ic = y->ic, g.oc = y->d.out, g.kh = y->d.kh, g.kw = y->d.kw;
    g.oh = y->oh, g.ow = y->ow;
    g.x_rows = y->ih + 2 * y->d.ph;
    g.x_pitch = y->iw + 2 * y->d.pw;
    g.x_plane = g.x_pitch * g.x_rows;
    g.y_plane = (ptrdiff_t)y->oh * y->ow;
    return g;
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

/* Records of one panel: n <= lanes samples at x[0…n). Convolutions on lanes, then fc layers on the rows themselves. */
static void frozen_panel(const ift_plan *p, const float *frozen, const float *const *x, int n, int lw, float *rows,
                         float *ws) {
    (void)lw;
    float *a = ws + p->ws_lanes_a, *b = ws + p->ws_lanes_b;
    const float *packed = ws + p->ws_pack;
    int64_t width = p->row_width;
    int k = 0;
    if (p->layer[0].d.kind == IFT_CONV) {
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
            if (y->d.pool == 2) {
                g.pool2 = 1, g.relu = y->d.relu, g.oh = y->qh, g.ow = y->qw, g.y_plane = (ptrdiff_t)y->qh * y->qw;
                LANES(lw, conv, &g, a, packed, bias, b);
                float *t = a;
                a = b, b = t;
            } else {
                LANES(lw, conv, &g, a, packed, bias, b);
                LANES(lw, pool, b, y->d.out, y->oh, y->ow, y->d.pool, y->d.relu, a);
            }
            packed += ift_pad((int64_t)y->d.out * y->ic * y->d.kh * y->d.kw);
            int64_t at = k + 1 < p->L ? p->layer[k + 1].tap : p->output_at;
            LANES(lw, to_rows, a, n, y->n_out, rows + at, width);
        }
    }
    for (; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        int64_t at = k + 1 < p->L ? p->layer[k + 1].tap : p->output_at;
        const float *w = frozen + y->t[IFT_ROLE_W].offset, *bias = frozen + y->t[IFT_ROLE_BIAS].offset;
        if (k > 0) gemm(n, y->Mp, y->N, rows + y->tap, width, 1, w, y->Mp, rows + at, width, FROM_BIAS, bias, y->d.relu);
        else
            for (int s = 0; s < n;) { /* samples that lie evenly apart go through together */
                ptrdiff_t step = n - s > 1 ? x[s + 1] - x[s] : 0;
                int run = 1;
                while (s + run < n && x[s + run] - x[s + run - 1] == step) run++;
                gemm(run, y->Mp, y->N, x[s], step, 1, w, y->Mp, rows + s * width + at, width, FROM_BIAS, bias, y->d.relu);
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
        frozen_panel(p, frozen, x + s, m, lw, rows + s * p->row_width, ws);
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

/* ---- The cache ---------------------------------------------------------------------------------------------- */

static void fill(const ift_plan *p, const float *frozen, const float *x, int64_t x_pitch, const int64_t *order,
                 const int64_t *slots, int64_t n, const ift_codec *codec, uint8_t *store, float *ws) {
    pack_frozen(p, frozen, ws);
    const float *at[IFT_CHUNK];
    float *rows = ws + p->ws_rows;
    uint8_t *scratch = (uint8_t *)(ws + p->ws_codes);
    /* a panel at a time: what is computed is encoded while it is still near */
    int step = p->layer[0].d.kind == IFT_CONV ? IFT_PAD : IFT_CHUNK;
    for (int64_t i = 0; i < n; i += step) {
        int m = n - i < step ? (int)(n - i) : step;
        for (int s = 0; s < m; s++) at[s] = x + order[i + s] * x_pitch;
        frozen_rows(p, frozen, at, m, rows, ws);
        for (int s = 0; s < m; s++)
            codec_encode(p, codec, rows + s * p->row_width, store + slots[i + s] * codec->stride, scratch);
    }
}

/* ---- The loss ------------------------------------------------------------------------------------------------ */

/* exp(x) for x <= 0 to 2 ulp; below -87 it is as for -87; a NaN stays one. */
INLINE vf vexp(vf x) {
    const vf magic = vset(12582912.0f); /* 1.5·2^23: adding it rounds to an integer in the low bits */
    x = vmax(vset(-87.0f), x);
    vf t = x * vset(1.44269504f) + magic;
    vf n = t - magic;
    vf r = x - n * vset(0.693359375f);
    r = r - n * vset(-2.12194440e-4f);
    vf q = vset(1.9875691500e-4f);
    q = q * r + vset(1.3981999507e-3f);
    q = q * r + vset(8.3334519073e-3f);
    q = q * r + vset(4.1665795894e-2f);
    q = q * r + vset(1.6666665459e-1f);
    q = q * r + vset(5.0000001201e-1f);
    q = q * r * r + r + vset(1.0f);
    vu bits;
    vf scale;
    memcpy(&bits, &t, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&scale, &bits, sizeof scale);
    return q * scale;
}

/* z (C, ld) logits with samples side by side becomes (softmax(z) − onehot(y))·scale; lanes past S become 0. y has ld
 * entries, those past S -1. Returns the sum of the cross-entropies and adds to *correct: the label must be the largest
 * logit, the first of them where several are. total: ld floats. */
static double softmax_loss(int C, int S, int ld, const int32_t *y, float scale, float *z, float *total,
                           int64_t *correct) {
    double loss = 0;
    for (int s = 0; s < ld; s += IFT_VL) {
        vi label, hit, used;
        memcpy(&label, y + s, sizeof label);
#if IFT_VL == 1
        used = -(label >= 0);
#else
        used = label >= 0;
#endif
        vf best = vload(z + s), own = vset(0), sum = vset(0);
        hit = label == (vi){0};
        for (int c = 0; c < C; c++) {
            vf v = vload(z + (ptrdiff_t)c * ld + s);
            vi mine = vmask(label == (vi){0} + c), above = vmask(v > best);
            own = vselect(mine, v, own);
            hit = (above & mine) | (~above & vmask(hit));
            best = vmax(best, v);
        }
        for (int c = 0; c < C; c++) {
            vf e = vexp(vload(z + (ptrdiff_t)c * ld + s) - best);
            sum += e;
            vstore(z + (ptrdiff_t)c * ld + s, e);
        }
        vstore(total + s, sum);
        vf inverse = vset(scale) / sum;
        for (int c = 0; c < C; c++) {
            float *p = z + (ptrdiff_t)c * ld + s;
            vf g = vload(p) * inverse - vselect(vmask(label == (vi){0} + c), vset(scale), vset(0));
            vstore(p, vselect(used, g, vset(0)));
        }
        loss += vsum(vselect(used, best - own, vset(0)));
        *correct += vcount(hit & used);
    }
    /* Σ log total = log Π total: one logarithm for 32 samples, each factor at most C <= 2^22 */
    for (int s = 0; s < S; s += 32) {
        double part[4] = {1, 1, 1, 1};
        for (int i = s; i < s + 32 && i < S; i++) part[i & 3] *= total[i];
        loss += log((part[0] * part[1]) * (part[2] * part[3]));
    }
    return loss;
}

/* ---- The skip step: y = gain·c + Σ_k x^k·A_k·B_k + bias (Skip2-LoRA eq. 17), then eqs. 10-12 and SGD ----------- */

/* h (J, ld) = A_k·x^k for every adapter; z (C, ld) = logits. x, rec: the batch's inputs and record rows. */
static void skip_logits(const ift_plan *p, const float *params, int S, int ld, const float *const *x,
                        const float *const *rec, float *h, float *z) {
    float gain = params[p->gain];
    const float *bias = params + p->bias;
    for (int s = 0; s < S; s++)
        for (int c = 0; c < p->C; c++) z[(ptrdiff_t)c * ld + s] = gain * rec[s][p->output_at + c] + bias[c];
    for (int c = 0; c < p->C; c++)
        for (int s = S; s < ld; s++) z[(ptrdiff_t)c * ld + s] = 0;
    if (p->skip_first == p->L) return;
    int J = 0;
    for (int k = p->skip_first; k < p->L; k++, J += p->Rp) {
        const ift_layer *y = &p->layer[k];
        const float *a = params + y->t[IFT_ROLE_SKIP_A].offset;
        if (k == 0) dot(S, x, 0, p->Rp, a, y->Np, y->Np, h, ld);
        else dot(S, rec, y->tap, p->Rp, a, y->Np, y->Np, h + (ptrdiff_t)J * ld, ld);
    }
    for (int j = 0; j < J; j++)
        for (int s = S; s < ld; s++) h[(ptrdiff_t)j * ld + s] = 0;
    const float *b = params + p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(p->C, ld, J, b, 1, p->Cp, h, ld, z, ld, FROM_C, NULL, 0);
}

/* (C, ld) to rows (S, Cp). */
static void to_class_rows(int C, int Cp, int S, int ld, const float *z, float *rows) {
    for (int s = 0; s < S; s++)
        for (int c = 0; c < C; c++) rows[(ptrdiff_t)s * Cp + c] = z[(ptrdiff_t)c * ld + s];
}

/* Velocity holds u = −lr·v. Before a step u *= momentum; after it, with the gradients added, the parameters move by u. */
static void skip_velocity(const ift_plan *p, const ift_job *job, int move) {
    for (int k = p->skip_first; k < p->L; k++)
        for (int r = IFT_ROLE_SKIP_A; r <= IFT_ROLE_SKIP_B; r++) {
            const ift_tensor *t = &p->layer[k].t[r];
            float *u = job->velocity + t->offset, *w = job->params + t->offset;
            for (int64_t i = 0; i < (int64_t)t->rows * t->pitch; i++) {
                if (move) w[i] += u[i];
                else u[i] *= job->momentum;
            }
        }
}

/* One batch: forward, loss, backward, update. Returns the loss sum; *finite 0 and nothing updated if it is not. */
static double skip_step(const ift_plan *p, ift_job *job, int S, const float *const *x, const float *const *rec,
                        const float *const *next_x, const float *const *next_rec, const int32_t *labels,
                        int64_t *correct) {
    float *ws = job->workspace, *params = job->params;
    int ld = (S + IFT_VL - 1) / IFT_VL * IFT_VL;
#if IFT_VL < 4
    ld = (S + 3) / 4 * 4;
#endif
    float *h = ws + p->ws_h, *dh = ws + p->ws_dh, *z = ws + p->ws_z, *g = ws + p->ws_g;
    int J = (p->L - p->skip_first) * p->Rp;
    skip_logits(p, params, S, ld, x, rec, h, z);
    int64_t hits = 0;
    double loss = softmax_loss(p->C, S, ld, labels, -job->lr / (float)S, z, z + (ptrdiff_t)p->C * ld, &hits);
    if (!isfinite(loss)) return loss;
    *correct += hits;
    /* z now holds −lr/B · dL/dy, so every update below is an addition, to the parameters or to their velocity */
    float *target = job->velocity ? job->velocity : params;
    int64_t b = p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(J, ld, p->C, params + b, p->Cp, 1, z, ld, dh, ld, FROM_ZERO, NULL, 0);
    to_class_rows(p->C, p->Cp, S, ld, z, g);
    if (job->velocity) skip_velocity(p, job, 0);
    gemm(J, p->Cp, S, h, ld, 1, g, p->Cp, target + b, p->Cp, FROM_C, NULL, 0);
    J = 0;
    for (int k = p->skip_first; k < p->L; k++, J += p->Rp) {
        const ift_layer *y = &p->layer[k];
        float *a = target + y->t[IFT_ROLE_SKIP_A].offset;
        outer(S, k ? rec : x, k ? next_rec : next_x, k ? y->tap : 0, p->Rp, dh + (ptrdiff_t)J * ld, ld, a, y->Np, y->Np);
    }
    if (job->velocity) skip_velocity(p, job, 1);
    return loss;
}

#include "general.h"

/* ---- Epochs ---------------------------------------------------------------------------------------------------- */

typedef struct chunk {
    int n;
    const float **x;     /* inputs */
    const float **rec;   /* records; NULL until resolved */
    int64_t *number;
} chunk;

/* number mod capacity, without a division where there is room for all. */
INLINE int64_t slot_of(const ift_job *job, int64_t number) {
    return number < job->capacity ? number : number % job->capacity;
}

/* Where a sample's record is in the store, or NULL. */
INLINE uint8_t *held(const ift_job *job, int64_t number) {
    if (!job->capacity) return NULL;
    int64_t slot = slot_of(job, number);
    return job->owner[slot] == number ? job->store + slot * job->codec->stride : NULL;
}

/* Encoded records are short: ask for all of one while the step before it runs. */
INLINE void prefetch_record(const ift_job *job, int64_t number) {
    const uint8_t *at = held(job, number);
    for (int64_t i = 0; at && i < job->codec->stride; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* Run the frozen network for one chunk's misses and offer their records to the store. Training sees what the codec
 * gives back, whether the store keeps the record or not, so the result does not depend on the capacity. */
static void compute_misses(const ift_plan *p, ift_job *job, chunk *c) {
    float *ws = job->workspace, *rows = ws + p->ws_rows;
    uint8_t *bytes = (uint8_t *)(ws + p->ws_bytes), *scratch = (uint8_t *)(ws + p->ws_codes);
    const float *x[IFT_CHUNK];
    int index[IFT_CHUNK], n = 0, at = 0;
    for (int i = 0; i < c->n; i++) {
        if (!job->codec || !held(job, c->number[i])) x[n] = c->x[i], index[n++] = i;
        if (n == 0 || (n < IFT_CHUNK && i + 1 < c->n)) continue;
        float *r = rows + (int64_t)at * p->row_width;
        frozen_rows(p, job->frozen, x, n, r, ws);
        job->misses += n;
        for (int j = 0; j < n; j++, r += p->row_width) {
            c->rec[index[j]] = r;
            if (!job->codec) continue;
            int64_t number = c->number[index[j]], slot = job->capacity ? slot_of(job, number) : 0;
            uint8_t *to = bytes;
            if (job->capacity && job->owner[slot] <= number) {
                job->owner[slot] = number;
                to = job->store + slot * job->codec->stride;
            }
            codec_encode(p, job->codec, r, to, scratch);
            if (job->codec->id != IFT_FP32) codec_decode(p, job->codec, to, r);
        }
        at += n, n = 0;
    }
}

/* Point at a chunk's samples, and at those records that can be used where they lie (fp32). Returns how many records the
 * store lacks. */
static int gather(const ift_job *job, const int32_t *order, chunk *c) {
    int lacking = 0, in_place = job->codec && job->codec->id == IFT_FP32;
    for (int s = 0; s < c->n; s++) {
        int64_t row = order[s], number = job->numbers[row];
        const uint8_t *at = held(job, number);
        c->x[s] = job->x + row * job->x_pitch;
        c->number[s] = number;
        c->rec[s] = in_place ? (const float *)(const void *)at : NULL;
        lacking += !at;
    }
    return lacking;
}

/* A sample whose slot another one of its chunk took: run the frozen network for it alone, into `row`. */
static void compute_again(const ift_plan *p, ift_job *job, chunk *c, int s, float *row) {
    chunk one = {1, c->x + s, c->rec + s, c->number + s};
    float *first = job->workspace + p->ws_rows; /* where compute_misses writes, and where others' records lie */
    memcpy(row, first, (size_t)p->row_width * sizeof *row);
    compute_misses(p, job, &one);
    for (int64_t j = 0; j < p->row_width; j++) {
        float t = first[j];
        first[j] = row[j], row[j] = t;
    }
    c->rec[s] = row;
}

/* Records of samples b … b+S, decoded where they are not there yet. */
static void resolve(const ift_plan *p, ift_job *job, chunk *c, int b, int S) {
    float *row = job->workspace + p->ws_decoded;
    for (int s = b; s < b + S; s++) {
        if (c->rec[s]) continue;
        const uint8_t *from = held(job, c->number[s]);
        if (from && job->codec->id == IFT_FP32) {
            c->rec[s] = (const float *)(const void *)from;
            continue;
        }
        if (from) codec_decode(p, job->codec, from, row);
        else compute_again(p, job, c, s, row);
        c->rec[s] = row;
        row += p->row_width;
    }
}

/* Rows that the next step will read, for fetching them while this one runs: next[0…S) inputs, next[S…2S) records. */
static void look_ahead(const ift_job *job, const int32_t *order, int S, const float *const *rec, const float **next) {
    for (int s = 0; s < S; s++) {
        int64_t row = order[s], number = job->numbers[row];
        const uint8_t *at = job->codec && job->codec->id == IFT_FP32 ? held(job, number) : NULL;
        next[s] = job->x + row * job->x_pitch;
        next[S + s] = at ? (const float *)(const void *)at : rec[s];
        if (job->codec && !at) prefetch_record(job, number);
    }
}

static int64_t epochs(const ift_plan *p, ift_job *job, const int32_t *order, int64_t E, int64_t T, double *loss,
                      int64_t *correct) {
    float *ws = job->workspace;
    int B = p->batch, frozen = p->first > 0; /* records are needed unless gradients reach layer 0 */
    int per_chunk = B < IFT_CHUNK ? IFT_CHUNK / B * B : B;
    chunk c = {0};
    c.x = (const float **)(void *)(ws + p->ws_chunk);
    c.rec = c.x + per_chunk;
    c.number = (int64_t *)(void *)(c.rec + per_chunk);
    int32_t *labels = (int32_t *)(void *)(c.number + per_chunk);
    const float **next = (const float **)(void *)(ws + p->ws_pointers);
    int64_t step = 0;
    if (frozen) pack_frozen(p, job->frozen, ws);
    if (p->general) prepare(p, job->params, 1, ws);
    for (int64_t e = 0; e < E; e++, order += T) {
        loss[e] = 0, correct[e] = 0;
        for (int64_t i = 0; i < T; i += per_chunk) {
            int64_t misses = job->misses;
            c.n = T - i < per_chunk ? (int)(T - i) : per_chunk;
            int lacking = gather(job, order + i, &c);
            if (lacking && frozen) {
                for (int s = 0; s < c.n; s++) c.rec[s] = NULL; /* what is computed may take a slot that was held */
                compute_misses(p, job, &c);
            }
            for (int b = 0; b < c.n; b += B) {
                int S = c.n - b < B ? c.n - b : B;
                for (int s = 0; s < S; s++) labels[s] = job->labels[order[i + b + s]];
                for (int s = S; s < (int)ift_pad(S); s++) labels[s] = -1;
                if (frozen) resolve(p, job, &c, b, S);
                step++;
                double batch;
                if (p->general) {
                    batch = general_step(p, job, S, c.x + b, c.rec + b, labels, &correct[e]);
                } else {
                    int64_t after = i + b + S;
                    const float **ahead = T - after >= S ? next : NULL; /* a full batch follows in this epoch */
                    if (ahead) look_ahead(job, order + after, S, c.rec + b, ahead);
                    batch = skip_step(p, job, S, c.x + b, c.rec + b, ahead, ahead ? ahead + S : NULL, labels, &correct[e]);
                }
                if (!isfinite(batch)) return step;
                loss[e] += batch;
            }
            if (job->codec) job->hits += c.n - (frozen ? job->misses - misses : lacking);
        }
    }
    return 0;
}

/* ---- Prediction ------------------------------------------------------------------------------------------------ */

static void forward(const ift_plan *p, const float *params, const float *frozen, const float *x, int64_t x_pitch,
                    int64_t n, float *logits, float *ws) {
    const float *at[IFT_CHUNK], *rec[IFT_CHUNK];
    float *rows = ws + p->ws_rows, *h = ws + p->ws_h, *z = ws + p->ws_z;
    if (p->layer_adapters) prepare(p, params, 1, ws);
    else pack_frozen(p, frozen, ws);
    int step = p->batch < IFT_CHUNK ? p->batch : IFT_CHUNK;
    for (int64_t i = 0; i < n; i += step) {
        int S = n - i < step ? (int)(n - i) : step, ld = (int)ift_pad(S);
        for (int s = 0; s < S; s++) at[s] = x + (i + s) * x_pitch, rec[s] = rows + s * p->row_width;
        if (p->layer_adapters) {
            general_forward(p, params, S, at, rec, 0, ws);
            const ift_layer *last = &p->layer[p->L - 1];
            for (int s = 0; s < S; s++)
                for (int c = 0; c < p->C; c++)
                    logits[(i + s) * p->C + c] = ws[last->z_rows + (ptrdiff_t)s * last->Mp + c] + params[p->bias + c];
            continue;
        }
        frozen_rows(p, frozen, at, S, rows, ws);
        skip_logits(p, params, S, ld, at, rec, h, z);
        for (int s = 0; s < S; s++)
            for (int c = 0; c < p->C; c++) logits[(i + s) * p->C + c] = z[(ptrdiff_t)c * ld + s];
    }
}

/* ---- What the machine can do --------------------------------------------------------------------------------- */

static double fma_loop(int64_t n, float *sink) {
    enum { CHAINS = 12 };
    vf acc[CHAINS], a = vset(sink[0]), b = vset(sink[1]);
    UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = vset((float)i);
    for (int64_t k = 0; k < n; k += CHAINS) UNROLL for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * a + b;
    vf sum = acc[0];
    UNROLL for (int i = 1; i < CHAINS; i++) sum += acc[i];
    sink[2] = vsum(sum);
    return (double)((n + CHAINS - 1) / CHAINS * CHAINS) * IFT_VL * 2;
}

const ift_core IFT_CORE = {IFT_NAME, fold, records, fill, forward, epochs, codec_encode, codec_decode, fma_loop};
