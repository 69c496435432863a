/* The loop on the device: samples in, steps of training, commit and rollback, all in one arena. The arithmetic is that of
 * the headers included here, which are the same files the Python package is built from; instantft_config.h says where
 * everything lies in the arena, instantft_model.c holds the network.
 */
#include "../include/instantft_device.h"

#include "instantft.h"

#include "codecs.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* the headers serve more than this file */
#endif

#include "linalg.h"

extern const ift_layer_desc instantft_layers[];
extern const float instantft_frozen[];   /* biases, and the weights of fc layers unless they are in 8 bits */
extern const float instantft_packed[];   /* the weights of conv layers, as conv_pack puts them */
extern const float instantft_start[];    /* A where training starts */
extern const float instantft_exported[]; /* the adapter that was exported, if IFT_EXPORTED */
extern const float instantft_mean[], instantft_std[];
extern const int8_t instantft_codes[];   /* weights in 8 bits; each output has a scale */
extern const float instantft_scales[];

#if IFT_WEIGHTS8
enum { ROWS8 = 8 }; /* rows of a weight matrix that are decoded at a time */

/* rows = x·W + b, a few rows of W at a time: the sums are those of one product with the decoded matrix. */
static void fc8(const ift_layer *y, const float *frozen, int n, const float *x, ptrdiff_t ldx, float *rows,
                ptrdiff_t width, float *block) {
    const int8_t *code = instantft_codes + y->t[IFT_ROLE_W].offset;
    const float *scale = instantft_scales + y->t[IFT_ROLE_GAMMA].offset, *bias = frozen + y->t[IFT_ROLE_BIAS].offset;
    for (int k = 0; k < y->N; k += ROWS8) {
        int m = y->N - k < ROWS8 ? y->N - k : ROWS8;
        for (int i = 0; i < m; i++, code += y->Mp)
            for (int j = 0; j < y->Mp; j++) block[i * y->Mp + j] = (float)code[j] * scale[j];
        gemm(n, y->Mp, m, x + k, ldx, 1, block, y->Mp, rows, width, k ? FROM_C : FROM_BIAS, bias,
             y->d.relu && k + m == y->N);
    }
}

/* Weights of a conv layer, which are packed: tiles of n outputs, n values side by side. */
static const float *conv8(const ift_layer *y, int tile, float *to) {
    const int8_t *code = instantft_codes + y->t[IFT_ROLE_W].offset;
    const float *scale = instantft_scales + y->t[IFT_ROLE_GAMMA].offset;
    int taps = y->ic * y->d.kh * y->d.kw;
    float *at = to;
    for (int done = 0; done < y->d.out;) {
        int left = y->d.out - done, tiles = (left + tile - 1) / tile, n = (left + tiles - 1) / tiles;
        for (int i = 0; i < taps; i++)
            for (int o = 0; o < n; o++) *at++ = (float)*code++ * scale[done + o];
        done += n;
    }
    return to;
}
#define FROZEN_FC(p, y, frozen, n, x, ldx, rows, width, ws) fc8(y, frozen, n, x, ldx, rows, width, (ws) + (p)->ws_pack)
#define FROZEN_CONV(p, y, packed, at, ws) ((void)(packed), (void)(at), conv8(y, LANE_TILE, (ws) + (p)->ws_pack))
#else
#define FROZEN_FC(p, y, frozen, n, x, ldx, rows, width, ws)                                                              \
    gemm(n, (y)->Mp, (y)->N, x, ldx, 1, (frozen) + (y)->t[IFT_ROLE_W].offset, (y)->Mp, rows, width, FROM_BIAS,            \
         (frozen) + (y)->t[IFT_ROLE_BIAS].offset, (y)->d.relu)
#define FROZEN_CONV(p, y, packed, at, ws) ((packed) + (at))
#endif

#include "frozen.h"
#include "skip.h"

#if IFT_RIDGE
#define D float
#define DV vf
#define DL IFT_VL
#define DN(name) name##_f
#if IFT_VL == 4
#define DT transpose_4
#endif
#include "dense.h"
#endif

