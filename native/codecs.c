/* The codecs: fp32, fp16, int8, and the 4-bit family (nf4, nf4-block64, relu4), all told by runs of values that share
 * a scale. cache/codecs.py is the readable twin; vectors/ holds both to the same bytes.
 */
#include "codecs.h"

#include "vec.h"

#include <math.h>

/* Dettmers et al. 2023 (QLoRA), appendix E. */
static const float nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}
static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* float32 to binary16, nearest even, clipped to the largest finite value. Written without branches on the value's
 * class beyond one select, so that compilers vectorise the loop around it. */
INLINE uint16_t to_half(float f) {
    uint32_t u = bits_of(f), sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    u = u > 0x477fe000u ? 0x477fe000u : u; /* 65504 */
    uint32_t normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(u) + 0.5f) - 0x3f000000u; /* the addition rounds to 2^-24 */
    return (uint16_t)(sign | (u < 0x38800000u ? tiny : normal));
}
INLINE float from_half(uint16_t h) {
    float f = float_of((uint32_t)(h & 0x7fffu) << 13) * 0x1p112f;
    return float_of(bits_of(f) | (uint32_t)(h & 0x8000u) << 16);
}

/* The least bfloat16 that is not below a nonnegative f. */
static uint16_t bf16_up(float f) { return (uint16_t)((bits_of(f) + 0xffffu) >> 16); }

