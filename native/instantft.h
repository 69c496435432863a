/* instantft: the native core. Adapts a frozen network from cached activations.
 *
 * Is: plain C11 on memory the caller owns. A plan resolves every shape and offset once; the functions of a core then
 * run without decisions. No allocation, no globals, no input or output, no dependency but libm, no asserts.
 * Is not: a general training framework. Networks are those of ift_layer_desc: conv or fc, then batch norm, ReLU and
 * max pooling where asked for.
 *
 * Letters: L layers, N and M input and output width of a layer, R rank, C outputs, T samples, E epochs, B batch size.
 * A row is one sample's values, padded with zeros to IFT_PAD floats. All offsets count floats unless they say bytes.
 */
#ifndef INSTANTFT_H
#define INSTANTFT_H

#include "instantft_config.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { IFT_PAD = 16, IFT_CHUNK = 64 };

enum ift_status {
    IFT_OK = 0,
    IFT_BAD_NETWORK = 1,  /* the layers do not fit together */
    IFT_BAD_ARGUMENT = 2, /* an argument outside its range */
};

enum ift_kind { IFT_FC = 0, IFT_CONV = 1 };

/* What a layer computes and trains: Skip2-LoRA's Table 1 as bits. */
enum ift_train {
    IFT_W = 1,             /* gW */
    IFT_B = 2,             /* gb */
    IFT_X = 4,             /* gx, for the layers below */
    IFT_GAMMA = 8,
    IFT_BETA = 16,
    IFT_BATCH_STATS = 32,  /* batch norm by the statistics of the batch */
    IFT_LAYER_ADAPTER = 64, /* A, B from this layer's input to its linear output */
    IFT_SKIP_ADAPTER = 128, /* A, B from this layer's input to the logits */
};

typedef struct ift_layer_desc {
    int32_t kind, out, kh, kw, ph, pw, batch_norm, relu, pool;
    int32_t train; /* bits of ift_train */
} ift_layer_desc;

/* A matrix inside the parameter buffer; rows == 0: absent. */
typedef struct ift_tensor {
    int64_t offset;
    int32_t rows, cols, pitch;
} ift_tensor;

enum ift_role {
    IFT_ROLE_W, IFT_ROLE_BIAS, IFT_ROLE_GAMMA, IFT_ROLE_BETA, IFT_ROLE_MEAN, IFT_ROLE_VAR,
    IFT_ROLE_LAYER_A, /* (R, N): A transposed, so that vectors run along N */
    IFT_ROLE_LAYER_B, /* (R, M) */
    IFT_ROLE_SKIP_A, IFT_ROLE_SKIP_B,
    IFT_ROLES
};

typedef struct ift_layer {
    ift_layer_desc d;
    int32_t ic, ih, iw;  /* input; a vector is (N, 1, 1) */
    int32_t oh, ow;      /* linear output, before pooling */
    int32_t qh, qw;      /* after pooling */
    int32_t N, M, Np, Mp, n_out;
    ift_tensor t[IFT_ROLES];
    int64_t tap;         /* where x^k starts in a record row; -1 for x^0 */
    /* workspace of the general path */
    int64_t x_rows, z_rows, g_rows, xhat, wt, h, gh, bn;
    int64_t x_lanes, z_lanes, gz_lanes, q_lanes, gq_lanes;
    int32_t gx_pad;      /* zero columns on either side of gz_lanes, so that gx is a plain convolution */
} ift_layer;

typedef struct ift_plan {
    int32_t L, Rp, C, Cp, batch, batch_p; /* batch_p: batch rounded up to lanes */
    int32_t first;          /* first layer the general path runs; below it records serve */
    int32_t skip_first;     /* first tap with a skip adapter; L if none */
    int32_t general;        /* gradients run through at least one layer (else adapters only) */
    int32_t layer_adapters;
    int64_t params;         /* floats of a parameter buffer (and of gradients, velocities) */
    int64_t gain, bias;     /* of the output, in the parameter buffer */
    int64_t row_width;      /* floats of a record row */
    int64_t output_at;      /* where c starts in a record row */
    int64_t input_width;
    int64_t workspace;      /* floats */
    int64_t ws_pack, ws_lanes_a, ws_lanes_b, ws_rows, ws_decoded, ws_bytes, ws_codes, ws_chunk, ws_pointers;
    int64_t ws_h, ws_dh, ws_z, ws_g;
    ift_layer layer[IFT_MAX_LAYERS];
} ift_plan;