enum { N = INSTANTFT_N, C = INSTANTFT_C, CAPACITY = INSTANTFT_SAMPLES };

/* What the second adapter is. */
enum spare { EMPTY, TRAINING, TRAINED, PREVIOUS };

struct instantft {
    ift_plan plan;
    ift_codec codec;
    uint8_t *arena;
    uint64_t random[2]; /* state of the generator, high half first */
    uint32_t half;      /* the second half of the last number drawn, if there is one */
    int32_t has_half;
    int32_t live; /* number of the adapter in use, 0 or 1 */
    int32_t spare;
    int32_t samples, right, T; /* kept; how many of them the frozen network knew; those the training began with */
    int32_t at, epoch, steps;
    int64_t correct;
    double loss;
    instantft_report report;
#if IFT_RIDGE
    int32_t phase, block; /* of the closed form: which part, which rows */
    float scale, limit;
    float error[IFT_LAMBDAS]; /* left-out error at each λ of the grid, below 0: not known */
#endif
    uint64_t runs[IFT_RUNS_BYTES / 8]; /* of the codec */
};
_Static_assert(sizeof(struct instantft) <= IFT_STATE_BYTES, "the arena must hold the state");
_Static_assert(sizeof(float) == 4 && sizeof(ift_layer_desc) == 40, "tables are counted in 4-byte floats");

static float *floats(const instantft *t, size_t at) { return (float *)(void *)(t->arena + at); }
static float *adapter(const instantft *t, int i) { return floats(t, i ? IFT_AT_ADAPTER1 : IFT_AT_ADAPTER0); }
static float *scratch(const instantft *t) { return floats(t, IFT_AT_SCRATCH); }

/* ---- Samples ------------------------------------------------------------------------------------------------ */

/* Weights lie in flash, layer by layer; adapters in RAM: all A, all B, gain, bias. */
static void place(ift_plan *p) {
    int64_t frozen = 0, coded = 0, outputs = 0, at = 0;
    for (int k = 0; k < p->L; k++) {
        ift_layer *y = &p->layer[k];
        int64_t weights = (int64_t)y->t[IFT_ROLE_W].rows * y->t[IFT_ROLE_W].pitch;
        y->t[IFT_ROLE_W].offset = IFT_WEIGHTS8 ? coded : frozen;
        if (!IFT_WEIGHTS8 && y->d.kind == IFT_FC) frozen += ift_pad(weights);
        coded += weights;
        y->t[IFT_ROLE_BIAS].offset = frozen, frozen += ift_pad(y->d.out);
        y->t[IFT_ROLE_GAMMA].offset = outputs, outputs += ift_pad(y->d.out); /* scales of coded weights */
        y->t[IFT_ROLE_SKIP_A].offset = at, at += (int64_t)p->Rp * y->Np;
    }
    for (int k = 0; k < p->L; k++) p->layer[k].t[IFT_ROLE_SKIP_B].offset = at, at += (int64_t)p->Rp * p->Cp;
    p->gain = at, p->bias = at + IFT_PAD, p->params = at + IFT_PAD + p->Cp;
    p->ws_pack = IFT_WS_PACK, p->ws_lanes_a = IFT_WS_LANES_A, p->ws_lanes_b = IFT_WS_LANES_B;
    p->ws_h = IFT_WS_H, p->ws_dh = IFT_WS_DH, p->ws_z = IFT_WS_Z, p->ws_g = IFT_WS_G;
}

/* Values first … last-1 of a sample as the network wants them: scaled, normalised, zeros past the end. Returns 0 if one is
 * not finite. */
