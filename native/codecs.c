/* The codecs: fp32, fp16, int8, and those of 4 and 2 bits (nf4, nf4-block64, nf4-hw, relu4, relu2), all told by runs of
 * values that share a scale. cache/codecs.py is the readable twin; vectors/ holds both to the same bytes.
 */
#include "codecs.h"

#include "vec.h"

#if IFT_BY_LANE
#include "neon.h"
#endif

#include <math.h>

/* Dettmers et al. 2023 (QLoRA), appendix E. */
static const float nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

/* The same in 16 bits of fraction, and the thresholds between them (nf4-hw, docs/hardware.md §3). */
static const int32_t nf4_levels16[16] = {-65536, -45626, -34411, -25881, -18641, -12109, -5967, 0,
                                         5215, 10547, 16129, 22146, 28882, 36872, 47380, 65536};
static const int32_t nf4_thresholds16[16] = {-55581, -40018, -30146, -22261, -15375, -9038, -2984, 2608,
                                             7881, 13338, 19137, 25514, 32877, 42126, 56458, 0};

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
    uint32_t nan = u > 0x7f800000u ? 0x7e00u : 0; /* must still be seen */
    u = u > 0x477fe000u ? 0x477fe000u : u; /* 65504 */
    uint32_t normal = (u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13;
    uint32_t tiny = bits_of(float_of(u) + 0.5f) - 0x3f000000u; /* the addition rounds to 2^-24 */
    return (uint16_t)(sign | (u < 0x38800000u ? tiny : normal) | nan);
}
INLINE float from_half(uint16_t h) {
    float f = float_of((uint32_t)(h & 0x7fffu) << 13) * 0x1p112f;
    uint32_t nan = (h & 0x7c00u) == 0x7c00u ? 0x7fc00000u : 0; /* infinities are never written */
    return float_of(bits_of(f) | nan | (uint32_t)(h & 0x8000u) << 16);
}

/* The least bfloat16 that is not below a nonnegative f. */
static uint16_t bf16_up(float f) { return (uint16_t)((bits_of(f) + 0xffffu) >> 16); }

/* i over n values, vector by vector; the last one is moved back to end with them, so that a group of 25 is two vectors
 * and no tail. What is done twice must come out the same. Fewer than a vector are left to a scalar loop. */
#define EACH(many) for (; i < n && n >= (many); i = i + (many) < n && i + 2 * (many) > n ? n - (many) : i + (many))
#define EACH_VECTOR EACH(IFT_VL)

/* The largest |x|, or the largest x where `positive` (at least 0). */
static float peak(const float *x, int n, int positive) {
    vf m = vset(0);
    int i = 0;
#if IFT_BY_LANE /* as below: vmaxnm takes the number where the other is none */
    float32x4_t most[4] = {(float32x4_t)m, (float32x4_t)m, (float32x4_t)m, (float32x4_t)m};
    EACH(16) {
        float32x4_t v[4];
        UNROLL for (int j = 0; j < 4; j++) v[j] = vld1q_f32(x + i + 4 * j);
        if (!positive) UNROLL for (int j = 0; j < 4; j++) v[j] = vabsq_f32(v[j]);
        UNROLL for (int j = 0; j < 4; j++) most[j] = vmaxnmq_f32(v[j], most[j]);
    }
    m = (vf)vmaxnmq_f32(vmaxnmq_f32(most[0], most[1]), vmaxnmq_f32(most[2], most[3]));
#endif
    EACH_VECTOR {
        vf v = vload(x + i);
        m = vmax(positive ? v : vmax(v, vset(0) - v), m);
    }
    float top = vmaximum(m);
    for (; i < n; i++) {
        float v = positive ? x[i] : fabsf(x[i]);
        top = v > top ? v : top;
    }
    return top;
}

static float nearest(float v) { /* ties to even, |v| < 2^22 */
    float magic = 12582912.0f;
    return (v + magic) - magic;
}

static const float smallest = 1e-30f; /* below it a group counts as zeros: 1/m must stay finite */

#if IFT_VL > 1
typedef uint32_t vwords __attribute__((vector_size(IFT_VL * 4)));
/* The low byte of every lane; each lane is below 128. */
INLINE void store_codes(uint8_t *code, vi c) {
#if IFT_VL == 16
    _mm_storeu_si128((__m128i *)(void *)code, _mm512_cvtepi32_epi8((__m512i)c));
#elif IFT_VL == 8
    __m256i w = (__m256i)c;
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storel_epi64((__m128i *)(void *)code, _mm_packus_epi16(words, words));
#else
    typedef uint8_t vbytes __attribute__((vector_size(IFT_VL)));
    vbytes b = __builtin_convertvector((vwords)c, vbytes);
    memcpy(code, &b, sizeof b);
#endif
}
#endif

