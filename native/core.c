/* One instruction set's core: compiled once for each, with IFT_VL and IFT_CORE set by the build.
 *
 *   vec.h       registers              lanes.h    kernels with samples in the lanes (a template)
 *   linalg.h    kernels on rows        panels.h   a batch cut into lanes
 *   frozen.h    records                loss.h     softmax, cross-entropy
 *   skip.h      the step that needs only records
 *   general.h   the step whose gradients run through layers
 *   dense.h     the closed form's products and factor (a template)
 *
 * Here: filling the cache, whole epochs (Algorithm 1 of Skip2-LoRA), prediction.
 */
#include "instantft.h"

#include "codecs.h"
#include "frozen.h"
#include "general.h"
#include "skip.h"

#define D float
#define DV vf
#define DL IFT_VL
#define DN(name) name##_f
#if IFT_VL > 4
#define DT transpose_w
#elif IFT_VL == 4
#define DT transpose_4
#endif
#include "dense.h"
#undef DT
#undef D
#undef DV
#undef DL
#undef DN
#define D double
#define DV vd
#define DL (IFT_VL > 1 ? IFT_VL / 2 : 1)
#define DN(name) name##_d
#include "dense.h"

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
        int64_t first = slots[i];
        int beside = codec->id == IFT_FP32 && codec->stride == p->row_width * (int64_t)sizeof *rows;
        for (int s = 1; s < m; s++) beside &= slots[i + s] == first + s;
        if (beside) { /* records lie in the store as they are computed */
            frozen_rows(p, frozen, at, m, (float *)(void *)(store + first * codec->stride), ws);
            continue;
        }
        frozen_rows(p, frozen, at, m, rows, ws);
        for (int s = 0; s < m; s++)
            codec_encode(p, codec, rows + s * p->row_width, store + slots[i + s] * codec->stride, scratch);
    }
}

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
    /* what fits near caches is not fetched ahead: the asking itself would cost 5 % of a small network's step */
    int far = T * (job->x_pitch + p->row_width) * (int64_t)sizeof(float) > 1 << 20;
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
                    batch = general_step(p, job, S, c.x + b, c.rec + b, order + i + b, labels, &correct[e]);
                } else {
                    int64_t after = i + b + S;
                    const float **ahead = far && T - after >= S ? next : NULL; /* a full batch follows in this epoch */
                    if (ahead) look_ahead(job, order + after, S, c.rec + b, ahead);
                    batch = skip_step(p, job, S, c.x + b, c.rec + b, ahead, ahead ? ahead + S : NULL, order + i + b, labels,
                                      &correct[e]);
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

const ift_core IFT_CORE = {IFT_NAME, fold, records, fill, forward, epochs, codec_encode, codec_decode,
                           gram_f, gram_d, inverse_factor_f, inverse_factor_d, inverse_blocks_f, inverse_blocks_d,
                           combine_f, combine_d, fma_loop};