static int prepare(const instantft_value *x, int first, int last, float *to) {
    const int end = last < N ? last : N;
    int finite = 1;
#if IFT_INPUT8
    int at = first;
#if IFT_BY_LANE
    for (; at + 64 <= end; at += 64) vbytes(4, x + at, (float)(1.0 / 255), to + at - first);
    for (; at + 16 <= end; at += 16) vbytes(1, x + at, (float)(1.0 / 255), to + at - first);
#endif
    for (; at < end; at++) to[at - first] = (float)x[at] * (float)(1.0 / 255);
#else
    for (int i = first; i < end; i++) to[i - first] = x[i];
#endif
#if IFT_MEANS || IFT_STDS
    for (int i = first; i < end; i++) {
#if IFT_MEANS
        to[i - first] -= instantft_mean[i / (N / IFT_MEANS)];
#endif
#if IFT_STDS
        to[i - first] /= instantft_std[i / (N / IFT_STDS)];
#endif
    }
#endif
    for (int i = end; i < last; i++) to[i - first] = 0;
    for (int i = 0; i < last - first; i++) finite &= isfinite(to[i]) != 0;
    return finite;
}

#if !IFT_INPUT8
/* A float sample is kept in 8 bits a value by the codec of records, as if it were a record of one vector. */
static const ift_run input_run = {0, N, 0, 0, 1};
static const ift_plan input_plan = {.L = 1, .C = N, .output_at = 0, .row_width = (N + IFT_PAD - 1) / IFT_PAD * IFT_PAD};
static const ift_codec input_codec = {.id = IFT_INT8, .spans_n = 1, .runs_n = 1, .scales_n = 1, .bytes = 4 + N,
                                      .stride = IFT_X_STRIDE, .codes_at = 4, .kept_at = -1, .kept_first = 2,
                                      .spans = {{.bits = 8, .runs_to = 1, .codes_n = N}}, .runs = &input_run};
#endif

static uint8_t *kept_input(const instantft *t, int i) { return t->arena + IFT_AT_X + (size_t)i * IFT_X_STRIDE; }
static uint8_t *kept_record(const instantft *t, int i) { return t->arena + IFT_AT_CACHE + (size_t)i * IFT_STRIDE; }
static uint16_t *kept_labels(const instantft *t) { return (uint16_t *)(void *)(t->arena + IFT_AT_LABELS); }

/* Values first … last-1 of the m samples with these numbers as they are kept, to rows of `pitch` floats; past a sample's
 * end they are zero. */
static void decode_inputs(const instantft *t, const uint32_t *numbers, int m, int first, int last, float *out,
                          ptrdiff_t pitch) {
#if IFT_INPUT8
    for (int s = 0; s < m; s++) (void)prepare(kept_input(t, (int)numbers[s]), first, last, out + s * pitch);
#else
    (void)codec_decode_part(&input_plan, &input_codec, kept_input(t, 0), numbers, m, 1, first, last, 0, out, pitch);
#endif
}
static void decode_input(const instantft *t, int i, int first, int last, float *out) {
    decode_inputs(t, &(const uint32_t){(uint32_t)i}, 1, first, last, out, last - first);
}

static float *input_row(const instantft *t, int r) { return scratch(t) + IFT_WS_X + (ptrdiff_t)r * ift_pad(N); }
static float *record_row(const instantft *t, int r) { return scratch(t) + IFT_WS_ROWS + (ptrdiff_t)r * t->plan.row_width; }

/* Records of n ≤ IFT_HELD samples whose rows are in place: fc layers take all of them, so that weights move once. */
static void run_frozen(const instantft *t, const float *const *x, int n) {
    clear_gaps(&t->plan, n, record_row(t, 0));
    for (int s = 0; s < n; s += IFT_VL) {
        int m = n - s < IFT_VL ? n - s : IFT_VL;
        frozen_convs(&t->plan, instantft_frozen, instantft_packed, x + s, m, IFT_VL, record_row(t, s), scratch(t));
    }
    frozen_dense(&t->plan, instantft_frozen, x, n, record_row(t, 0), scratch(t));
}