/* Steps from 0: min(top, round(max(x, 0)·inv)), top 15 or 3 */
static void encode_steps(const float *x, int n, float inv, float top, uint8_t *code) {
    int i = 0;
#if IFT_VL > 1
    EACH_VECTOR {
        vf v = vmax(vload(x + i), vset(0)) * vset(inv);
        v = vset(0) - vmax(vset(0) - v, vset(-top));
        v = v + vset(12582912.0f); /* the rounded value is now in the low bits */
        store_codes(code + i, (vi)v & 15);
    }
#endif
    for (; i < n; i++) {
        float v = x[i] > 0 ? x[i] * inv : 0;
        v = nearest(v < top ? v : top);
        code[i] = (uint8_t)(int32_t)v;
    }
}

/* floor(x·2^16 + 1/2) in 24 bits. Every step is exact. */
static int32_t fixed_of(float x) {
    float y = x * 65536.0f;
    y = y < 8388607.0f ? y : 8388607.0f;
    y = y > -8388608.0f ? y : -8388608.0f;
    int32_t whole = (int32_t)y;
    float rest = y - (float)whole;
    return whole + (rest >= 0.5f) - (rest < -0.5f);
}

/* out[i] = floor((t[i]·m + 2^15) / 2^16)·unit for i < 16 and 0 ≤ m < 2^23, in 32 bits: m is 2^12·high + low. */
INLINE void times_scale(const int32_t *t, int32_t m, float unit, float *out) {
    for (int i = 0; i < 16; i += IFT_VL) {
        vi l;
        memcpy(&l, t + i, sizeof l);
        l = (l * (m >> 12) + ((l * (m & 4095) + 32768) >> 12)) >> 4;
#if IFT_VL == 1
        out[i] = (float)l * unit;
#else
        vstore(out + i, __builtin_convertvector(l, vf) * vset(unit));
#endif
    }
}

/* How many of the 15 thresholds t, behind which lies t[15] = INFINITY, lie below x·inv. */
static void encode_table(const float *t, const float *x, int n, float inv, uint8_t *code) {
    int i = 0;
#if IFT_VL == 16
    const __m512 table = _mm512_loadu_ps(t);
    EACH_VECTOR { /* binary search, four looks into the table */
        __m512 v = (__m512)(vload(x + i) * vset(inv));
        __m512i c = _mm512_setzero_si512();
        UNROLL for (int step = 8; step; step /= 2) {
            __m512i probe = _mm512_add_epi32(c, _mm512_set1_epi32(step - 1));
            __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(probe, table), _CMP_GT_OQ);
            c = _mm512_mask_add_epi32(c, above, c, _mm512_set1_epi32(step));
        }
        store_codes(code + i, (vi)c);
    }
#elif IFT_VL > 1
#if IFT_BY_LANE /* four vectors side by side: one alone would wait for every sum */
    EACH(16) {
        float32x4_t v[4];
        uint32x4_t c[4];
        UNROLL for (int j = 0; j < 4; j++) v[j] = vmulq_n_f32(vld1q_f32(x + i + 4 * j), inv), c[j] = vdupq_n_u32(0);
        for (int k = 0; k < 15; k++)
            UNROLL for (int j = 0; j < 4; j++) c[j] = vsubq_u32(c[j], vcgtq_f32(v[j], vdupq_n_f32(t[k])));
        uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(c[0]), vreinterpretq_u16_u32(c[1]));
        uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(c[2]), vreinterpretq_u16_u32(c[3]));
        vst1q_u8(code + i, vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
    }
#endif
    EACH_VECTOR {
        vf v = vload(x + i) * vset(inv);
        vi c = (vi){0};
        UNROLL for (int j = 0; j < 15; j++) c -= v > vset(t[j]);
        store_codes(code + i, c);
    }
#endif
    for (; i < n; i++) {
        float v = x[i] * inv;
        int32_t c = 0;
        for (int j = 0; j < 15; j++) c += v > t[j];
        code[i] = (uint8_t)c;
    }
}