static float absmax(const float *x, int n) {
    float m = 0;
    for (int i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        m = a > m ? a : m;
    }
    return m;
}
static float maximum(const float *x, int n) {
    float m = 0;
    for (int i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

static float nearest(float v) { /* ties to even, |v| < 2^22 */
    float magic = 12582912.0f;
    return (v + magic) - magic;
}

static const float smallest = 1e-30f; /* below it a group counts as zeros: 1/m must stay finite */

static void encode_steps(const float *x, int n, float inv, uint8_t *code) {
    for (int i = 0; i < n; i++) {
        float v = x[i] > 0 ? x[i] * inv : 0;
        v = nearest(v < 15 ? v : 15);
        code[i] = (uint8_t)(int32_t)v;
    }
}

static void encode_nf4(const float *x, int n, float inv, uint8_t *code) {
    float t[15];
    for (int j = 0; j < 15; j++) t[j] = (float)(((double)nf4_levels[j] + (double)nf4_levels[j + 1]) / 2);
    for (int i = 0; i < n; i++) {
        float v = x[i] * inv;
        int32_t c = 0;
        UNROLL for (int j = 0; j < 15; j++) c += v > t[j];
        code[i] = (uint8_t)c;
    }
}

static void encode_int8(const float *x, int n, float inv, int8_t *code) {
    for (int i = 0; i < n; i++) {
        float v = nearest(x[i] * inv);
        v = v > 127 ? 127 : v;
        v = v < -127 ? -127 : v;
        code[i] = (int8_t)(int32_t)v;
    }
}

static int64_t segment_at(const ift_plan *p, int k, int *n) { /* k = 1 … L; L is c */
    if (k == p->L) {
        *n = p->C;
        return p->output_at;
    }
    *n = p->layer[k].N;
    return p->layer[k].tap;
}

/* fp16 values of segments half_first … L, one after the other */
static void encode_halves(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out) {
    out += c->half_at;
    for (int k = c->half_first; k <= p->L; k++) {
        int n;
        const float *x = row + segment_at(p, k, &n);
        for (int i = 0; i < n; i++) {
            uint16_t h = to_half(x[i]);
            memcpy(out + 2 * i, &h, 2);
        }
        out += 2 * n;
    }
}
static void decode_halves(const ift_plan *p, const ift_codec *c, const uint8_t *in, float *row) {
    in += c->half_at;
    for (int k = c->half_first; k <= p->L; k++) {
        int n;
        float *x = row + segment_at(p, k, &n);
        for (int i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, in + 2 * i, 2);
            x[i] = from_half(h);
        }
        in += 2 * n;
    }
}

void codec_encode(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out, uint8_t *scratch) {
    if (c->id == IFT_FP32) {
        memcpy(out, row, (size_t)p->row_width * sizeof *row);
        return;
    }
    for (int64_t i = c->bytes; i < c->stride; i++) out[i] = 0;
    if (c->half_at >= 0) encode_halves(p, c, row, out);
    if (!c->codes_n) return;
    int four = c->id != IFT_INT8;
    if (four) memset(scratch, c->id == IFT_NF4_BLOCK64 ? 7 : 0, (size_t)c->codes_n);
    for (int r = 0; r < c->runs_n;) {
        int next = r;
        float m = 0;
        for (; next < c->runs_n && c->runs[next].scale == c->runs[r].scale; next++) {
            const ift_run *u = &c->runs[next];
            float a = four && u->levels == 0 ? maximum(row + u->at, u->n) : absmax(row + u->at, u->n);
            m = a > m ? a : m;
        }
        float scale = 0, inv = 0;
        int zero = !(m >= smallest);
        if (c->id == IFT_RELU4) {
            uint16_t half = zero ? 0 : bf16_up(c->runs[r].levels ? m : m / 15.0f);
            memcpy(out + 2 * c->runs[r].scale, &half, 2);
            scale = float_of((uint32_t)half << 16);
            inv = zero ? 0 : 1.0f / scale;
        } else {
            float top = four ? 1.0f : 127.0f;
            scale = zero ? 0 : m / top;
            inv = zero ? 0 : top / m;
            memcpy(out + 4 * c->runs[r].scale, &scale, 4);
        }
        for (; r < next; r++) {
            const ift_run *u = &c->runs[r];
            if (!four) encode_int8(row + u->at, u->n, inv, (int8_t *)out + c->codes_at + u->code);
            else if (u->levels) encode_nf4(row + u->at, u->n, inv, scratch + u->code);
            else encode_steps(row + u->at, u->n, inv, scratch + u->code);
        }
    }
    if (four)
        for (int i = 0; i < c->codes_n / 2; i++)
            out[c->codes_at + i] = (uint8_t)(scratch[2 * i] | scratch[2 * i + 1] << 4);
}

#if IFT_VL == 16
/* 16 codes a step: one 16-entry permute looks them all up. Writes past a run are put right by the next one. */
static void decode_run(const ift_run *u, const uint8_t *codes, float scale, float *out) {
    typedef uint32_t vu __attribute__((vector_size(64)));
    typedef uint32_t hu __attribute__((vector_size(32)));
    const vu shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
    const vf steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vf table = (u->levels ? vload(nf4_levels) : steps) * vset(scale);
    const uint8_t *p = codes + (u->code >> 1);
    int odd = (u->code & 1) * 4;
    for (int i = 0; i < u->n; i += 16, p += 8) {
        uint64_t w, next = p[8];
        memcpy(&w, p, 8);
        w = odd ? w >> 4 | next << 60 : w;
        hu low = (hu){0} + (uint32_t)w, high = (hu){0} + (uint32_t)(w >> 32);
        union { hu half[2]; vu all; } both = {{low, high}};
        vi index = (vi)(both.all >> shift);
        vstore(out + i, (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table));
    }
}
#else
static void decode_run(const ift_run *u, const uint8_t *codes, float scale, float *out) {
    float table[16];
    for (int j = 0; j < 16; j++) table[j] = (u->levels ? nf4_levels[j] : (float)j) * scale;
    const uint8_t *p = codes + (u->code >> 1);
    int i = 0, n = u->n;
    if (u->code & 1) out[i++] = table[*p++ >> 4];
    for (; i + 1 < n; i += 2, p++) {
        out[i] = table[*p & 15];
        out[i + 1] = table[*p >> 4];
    }
    if (i < n) out[i] = table[*p & 15];
}
#endif

void codec_decode(const ift_plan *p, const ift_codec *c, const uint8_t *in, float *row) {
    if (c->id == IFT_FP32) {
        memcpy(row, in, (size_t)p->row_width * sizeof *row);
        return;
    }
    for (int r = 0; r < c->runs_n; r++) {
        const ift_run *u = &c->runs[r];
        float scale;
        if (c->id == IFT_RELU4) {
            uint16_t half;
            memcpy(&half, in + 2 * u->scale, 2);
            scale = float_of((uint32_t)half << 16);
        } else {
            memcpy(&scale, in + 4 * u->scale, 4);
        }
        if (c->id == IFT_INT8) {
            const int8_t *code = (const int8_t *)in + c->codes_at + u->code;
            for (int i = 0; i < u->n; i++) row[u->at + i] = (float)code[i] * scale;
        } else {
            decode_run(u, in + c->codes_at, scale, row + u->at);
        }
    }
    if (c->half_at >= 0) decode_halves(p, c, in, row);
    for (int k = 1; k <= p->L; k++) {
        int n;
        float *x = row + segment_at(p, k, &n);
        for (int i = n; i < (int)ift_pad(n); i++) x[i] = 0;
    }
}