int instantft_add_samples(instantft *t, const instantft_value *x, const int *labels, int n) {
    if (n < 1) return INSTANTFT_BAD_INPUT;
    for (int first = 0; first < n;) {
        const float *rows[IFT_HELD];
        int m = 0, status = INSTANTFT_DONE;
        for (; m < IFT_HELD && first + m < n; m++) {
            int i = t->samples + m, label = labels[first + m];
            const instantft_value *from = x + (size_t)(first + m) * N;
            float *row = input_row(t, m);
            rows[m] = row;
            if (i >= CAPACITY) status = INSTANTFT_FULL;
            else if (label < 0 || label >= C || !prepare(from, 0, (int)ift_pad(N), row)) status = INSTANTFT_BAD_INPUT;
            if (status) break;
#if IFT_INPUT8
            memcpy(kept_input(t, i), from, N);
#else
            codec_encode(&input_plan, &input_codec, row, kept_input(t, i), NULL);
            decode_input(t, i, 0, (int)ift_pad(N), row); /* the record is that of the sample as it is kept */
#endif
            kept_labels(t)[i] = (uint16_t)label;
        }
        if (m) run_frozen(t, rows, m);
        for (int s = 0; s < m; s++, t->samples++) {
            const float *c = record_row(t, s) + t->plan.output_at;
            int best = 0;
            for (int j = 1; j < C; j++) best = c[j] > c[best] ? j : best;
            t->right += best == kept_labels(t)[t->samples];
            codec_encode(&t->plan, &t->codec, record_row(t, s), kept_record(t, t->samples),
                         (uint8_t *)(void *)(scratch(t) + IFT_WS_CODES));
        }
        if (status) return status;
        first += m;
    }
    return INSTANTFT_DONE;
}

int instantft_add_sample(instantft *t, const instantft_value *x, int label) {
    return instantft_add_samples(t, x, &label, 1);
}

void instantft_clear_samples(instantft *t) {
    memset(t->arena + IFT_AT_X, 0, (size_t)CAPACITY * IFT_X_STRIDE);
    memset(t->arena + IFT_AT_CACHE, 0, (size_t)CAPACITY * IFT_STRIDE);
    memset(t->arena + IFT_AT_LABELS, 0, (size_t)CAPACITY * sizeof(uint16_t));
    memset(t->arena + IFT_AT_SCRATCH, 0, IFT_SCRATCH_BYTES);
    t->samples = t->right = 0;
    if (t->spare == TRAINING) t->spare = EMPTY;
}

int instantft_infer(instantft *t, const instantft_value *x, float *logits) {
    const float *row = input_row(t, 0), *rec = record_row(t, 0);
    if (!prepare(x, 0, (int)ift_pad(N), input_row(t, 0))) return INSTANTFT_BAD_INPUT;
    run_frozen(t, &row, 1);
    int ld = skip_lanes(1);
    float *h = scratch(t) + IFT_WS_H, *z = scratch(t) + IFT_WS_Z;
    skip_logits(&t->plan, adapter(t, t->live), 1, ld, &row, &rec, h, z);
    int best = 0;
    for (int c = 0; c < C; c++) {
        if (logits) logits[c] = z[(ptrdiff_t)c * ld];
        if (z[(ptrdiff_t)c * ld] > z[(ptrdiff_t)best * ld]) best = c;
    }
    return best;
}

/* ---- Start ---------------------------------------------------------------------------------------------------- */

/* An adapter that changes nothing, or with the values of A where training starts. */
static void blank(const instantft *t, float *to, int start) {
    memset(to, 0, (size_t)t->plan.params * sizeof *to);
    to[t->plan.gain] = 1;
    if (start) memcpy(to, instantft_start, (size_t)t->plan.layer[0].t[IFT_ROLE_SKIP_B].offset * sizeof *to);
}