#if IFT_BY_LANE
/* The 16 values of a run, level times scale, byte by byte. */
INLINE uint8x16x4_t value_bytes(const float *levels, float scale) {
    uint8x16_t v[4], even[2], odd[2];
    UNROLL for (int k = 0; k < 4; k++) v[k] = vreinterpretq_u8_f32(vmulq_n_f32(vld1q_f32(levels + 4 * k), scale));
    UNROLL for (int k = 0; k < 2; k++) {
        even[k] = vuzp1q_u8(v[2 * k], v[2 * k + 1]);
        odd[k] = vuzp2q_u8(v[2 * k], v[2 * k + 1]);
    }
    return (uint8x16x4_t){{vuzp1q_u8(even[0], even[1]), vuzp1q_u8(odd[0], odd[1]), vuzp2q_u8(even[0], even[1]),
                           vuzp2q_u8(odd[0], odd[1])}};
}
/* How many thresholds of nf4 lie below the 64 bins of (v + 125/128)·32, |v| <= 1, none of which holds two of them. */
static const uint8_t nf4_bins[64] = {0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4,
                                     4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 10, 10, 10, 11, 11, 11,
                                     12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 14, 14, 14, 15, 15, 15, 15, 15};
typedef struct bin16 {
    float32x4_t v[4];
    uint8x16_t least; /* of each v, its code or one less */
} bin16;
INLINE uint8x16_t narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}
INLINE bin16 find_bins(const float *x, float inv, uint8x16x4_t bins) {
    bin16 b;
    uint32x4_t at[4];
    UNROLL for (int j = 0; j < 4; j++) {
        b.v[j] = vmulq_n_f32(vld1q_f32(x + 4 * j), inv);
        at[j] = vcvtq_n_u32_f32(vaddq_f32(b.v[j], vdupq_n_f32(125.0f / 128)), 5); /* of NaN, and below 0: 0 */
    }
    b.least = vqtbl4q_u8(bins, narrow(at[0], at[1], at[2], at[3]));
    return b;
}
/* t: the four bytes of the thresholds */
INLINE void compare_bins(const bin16 *b, uint8x16x4_t t, uint8_t *code) {
    uint8x16_t byte[4], low[2], high[2];
    uint32x4_t above[4];
    UNROLL for (int j = 0; j < 4; j++) byte[j] = vqtbl1q_u8(t.val[j], b->least);
    UNROLL for (int k = 0; k < 2; k++) {
        low[k] = vzip1q_u8(byte[2 * k], byte[2 * k + 1]);
        high[k] = vzip2q_u8(byte[2 * k], byte[2 * k + 1]);
    }
    UNROLL for (int k = 0; k < 2; k++) {
        const uint16x8_t first = vreinterpretq_u16_u8(k ? high[0] : low[0]);
        const uint16x8_t second = vreinterpretq_u16_u8(k ? high[1] : low[1]);
        above[2 * k] = vcgtq_f32(b->v[2 * k], vreinterpretq_f32_u16(vzip1q_u16(first, second)));
        above[2 * k + 1] = vcgtq_f32(b->v[2 * k + 1], vreinterpretq_f32_u16(vzip2q_u16(first, second)));
    }
    vst1q_u8(code, vsubq_u8(b->least, narrow(above[0], above[1], above[2], above[3])));
}
/* Codes of n >= 16 values, 16 at a time, the last ones moved back to end with them; the bins of the next ones are found
 * meanwhile. */
INLINE void encode_bins(const float *t, const float *x, int n, float inv, uint8_t *code) {
    const uint8x16x4_t bins = vld1q_u8_x4(nf4_bins), bytes = value_bytes(t, 1.0f);
    bin16 b = find_bins(x, inv, bins);
    for (; n > 16; n -= 16) {
        const int step = n < 32 ? n - 16 : 16;
        x += step;
        const bin16 next = find_bins(x, inv, bins);
        compare_bins(&b, bytes, code);
        b = next, code += step;
    }
    compare_bins(&b, bytes, code);
}
#endif