/* Resolve shapes and offsets. batch: largest batch the plan will see. Returns an ift_status. */
int ift_plan_init(ift_plan *plan, const ift_layer_desc *layers, int32_t L, const int32_t input[3], int32_t rank,
                  int32_t batch);

/* Codecs: how a record row is written into bytes. */
enum ift_codec_id { IFT_FP32, IFT_FP16, IFT_INT8, IFT_NF4, IFT_NF4_BLOCK64, IFT_RELU4, IFT_RELU2, IFT_NF4_HW, IFT_CODECS };

/* Values that lie together in a row and share a scale; consecutive runs may share one. */
typedef struct ift_run {
    int32_t at;    /* first value in the row */
    int32_t n;
    int32_t scale; /* index of its scale */
    int32_t code;  /* index of its first code, as if all were as wide as its own */
    int32_t levels; /* 0: unsigned steps, 1: NF4 */
} ift_run;

/* Consecutive runs whose codes have one width and follow each other. */
typedef struct ift_span {
    int32_t bits;              /* of a code: 8, 4 or 2 */
    int32_t runs_to, blocks_to; /* past its last run and block; it starts where the one before ends */
    int32_t code, codes_n;     /* index of its first code, and how many; whole bytes */
} ift_span;

/* The same as runs for decoders with wide vectors: 32 values from a multiple of 16 on, each half of them under at most two
 * scales (lanes in `mask` have scale b, the others a). */
typedef struct ift_block {
    int32_t at;   /* first value in the row */
    int32_t code; /* byte of its first code */
    int16_t a[2], b[2];
    uint16_t mask[2];
    int16_t halves; /* 1: only the first 16 are there */
    int16_t levels;
} ift_block;

typedef struct ift_codec {
    int32_t id, spans_n, runs_n, blocks_n, scales_n;
    int32_t short_scales, empty; /* 1: scales are bfloat16; code of level 0 */
    int32_t fixed;               /* 1: scales are integers, groups and segments padded (nf4-hw) */
    int64_t bytes, stride, codes_at, kept_at; /* bytes; kept_at: where values kept whole start */
    int32_t kept_first;                       /* first segment kept: in binary16, of nf4-hw in 32 bits; past L: none */
    ift_span spans[IFT_MAX_LAYERS];
    const ift_run *runs;
    const ift_block *blocks; /* blocks_n 0: groups are too small or too many, only runs serve */
} ift_codec;

enum { IFT_BLOCK_SCALES = 256 }; /* scales a blocked codec may have */

/* Bytes of memory (8-byte aligned) that ift_codec_init needs for this network and codec; it stays the codec's. */
int64_t ift_codec_memory(const ift_plan *plan, int32_t id);
int ift_codec_init(ift_codec *codec, const ift_plan *plan, int32_t id, void *memory);

/* What is minimised, of logits z and targets t of a sample of weight w:
 *   IFT_SOFTMAX  w·(log Σ exp z − Σ t·z)                      t sums to 1
 *   IFT_SIGMOID  w·Σ (log(1 + exp z) − t·z) / C               t from 0 to 1
 *   IFT_SQUARED  w·Σ (z − t)² / C */
enum ift_loss { IFT_SOFTMAX = 0, IFT_SIGMOID = 1, IFT_SQUARED = 2 };

/* One fine-tuning: everything the epochs need. Pointers stay the caller's. */
typedef struct ift_job {
    float *params;
    float *grads;        /* general path only */
    float *velocity;     /* momentum only, else NULL */
    const float *frozen; /* parameters with batch norm folded in (ift_core.fold) */
    const float *x;      /* rows, x_pitch floats apart */
    int64_t x_pitch;
    const int32_t *labels;
    const int64_t *numbers;
    const ift_codec *codec; /* NULL: no cache */
    uint8_t *store;         /* capacity records, codec->stride bytes apart, 64 readable bytes behind the last */
    int64_t *owner;         /* sample number in each slot, -1 if empty */
    int64_t capacity;
    float *workspace;       /* plan->workspace floats, 64-byte aligned */
    float lr, momentum;
    int64_t hits, misses;
    const float *targets; /* (rows of x, C), tight; NULL: labels as one-hot, all of weight 1, and IFT_SOFTMAX */
    const float *weights; /* a row of x each; with targets only */
    int32_t loss;         /* an ift_loss; with targets only */
} ift_job;