instantft *instantft_init(void *arena, size_t bytes) {
    static const int32_t shape[3] = IFT_INPUT_SHAPE;
    if (!arena || bytes < INSTANTFT_ARENA || (uintptr_t)arena % 16) return NULL;
    memset(arena, 0, INSTANTFT_ARENA);
    instantft *t = arena;
    t->arena = arena;
    if (ift_plan_init(&t->plan, instantft_layers, INSTANTFT_LAYERS, shape, INSTANTFT_RANK, INSTANTFT_BATCH)) return NULL;
    place(&t->plan);
    if (t->plan.row_width != IFT_ROW_WIDTH || t->plan.params * (int64_t)sizeof(float) != IFT_ADAPTER_BYTES) return NULL;
    if (ift_codec_memory(&t->plan, IFT_CODEC) > IFT_RUNS_BYTES) return NULL;
    if (ift_codec_init(&t->codec, &t->plan, IFT_CODEC, t->runs) || t->codec.stride != IFT_STRIDE) return NULL;
    blank(t, adapter(t, 0), 0);
#if IFT_EXPORTED
    memcpy(adapter(t, 0), instantft_exported, IFT_ADAPTER_BYTES);
#endif
    return t;
}

/* ---- Training by steps ---------------------------------------------------------------------------------------- */

#if !IFT_RIDGE
/* NumPy's PCG64 (XSL-RR 128/64), so that samples come in the order in which the Python package would take them. */
static uint64_t draw64(uint64_t s[2]) {
    const uint64_t mh = 0x2360ed051fc65da4u, ml = 0x4385df649fccf645u, low = 0xffffffffu;
    const uint64_t increment[2] = IFT_RANDOM_INCREMENT;
    uint64_t a = s[1] >> 32, b = s[1] & low, c = ml >> 32, d = ml & low;
    uint64_t middle = (b * d >> 32) + (a * d & low) + (b * c & low);
    uint64_t high = a * c + (a * d >> 32) + (b * c >> 32) + (middle >> 32) + s[0] * ml + s[1] * mh;
    uint64_t l = (middle << 32 | (b * d & low)) + increment[1];
    s[0] = high + increment[0] + (l < increment[1]), s[1] = l;
    uint64_t x = s[0] ^ s[1];
    unsigned turn = (unsigned)(s[0] >> 58);
    return x >> turn | x << (-turn & 63);
}

static uint32_t draw32(instantft *t) {
    if (t->has_half) {
        t->has_half = 0;
        return t->half;
    }
    uint64_t x = draw64(t->random);
    t->half = (uint32_t)(x >> 32), t->has_half = 1;
    return (uint32_t)x;
}

static void sift(uint32_t *v, int at, int n) {
    for (int child; (child = 2 * at + 1) < n; at = child) {
        child += child + 1 < n && v[child + 1] > v[child];
        if (v[at] >= v[child]) return;
        uint32_t t = v[at];
        v[at] = v[child], v[child] = t;
    }
}

/* The order of an epoch: random keys that carry the number in their low bits, sorted (solvers/sgd.py). */
static void draw_order(instantft *t, uint32_t *order) {
    uint32_t low = 1;
    while (low < (uint32_t)t->T - 1) low = low << 1 | 1;
    for (int i = 0; i < t->T; i++) order[i] = (draw32(t) & ~low) | (uint32_t)i;
    for (int i = t->T / 2 - 1; i >= 0; i--) sift(order, i, t->T);
    for (int n = t->T - 1; n > 0; n--) {
        uint32_t last = order[n];
        order[n] = order[0], order[0] = last;
        sift(order, 0, n);
    }
    for (int i = 0; i < t->T; i++) order[i] &= low;
}

static void begin(instantft *t) {
    static const uint64_t state[2] = IFT_RANDOM_STATE;
    t->T = t->samples, t->spare = TRAINING;
    t->at = t->epoch = t->steps = 0;
    memcpy(t->random, state, sizeof state);
    t->has_half = 0;
    blank(t, adapter(t, !t->live), 1);
#if IFT_MOMENTUM
    memset(t->arena + IFT_AT_VELOCITY, 0, IFT_ADAPTER_BYTES);
#endif
}

/* Columns first … last-1 of tap k of m ≤ IFT_ROWS samples, decoded, rows IFT_PITCH apart. Returns the codec's next run. */
static int decode_columns(const instantft *t, const uint32_t *numbers, int m, int k, int first, int last, int run,
                          const float **rows) {
    float *to = scratch(t) + IFT_WS_COLUMNS;
    for (int r = 0; r < m; r++) rows[r] = to + (ptrdiff_t)r * IFT_PITCH;
    if (k > 0)
        return codec_decode_part(&t->plan, &t->codec, kept_record(t, 0), numbers, m, k, first, last, run, to, IFT_PITCH);
    decode_inputs(t, numbers, m, first, last, to, IFT_PITCH);
    return run;
}