static void encode_nf4(const float *x, int n, float inv, uint8_t *code) {
    float t[16];
    for (int j = 0; j < 15; j++) t[j] = (float)(((double)nf4_levels[j] + (double)nf4_levels[j + 1]) / 2);
    t[15] = INFINITY;
#if IFT_BY_LANE
    if (n >= 16) {
        encode_bins(t, x, n, inv, code);
        return;
    }
#endif
    encode_table(t, x, n, inv, code);
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

/* fp16 values of segments kept_first … L, one after the other */
static void encode_halves(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out) {
    out += c->kept_at;
    for (int k = c->kept_first; k <= p->L; k++) {
        int n;
        const float *x = row + segment_at(p, k, &n);
        for (int i = 0; i < n; i++) {
            uint16_t h = to_half(x[i]);
            memcpy(out + 2 * i, &h, 2);
        }
        out += 2 * n;
    }
}
INLINE void decode_half(const uint8_t *in, int n, float *x) {
    for (int i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        x[i] = from_half(h);
    }
}
/* Q8.16 in the low 24 bits of a word, with their sign. */
INLINE void decode_words(const uint8_t *in, int n, float *x) {
    for (int i = 0; i < n; i++) {
        uint32_t w;
        memcpy(&w, in + 4 * i, 4);
        x[i] = (float)((int32_t)(w & 0x7fffff) - (int32_t)(w & 0x800000)) * 0x1p-16f;
    }
}
/* Values first … last-1 of segment k, which is one of those kept. */
static void decode_kept(const ift_plan *p, const ift_codec *c, const uint8_t *in, int k, int first, int last,
                        float *x) {
    const int fixed = IFT_FIXED && c->fixed, size = fixed ? 4 : 2;
    in += c->kept_at + size * first;
    for (int j = c->kept_first, n; j < k; j++) (void)segment_at(p, j, &n), in += size * n;
    if (fixed) decode_words(in, last - first, x);
    else decode_half(in, last - first, x);
}

/* Two or four codes a byte, the first one low. */
static void pack_pairs(const uint8_t *restrict codes, int n, uint8_t *restrict out) {
    for (int i = 0; i < n; i++) {
        uint16_t two;
        memcpy(&two, codes + 2 * i, 2);
        out[i] = (uint8_t)(two | two >> 4);
    }
}
static void pack_fours(const uint8_t *restrict codes, int n, uint8_t *restrict out) {
    for (int i = 0; i < n; i++) {
        uint32_t four;
        memcpy(&four, codes + 4 * i, 4);
        four |= four >> 6;
        out[i] = (uint8_t)((four & 15) | (four >> 12 & 240));
    }
}

/* nf4-hw. Of a group the largest |v| comes from the largest x or from the smallest, for rounding keeps their order. And
 * v = floor(x·2^16 + 1/2) lies above an integer T where x·2^16 is T + 1/2 or more, which a float holds: above the float
 * before it. Clipping v changes no code. */
static void encode_fixed(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out, uint8_t *scratch) {
    memset(out, 0, (size_t)c->stride);
    for (const ift_run *u = c->runs; u < c->runs + c->runs_n; u++) {
        const float *x = row + u->at;
        int32_t high = fixed_of(peak(x, u->n, 1)), low = -fixed_of(-peak(x, u->n, 0)), m = high > low ? high : low;
        float t[16];
        if (m > 8388607) m = 8388607;
        memcpy(out + 4 * u->scale, &m, 4);
        times_scale(nf4_thresholds16, m, 1.0f, t);
        for (int j = 0; j < 15; j++) {
            float half = t[j] + 0.5f;
            t[j] = float_of(half > 0 ? bits_of(half) - 1 : bits_of(half) + 1);
        }
        t[15] = INFINITY;
        scratch[u->n] = 0;
        encode_table(t, x, u->n, 65536.0f, scratch);
        pack_pairs(scratch, (u->n + 1) / 2, out + c->codes_at + u->code / 2);
    }
    int n;
    const float *x = row + segment_at(p, p->L, &n);
    for (int i = 0; i < n; i++) {
        int32_t v = fixed_of(x[i]);
        memcpy(out + c->kept_at + 4 * i, &v, 4);
    }
}

void codec_encode(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out, uint8_t *scratch) {
    if (c->id == IFT_FP32) {
        memcpy(out, row, (size_t)p->row_width * sizeof *row);
        return;
    }
    if (IFT_FIXED && c->fixed) {
        encode_fixed(p, c, row, out, scratch);
        return;
    }
    for (int64_t i = c->bytes; i < c->stride; i++) out[i] = 0;
    if (c->kept_at >= 0) encode_halves(p, c, row, out);
    int r = 0;
    for (const ift_span *span = c->spans; span < c->spans + c->spans_n; span++) {
        const int bits = span->bits;
        uint8_t *to = out + c->codes_at + (int64_t)span->code * bits / 8;
        if (bits < 8) memset(scratch, c->empty, (size_t)span->codes_n);
        while (r < span->runs_to) {
            const int first = r, levels = c->runs[r].levels;
            const float top = bits == 8 ? 127.0f : levels ? 1.0f : bits == 4 ? 15.0f : 3.0f;
            float m = 0;
            for (; r < span->runs_to && c->runs[r].scale == c->runs[first].scale; r++) {
                float a = peak(row + c->runs[r].at, c->runs[r].n, levels == 0);
                m = a > m ? a : m;
            }
            int zero = !(m >= smallest);
            float scale = zero ? 0 : m / top, inv;
            if (c->short_scales) {
                uint16_t half = bf16_up(scale);
                memcpy(out + 2 * c->runs[first].scale, &half, 2);
                inv = zero ? 0 : 1.0f / float_of((uint32_t)half << 16);
            } else {
                inv = zero ? 0 : top / m;
                memcpy(out + 4 * c->runs[first].scale, &scale, 4);
            }
            for (const ift_run *u = c->runs + first; u < c->runs + r; u++) {
                int at = u->code - span->code;
                if (bits == 8) encode_int8(row + u->at, u->n, inv, (int8_t *)to + at);
                else if (levels) encode_nf4(row + u->at, u->n, inv, scratch + at);
                else encode_steps(row + u->at, u->n, inv, top, scratch + at);
            }
        }
        if (bits == 4) pack_pairs(scratch, span->codes_n / 2, to);
        if (bits == 2) pack_fours(scratch, span->codes_n / 4, to);
    }
}

/* Codes u->code + i … of a run, one by one. levels: 16 of them; NULL: a code is its own level. */
INLINE void decode_rest(const ift_run *u, const uint8_t *codes, int bits, const float *levels, float scale, float *out,
                        int i) {
    for (int at = (u->code + i) * bits; i < u->n; i++, at += bits) {
        int code = codes[at >> 3] >> (at & 7) & ((1 << bits) - 1);
        out[i] = (levels ? levels[code] : (float)code) * scale;
    }
}

#if IFT_VL == 16
static void decode_run(const ift_run *u, const uint8_t *codes, int bits, float scale, float *out, int room) {
    (void)room;
    decode_rest(u, codes, bits, u->levels ? nf4_levels : NULL, scale, out, 0);
}

/* Codes of a run of nf4-hw to the values they stand for, 16 to a block of 8 bytes. */
INLINE void decode_values(const ift_run *u, const uint8_t *codes, const float *values, float *out, int room) {
    (void)room;
    const __m512 table = _mm512_loadu_ps(values);
    codes += u->code / 2;
    for (int i = 0; i < u->n; i += 16, codes += 8) {
        __m512i pair = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(const void *)codes));
        pair = _mm512_or_si512(pair, _mm512_slli_epi64(pair, 28)); /* the permute sees the low four bits of a lane */
        __mmask16 here = (__mmask16)(u->n - i < 16 ? (1u << (u->n - i)) - 1 : 0xffffu);
        _mm512_mask_storeu_ps(out + i, here, _mm512_permutexvar_ps(pair, table));
    }
}