/* One instruction set's functions. */
typedef struct ift_core {
    const char *name;
    /* frozen = params with frozen batch norm folded into W and b. */
    void (*fold)(const ift_plan *, const float *params, float *frozen);
    /* Records of n samples: rows[i] = row i, plan->row_width floats apart. x[i] points at sample i. */
    void (*records)(const ift_plan *, const float *frozen, const float *x, int64_t x_pitch, int64_t n, float *rows,
                    float *workspace);
    /* Records of the samples x[order[i]], encoded into slot slots[i] of store. */
    void (*fill)(const ift_plan *, const float *frozen, const float *x, int64_t x_pitch, const int64_t *order,
                 const int64_t *slots, int64_t n, const ift_codec *, uint8_t *store, float *workspace);
    /* Logits (n, C), tight, with the adapters in params. */
    void (*forward)(const ift_plan *, const float *params, const float *frozen, const float *x, int64_t x_pitch,
                    int64_t n, float *logits, float *workspace);
    /* E whole epochs; order (E, T). loss, correct: (E,) sums. Returns the 1-based step that diverged, or 0. */
    int64_t (*epochs)(const ift_plan *, ift_job *, const int32_t *order, int64_t E, int64_t T, double *loss,
                      int64_t *correct);
    void (*encode)(const ift_plan *, const ift_codec *, const float *row, uint8_t *out, uint8_t *scratch);
    void (*decode)(const ift_plan *, const ift_codec *, const uint8_t *in, float *row);
    /* The closed form, in float and in double (dense.h). Matrices are rows, ld apart; of symmetric ones only the lower
     * triangle is read and written.
     * gram: G[i][j] = x_i·x_j, or G[i][j] += x_i·x_j, for first ≤ i < last and j ≤ i; x_i has K values, pitch apart.
     * inverse_factor: V = L⁻¹ where L·Lᵀ = G (n, n); G is used up, V must be zero above its diagonal. Returns 0, or the
     *   1-based row at which G turned out not to be positive definite or not finite.
     * inverse_blocks: the blocks of G⁻¹ = VᵀV for rows starts[b] … starts[b+1]−1, one tight block after the other.
     * combine: G[i][j] = d_i·d_j·Σ_p w_p·part_p[r_i][r_j] + c_i·c_j for j ≤ i < n; r = rows, or 0 … n−1 where they are
     *   NULL; the parts' rows are ld apart. */
    void (*gram_f)(const float *x, int64_t pitch, int64_t K, int64_t first, int64_t last, int add, float *g, int64_t ldg,
                   void *workspace);
    void (*gram_d)(const double *x, int64_t pitch, int64_t K, int64_t first, int64_t last, int add, double *g,
                   int64_t ldg, void *workspace);
    int64_t (*inverse_factor_f)(float *g, int64_t ldg, float *v, int64_t ldv, int64_t n, void *workspace);
    int64_t (*inverse_factor_d)(double *g, int64_t ldg, double *v, int64_t ldv, int64_t n, void *workspace);
    void (*inverse_blocks_f)(const float *v, int64_t ldv, int64_t n, const int64_t *starts, int64_t count, float *out,
                             void *workspace);
    void (*inverse_blocks_d)(const double *v, int64_t ldv, int64_t n, const int64_t *starts, int64_t count, double *out,
                             void *workspace);
    void (*combine_f)(const float *const *part, const float *w, int64_t count, int64_t ld, const int64_t *rows,
                      const float *d, const float *c, int64_t n, float *g, int64_t ldg);
    void (*combine_d)(const double *const *part, const double *w, int64_t count, int64_t ld, const int64_t *rows,
                      const double *d, const double *c, int64_t n, double *g, int64_t ldg);
    /* About n vector fused multiply-adds in registers; returns how many floating-point operations that was. */
    double (*fma_loop)(int64_t n, float *sink);
} ift_core;

/* The cores this build and this processor can run, best first; NULL past the end. */
const ift_core *ift_core_at(int32_t i);
/* The core of that name, or NULL. */
const ift_core *ift_core_named(const char *name);

static inline int64_t ift_pad(int64_t n) { return (n + IFT_PAD - 1) / IFT_PAD * IFT_PAD; }

#ifdef __cplusplus
}
#endif
#endif