/* One batch, a few columns of a tap and a few samples at a time: what is decoded and its part of A stay in a small cache.
 * Forward all of them, then backward all of them. Sums run in the order of skip_step. */
static double step(instantft *t, const uint32_t *order, int S) {
    const ift_plan *p = &t->plan;
    float *params = adapter(t, !t->live), *target = params;
    float *h = scratch(t) + IFT_WS_H, *dh = scratch(t) + IFT_WS_DH, *z = scratch(t) + IFT_WS_Z;
    int32_t *labels = (int32_t *)(void *)(scratch(t) + IFT_WS_LABELS);
    const float *rows[IFT_ROWS];
    const int ld = skip_lanes(S);
    int run = 0;
    for (int k = 0; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        const float *a = params + y->t[IFT_ROLE_SKIP_A].offset;
        for (int first = 0, last, next = run; first < y->Np; first = last, run = next) {
            last = first + IFT_COLUMNS < y->Np ? first + IFT_COLUMNS : y->Np;
            for (int s = 0; s < S; s += IFT_ROWS) {
                int m = S - s < IFT_ROWS ? S - s : IFT_ROWS;
                next = decode_columns(t, order + s, m, k, first, last, run, rows);
                dot(m, rows, 0, p->Rp, a + first, y->Np, last - first, first > 0, h + (ptrdiff_t)k * p->Rp * ld + s, ld);
            }
        }
    }
    for (int s = 0; s < S; s++)
        for (int first = 0, last; first < C; first = last) {
            last = first + IFT_COLUMNS < C ? first + IFT_COLUMNS : C;
            (void)decode_columns(t, order + s, 1, p->L, first, last, run, rows);
            skip_frozen(p, params, rows[0], first, last, ld, z + s);
        }
    skip_output(p, params, S, ld, h, z);
    for (int s = 0; s < ld; s++) labels[s] = s < S ? kept_labels(t)[order[s]] : -1;
    double loss = softmax_loss(C, S, ld, labels, -IFT_LR / (float)S, z, z + (ptrdiff_t)C * ld, &t->correct);
    if (!isfinite(loss)) return loss;
    memset(scratch(t) + IFT_WS_G, 0, (size_t)(S * t->plan.Cp) * sizeof(float)); /* what pads its rows goes into B's */
#if IFT_MOMENTUM
    target = floats(t, IFT_AT_VELOCITY);
    skip_velocity(p, params, target, IFT_MOMENTUM_VALUE, 0);
#endif
    skip_gradient(p, params, target, S, ld, h, dh, z, scratch(t) + IFT_WS_G);
    run = 0;
    for (int k = 0; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        float *a = target + y->t[IFT_ROLE_SKIP_A].offset;
        for (int first = 0, last, next = run; first < y->Np; first = last, run = next) {
            last = first + IFT_COLUMNS < y->Np ? first + IFT_COLUMNS : y->Np;
            for (int s = 0; s < S; s += IFT_ROWS) {
                int m = S - s < IFT_ROWS ? S - s : IFT_ROWS;
                next = decode_columns(t, order + s, m, k, first, last, run, rows);
                outer(m, rows, NULL, 0, p->Rp, dh + (ptrdiff_t)k * p->Rp * ld + s, ld, a + first, y->Np, last - first);
            }
        }
    }
#if IFT_MOMENTUM
    skip_velocity(p, params, target, IFT_MOMENTUM_VALUE, 1);
#endif
    return loss;
}