/* What values 16·half … of a block are multiplied by; few straddle two groups where groups are large. */
INLINE __m512 block_scale(const ift_block *b, int half, const float *scales) {
    __m512 s = _mm512_set1_ps(scales[b->a[half]]);
    return b->mask[half] ? _mm512_mask_mov_ps(s, b->mask[half], _mm512_set1_ps(scales[b->b[half]])) : s;
}

/* 4 bits: a 16-entry permute looks codes up, two more put low and high nibbles in turn. */
static void decode_blocks4(const ift_block *b, const ift_block *end, const uint8_t *codes, const float *scales,
                           float *row) {
    const vf steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512 tables[2] = {(__m512)steps, _mm512_loadu_ps(nf4_levels)};
    const __m512i left = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i right = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    for (; b < end; b++) {
        __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + b->code)));
        __m512 table = tables[b->levels];
        __m512 low = _mm512_permutexvar_ps(v, table), high = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table);
        __m512 s = block_scale(b, 0, scales), t = block_scale(b, 1, scales);
        _mm512_storeu_ps(row + b->at, _mm512_mul_ps(_mm512_permutex2var_ps(low, left, high), s));
        if (b->halves == 2) _mm512_storeu_ps(row + b->at + 16, _mm512_mul_ps(_mm512_permutex2var_ps(low, right, high), t));
    }
}

/* 2 bits: 16 codes are one word; each lane shifts its own to the bottom, and the permute sees the lowest four bits, of
 * which two are its neighbour's. */
static void decode_blocks2(const ift_block *b, const ift_block *end, const uint8_t *codes, const float *scales,
                           float *row) {
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (; b < end; b++) {
        int32_t word[2];
        memcpy(word, codes + b->code, sizeof word);
        __m512 low = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(word[0]), shift), steps);
        __m512 high = _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(word[1]), shift), steps);
        _mm512_storeu_ps(row + b->at, _mm512_mul_ps(low, block_scale(b, 0, scales)));
        if (b->halves == 2) _mm512_storeu_ps(row + b->at + 16, _mm512_mul_ps(high, block_scale(b, 1, scales)));
    }
}

/* All blocks of a record. */
static void decode_blocks(const ift_codec *c, const uint8_t *codes, const float *scales, float *row) {
    const ift_block *b = c->blocks;
    for (const ift_span *span = c->spans; span < c->spans + c->spans_n; span++) {
        const ift_block *end = c->blocks + span->blocks_to;
        if (span->bits == 4) decode_blocks4(b, end, codes, scales, row);
        else decode_blocks2(b, end, codes, scales, row);
        b = end;
    }
}
#else
#if IFT_BY_LANE
/* 32 codes of 4 bits. */
INLINE void unpack(const uint8_t *p, int odd, uint8x16_t code[2]) {
    const uint8x16_t high = vshrq_n_u8(vld1q_u8(p), 4), low = vandq_u8(vld1q_u8(p + odd), vdupq_n_u8(15));
    const uint8x16_t first = odd ? high : low, second = odd ? low : high;
    code[0] = vzip1q_u8(first, second), code[1] = vzip2q_u8(first, second);
}
/* 32 codes at a time: from a table for each of a value's four bytes, put together as they are stored. The codes of the next
 * turn are unpacked meanwhile. */
INLINE void look_up(uint8x16x4_t table, const uint8_t *p, int odd, int turns, float *out) {
    uint8x16_t code[2];
    unpack(p, odd, code);
    for (uint8_t *to = (uint8_t *)out; turns; to += 128) {
        uint8x16x4_t v[2];
        UNROLL for (int k = 0; k < 2; k++) UNROLL for (int j = 0; j < 4; j++) v[k].val[j] = vqtbl1q_u8(table.val[j], code[k]);
        turns--;
        if (turns) p += 16;
        unpack(p, odd, code);
        vst4q_u8(to, v[0]);
        vst4q_u8(to + 64, v[1]);
    }
}
static const float steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
INLINE int whole_turns(const ift_run *u, int room) {
    const int all = (u->n + 31) / 32;
    return all <= room / 32 ? all : room / 32;
}
/* Blocks of 32. What is written past the end of the run is put right as below. Returns how many values that was. */
INLINE int decode_many(const ift_run *u, const uint8_t *codes, const float *levels, float scale, float *out, int room) {
    const int turns = whole_turns(u, room);
    if (turns <= 0) return 0;
    const uint8x16x4_t table = value_bytes(levels ? levels : steps, scale);
    codes += u->code >> 1;
    if (u->code & 1) look_up(table, codes, 1, turns, out);
    else look_up(table, codes, 0, turns, out);
    return 32 * turns;
}
/* The same of two rows, `pitch` apart. */
INLINE int decode_pairs(const ift_run *u, const uint8_t *const codes[2], const float *levels, const float scale[2],
                        float *out, ptrdiff_t pitch, int room) {
    const int turns = whole_turns(u, room), at = u->code >> 1;
    if (turns <= 0) return 0;
    neon_look_up(levels ? levels : steps, scale, codes[0] + at, codes[1] + at, u->code & 1, turns, out, pitch);
    return 32 * turns;
}
#endif

/* Whole vectors of a run; what they write past it is put right by the next one, or by the gap's zeros. Returns how many
 * values that was. room: floats from out to the end of the row. */