static int work(instantft *t) {
    uint32_t *order = (uint32_t *)(void *)(t->arena + IFT_AT_ORDER);
    if (t->at == 0) {
        draw_order(t, order);
        t->loss = 0, t->correct = 0;
    }
    int S = t->T - t->at < INSTANTFT_BATCH ? t->T - t->at : INSTANTFT_BATCH;
    double loss = step(t, order + t->at, S);
    t->steps++;
    if (!isfinite(loss)) {
        t->spare = EMPTY;
        return INSTANTFT_DIVERGED;
    }
    t->loss += loss, t->at += S;
    if (t->at < t->T) return INSTANTFT_MORE;
    t->at = 0, t->epoch++;
    t->report.loss = (float)(t->loss / t->T), t->report.right_after = (int32_t)t->correct;
    if (t->epoch < INSTANTFT_EPOCHS) return INSTANTFT_MORE;
    for (int64_t i = 0; i < t->plan.params; i++) /* the losses cannot tell about the very last update */
        if (!isfinite(adapter(t, !t->live)[i])) {
            t->spare = EMPTY;
            return INSTANTFT_DIVERGED;
        }
    t->spare = TRAINED;
    return INSTANTFT_DONE;
}
#else
#include "ridge.h"
#endif

int instantft_train(instantft *t, int steps) {
    if (steps < 1) return INSTANTFT_BAD_INPUT;
    if (t->spare == TRAINED) return INSTANTFT_DONE;
    if (t->spare != TRAINING) {
        if (!t->samples) return INSTANTFT_NO_SAMPLES;
        memset(&t->report, 0, sizeof t->report);
        begin(t);
    }
    int result = INSTANTFT_MORE;
    for (int i = 0; i < steps && result == INSTANTFT_MORE; i++) result = work(t);
    return result;
}

int instantft_commit(instantft *t) {
    if (t->spare != TRAINED) return INSTANTFT_NOTHING;
    t->live = !t->live, t->spare = PREVIOUS;
    return INSTANTFT_DONE;
}

int instantft_rollback(instantft *t) {
    if (t->spare == EMPTY) return INSTANTFT_NOTHING;
    if (t->spare == PREVIOUS) t->live = !t->live;
    t->spare = EMPTY;
    return INSTANTFT_DONE;
}

void instantft_status(const instantft *t, instantft_report *report) {
    *report = t->report;
    report->right_before = t->right;
    report->samples = t->samples, report->steps = t->steps, report->epochs = t->epoch;
}

/* ---- Storage --------------------------------------------------------------------------------------------------- */

/* In front of each slot; written last, so that a slot is whole or not there. Values in the order of the machine. */
typedef struct header {
    char magic[8];
    uint32_t version, model, sequence, bytes, payload, check; /* CRC-32 of the adapter, and of the header before it */
} header;
_Static_assert(sizeof(header) == 32, "the layout of a slot must be the same everywhere");