#if IFT_VL > 1
INLINE int decode_vectors(const ift_run *u, const uint8_t *codes, int bits, const float *levels, float scale, float *out,
                          int room, int i) {
    const uint8_t *p = codes + ((u->code + i) * bits >> 3);
    const int first = u->code * bits & 7;
#if IFT_VL == 8
    const vwords shift = bits == 4 ? (vwords){0, 4, 8, 12, 16, 20, 24, 28} : (vwords){0, 2, 4, 6, 8, 10, 12, 14};
#else
    const vwords shift = bits == 4 ? (vwords){0, 4, 8, 12} : (vwords){0, 2, 4, 6};
#endif
    const vwords mask = (vwords){0} + (bits == 4 ? 15u : 3u);
    for (; i < u->n && i + IFT_VL <= room; i += IFT_VL, p += IFT_VL * bits / 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        vi index = (vi)((((vwords){0} + (uint32_t)(w >> first)) >> shift) & mask);
        vf v;
        if (!levels) {
            v = __builtin_convertvector(index, vf);
        } else {
#if IFT_VL == 8
            __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), (__m256i)index);
            __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), (__m256i)index);
            v = (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
            v = (vf){levels[index[0]], levels[index[1]], levels[index[2]], levels[index[3]]};
#endif
        }
        vstore(out + i, v * vset(scale));
    }
    return i;
}
#endif
/* Vectors want to know bits, and whether there are levels, when they are compiled. */
INLINE void decode_levels(const ift_run *u, const uint8_t *codes, int bits, const float *levels, float scale, float *out,
                          int room) {
    int i = 0;
#if IFT_BY_LANE
    if (bits == 4) i = decode_many(u, codes, levels, scale, out, room);
#endif
#if IFT_VL > 1
    i = decode_vectors(u, codes, bits, levels, scale, out, room, i);
#else
    (void)room;
#endif
    decode_rest(u, codes, bits, levels, scale, out, i);
}
static void decode_run(const ift_run *u, const uint8_t *codes, int bits, float scale, float *out, int room) {
    if (IFT_VL == 1) decode_levels(u, codes, bits, u->levels ? nf4_levels : NULL, scale, out, room);
    else if (bits == 2) decode_levels(u, codes, 2, NULL, scale, out, room);
    else if (u->levels) decode_levels(u, codes, 4, nf4_levels, scale, out, room);
    else decode_levels(u, codes, 4, NULL, scale, out, room);
}
INLINE void decode_values(const ift_run *u, const uint8_t *codes, const float *values, float *out, int room) {
    decode_levels(u, codes, 4, values, 1.0f, out, room);
}
#endif

static void decode_int8(const int8_t *code, int n, float scale, float *out, int room) {
    int i = 0;
#if IFT_VL == 16
    for (; i < n && i + 16 <= room; i += 16) {
        __m512i b = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(code + i)));
        vstore(out + i, (vf)_mm512_cvtepi32_ps(b) * vset(scale));
    }
#elif IFT_VL == 8
    for (; i < n && i + 8 <= room; i += 8) {
        __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(code + i)));
        vstore(out + i, (vf)_mm256_cvtepi32_ps(b) * vset(scale));
    }
#elif IFT_VL > 1
    typedef int8_t vchars __attribute__((vector_size(IFT_VL)));
    for (; i < n && i + IFT_VL <= room; i += IFT_VL) {
        vchars b;
        memcpy(&b, code + i, sizeof b);
        vstore(out + i, __builtin_convertvector(b, vf) * vset(scale));
    }
#else
    (void)room;
#endif
    for (; i < n; i++) out[i] = (float)code[i] * scale;
}

INLINE float scale_at(const ift_codec *c, const uint8_t *in, int i) {
    float scale;
    if (!c->short_scales) {
        memcpy(&scale, in + 4 * i, 4);
        return scale;
    }
    uint16_t half;
    memcpy(&half, in + 2 * i, 2);
    return float_of((uint32_t)half << 16);
}

/* One run; of nf4-hw, 16 values, which its codes then only choose from. What a damaged scale of it has beyond 23 bits is not
 * looked at. */
INLINE void decode_scaled(const ift_codec *c, const uint8_t *in, const ift_run *u, int bits, float *out, int room) {
    const uint8_t *codes = in + c->codes_at;
    float scale = scale_at(c, in, u->scale);
    if (bits == 8) decode_int8((const int8_t *)codes + u->code, u->n, scale, out, room);
    else decode_run(u, codes, bits, scale, out, room);
}
INLINE void decode_fixed(const ift_codec *c, const uint8_t *in, const ift_run *u, float *out, int room) {
    int32_t m;
    float values[16];
    memcpy(&m, in + 4 * u->scale, 4);
    times_scale(nf4_levels16, m & 0x7fffff, 0x1p-16f, values);
    decode_values(u, in + c->codes_at, values, out, room);
}
static void decode_one(const ift_codec *c, const uint8_t *in, const ift_run *u, int bits, float *out, int room) {
    if (IFT_FIXED && c->fixed) decode_fixed(c, in, u, out, room);
    else decode_scaled(c, in, u, bits, out, room);
}

#if IFT_BY_LANE
/* The same run of two records, codes of 4 bits: what one waits for the other makes use of. */
INLINE void decode_two(const ift_codec *c, const uint8_t *const in[2], const ift_run *u, float *out, ptrdiff_t pitch,
                       int room) {
    const float *levels = u->levels ? nf4_levels : NULL;
    const float scale[2] = {scale_at(c, in[0], u->scale), scale_at(c, in[1], u->scale)};
    const uint8_t *const codes[2] = {in[0] + c->codes_at, in[1] + c->codes_at};
    const int i = decode_pairs(u, codes, levels, scale, out, pitch, room);
    for (int s = 0; s < 2 && i < u->n; s++, out += pitch)
        decode_rest(u, codes[s], 4, levels, scale[s], out, decode_vectors(u, codes[s], 4, levels, scale[s], out, room, i));
}
#endif

/* Codes of 8, 4 and 2 bits, run by run or in blocks. */
static void decode_codes(const ift_codec *c, const uint8_t *in, float *row, int width) {
#if IFT_VL == 16
    if (c->blocks_n) {
        float scales[IFT_BLOCK_SCALES];
        for (int i = 0; i < c->scales_n; i++) scales[i] = scale_at(c, in, i);
        decode_blocks(c, in + c->codes_at, scales, row);
        return;
    }
#endif
    for (int s = 0, r = 0; s < c->spans_n; s++)
        for (; r < c->spans[s].runs_to; r++)
            decode_one(c, in, &c->runs[r], c->spans[s].bits, row + c->runs[r].at, width - c->runs[r].at);
}

void codec_decode(const ift_plan *p, const ift_codec *c, const uint8_t *in, float *row) {
    if (c->id == IFT_FP32) {
        memcpy(row, in, (size_t)p->row_width * sizeof *row);
        return;
    }
    decode_codes(c, in, row, (int)p->row_width);
    for (int k = 1; k <= p->L; k++) {
        int n;
        float *x = row + segment_at(p, k, &n);
        if (k >= c->kept_first) decode_kept(p, c, in, k, 0, n, x);
        for (int i = n; i < (int)ift_pad(n); i++) x[i] = 0;
    }
}

int codec_decode_part(const ift_plan *p, const ift_codec *c, const uint8_t *records, const uint32_t *numbers, int m, int k,
                      int first, int last, int run, float *out, ptrdiff_t pitch) {
    int n;
    const int at = (int)segment_at(p, k, &n), end = last < n ? last : n;
#define RECORD(s) (records + (size_t)numbers[s] * (size_t)c->stride)
    if (c->id == IFT_FP32) {
        for (int s = 0; s < m; s++)
            memcpy(out + s * pitch, RECORD(s) + 4 * (at + first), (size_t)(end - first) * sizeof *out);
    } else if (k >= c->kept_first) {
        for (int s = 0; s < m; s++) decode_kept(p, c, RECORD(s), k, first, end, out + s * pitch);
    } else {
        const ift_span *span = c->spans;
        for (; run < c->runs_n && c->runs[run].at < at + end; run++) {
            ift_run u = c->runs[run];
            int skip = at + first - u.at, over = u.at + u.n - (at + end);
            if (skip >= u.n) continue;
            if (skip > 0) u.at += skip, u.code += skip, u.n -= skip;
            if (over > 0) u.n -= over;
            while (run >= span->runs_to) span++;
            const int bits = span->bits, room = (int)pitch - (u.at - at - first);
            float *to = out + u.at - at - first;
            int s = 0;
#if IFT_BY_LANE
            for (; bits == 4 && !(IFT_FIXED && c->fixed) && s + 2 <= m; s += 2)
                decode_two(c, (const uint8_t *const[2]){RECORD(s), RECORD(s + 1)}, &u, to + s * pitch, pitch, room);
#endif
            for (; s < m; s++) decode_one(c, RECORD(s), &u, bits, to + s * pitch, room);
            if (over > 0) break;
        }
    }
#undef RECORD
    for (int s = 0; s < m; s++)
        for (int i = end; i < last; i++) out[s * pitch + i - first] = 0;
    return run;
}