static uint32_t crc32(uint32_t crc, const void *data, size_t n) {
    const uint8_t *p = data;
    for (crc = ~crc; n; n--) {
        crc ^= *p++;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

static const char magic[2][8] = {{'I', 'F', 'T', 'A', 'D', 'A', 'P', 'T'}, {'I', 'F', 'T', 'S', 'A', 'M', 'P', 'L'}};
enum { ADAPTER, SAMPLES, SAMPLES_AT = 2, SAMPLES_BYTES = IFT_AT_SCRATCH - IFT_AT_CACHE };
_Static_assert(SAMPLES_BYTES + sizeof(header) == INSTANTFT_SAMPLES_SLOT, "records, samples and labels lie together");

/* 1: the slot holds all of what; 0: it does not; below 0: reading failed. */
static int whole(const instantft_storage *s, int slot, int what, header *head) {
    const uint32_t bytes = what == ADAPTER ? IFT_ADAPTER_BYTES : SAMPLES_BYTES;
    uint8_t part[64];
    if (s->read(s->user, slot, 0, head, sizeof *head)) return INSTANTFT_IO;
    if (memcmp(head->magic, magic[what], sizeof magic[what]) || head->version != 1 || head->model != IFT_MODEL_ID ||
        head->bytes != bytes || head->check != crc32(0, head, offsetof(header, check)))
        return 0;
    uint32_t crc = 0;
    for (uint32_t at = 0; at < bytes; at += sizeof part) {
        uint32_t n = bytes - at < sizeof part ? bytes - at : (uint32_t)sizeof part;
        if (s->read(s->user, slot, (uint32_t)sizeof *head + at, part, n)) return INSTANTFT_IO;
        crc = crc32(crc, part, n);
    }
    return crc == head->payload;
}

/* The header goes last: with it the slot is whole. */
static int write_slot(const instantft_storage *s, int slot, int what, uint32_t sequence, const void *from, uint32_t bytes) {
    header head = {.version = 1, .model = IFT_MODEL_ID, .sequence = sequence, .bytes = bytes};
    memcpy(head.magic, magic[what], sizeof head.magic);
    head.payload = crc32(0, from, bytes);
    head.check = crc32(0, &head, offsetof(header, check));
    if (s->erase(s->user, slot) || s->write(s->user, slot, sizeof head, from, bytes) ||
        s->write(s->user, slot, 0, &head, sizeof head))
        return INSTANTFT_IO;
    return INSTANTFT_DONE;
}

/* The slot with the newest whole adapter, or -1; a slot that cannot be read counts as empty. */
static int newest(const instantft_storage *s, header *head) {
    header other;
    int first = whole(s, 0, ADAPTER, head), second = whole(s, 1, ADAPTER, &other);
    if (second == 1 && (first != 1 || (int32_t)(other.sequence - head->sequence) > 0)) {
        *head = other;
        return 1;
    }
    return first == 1 ? 0 : -1;
}

int instantft_save(instantft *t, const instantft_storage *s) {
    header head;
    int slot = newest(s, &head);
    return write_slot(s, slot == 0, ADAPTER, slot < 0 ? 0 : head.sequence + 1, adapter(t, t->live), IFT_ADAPTER_BYTES);
}

int instantft_load(instantft *t, const instantft_storage *s) {
    header head;
    int slot = newest(s, &head);
    if (slot < 0) return INSTANTFT_NOT_FOUND;
    float *to = adapter(t, !t->live);
    t->spare = EMPTY;
    if (s->read(s->user, slot, sizeof head, to, IFT_ADAPTER_BYTES)) return INSTANTFT_IO;
    if (crc32(0, to, IFT_ADAPTER_BYTES) != head.payload) return INSTANTFT_IO;
    for (int64_t i = 0; i < t->plan.params; i++)
        if (!isfinite(to[i])) return INSTANTFT_NOT_FOUND;
    t->live = !t->live, t->spare = PREVIOUS;
    return INSTANTFT_DONE;
}

/* How many samples there are, and how many of them the frozen network knew, in the place of a sequence. */
int instantft_save_samples(instantft *t, const instantft_storage *s) {
    uint32_t count = (uint32_t)t->samples | (uint32_t)t->right << 16;
    return write_slot(s, SAMPLES_AT, SAMPLES, count, t->arena + IFT_AT_CACHE, SAMPLES_BYTES);
}

int instantft_load_samples(instantft *t, const instantft_storage *s) {
    header head;
    int found = whole(s, SAMPLES_AT, SAMPLES, &head), damaged = 0;
    if (found < 0) return found;
    if (!found) return INSTANTFT_NOT_FOUND;
    instantft_clear_samples(t);
    if (s->read(s->user, SAMPLES_AT, sizeof head, t->arena + IFT_AT_CACHE, SAMPLES_BYTES)) damaged = 1;
    else damaged = crc32(0, t->arena + IFT_AT_CACHE, SAMPLES_BYTES) != head.payload || (head.sequence & 0xffff) > CAPACITY;
    for (int32_t i = 0, label; i < CAPACITY; i++) label = kept_labels(t)[i], damaged |= label >= C;
    if (damaged) {
        instantft_clear_samples(t);
        return INSTANTFT_IO;
    }
    t->samples = (int32_t)(head.sequence & 0xffff), t->right = (int32_t)(head.sequence >> 16);
    return INSTANTFT_DONE;
}
