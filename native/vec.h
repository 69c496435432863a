/* Vectors: the one place that knows how wide a register is.
 *
 * IFT_VL floats a vector: 16, 8, 4 or 1, set by the build for each instruction set. Everything else is written with
 * GCC and Clang vector extensions, so that one source serves them all; with IFT_VL 1 it is plain C.
 */
#ifndef IFT_VEC_H
#define IFT_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && IFT_VL > 1
#include <immintrin.h>
#endif
#if defined(__aarch64__) && IFT_VL > 1
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if !defined(__has_feature)
#define __has_feature(x) 0
#endif
#if __has_feature(address_sanitizer)
#define UNROLL /* with a check at every index, the unrolled loops of a convolution take clang for ever */
#elif defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if IFT_VL == 1
typedef float vf;
typedef double vd;
typedef int32_t vi;
typedef uint32_t vu;
#else
typedef double vd __attribute__((vector_size(IFT_VL * 4)));
typedef float vf __attribute__((vector_size(IFT_VL * 4)));
typedef int32_t vi __attribute__((vector_size(IFT_VL * 4)));
typedef uint32_t vu __attribute__((vector_size(IFT_VL * 4)));
#endif
#if IFT_VL > 1
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
#endif

/* Registers decide how large a tile may be: 32 of them, or half as many. */
#if IFT_VL == 16 || defined(__aarch64__) || defined(__ARM_ARCH_7EM__) || defined(__riscv_flen)
#define IFT_MANY_REGISTERS 1
#else
#define IFT_MANY_REGISTERS 0
#endif

/* NEON multiplies by one lane of a register at no cost: four factors are one load, not four. */
#if IFT_VL == 4 && defined(__aarch64__)
#define IFT_BY_LANE 1
#else
#define IFT_BY_LANE 0
#endif

/* Functions that follow need all the registers: GCC 12 would copy them about. */
#if IFT_BY_LANE && !defined(__clang__)
#define ALL_REGISTERS _Pragma("GCC optimize(\"rename-registers\", \"no-schedule-insns\")")
#else
#define ALL_REGISTERS
#endif

#if defined(__clang__)
#define SHUFFLE(mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(mask, a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif

#if IFT_VL == 1
INLINE vf vload(const float *p) { return *p; } /* a memcpy would go byte by byte where alignment is strict */
INLINE void vstore(float *p, vf v) { *p = v; }
INLINE vf vset(float x) { return x; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; } /* b where either is NaN */
INLINE vf vfirst(float x) { return x; } /* the other lanes are zero */
INLINE float vsum(vf v) { return v; }
INLINE float vmaximum(vf v) { return v; }
INLINE vi vmask(vi comparison) { return -(comparison != 0); }
INLINE vf vselect(vi mask, vf yes, vf no) { return mask ? yes : no; }
INLINE int vcount(vi mask) { return mask != 0; }
#else
INLINE vf vload(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vstore(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vi vmask(vi comparison) { return comparison; } /* vectors compare to 0 and -1 already */
INLINE vf vselect(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE int vcount(vi mask) {
#if defined(__AVX512DQ__) && IFT_VL == 16
    return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
#elif defined(__AVX__) && IFT_VL == 8
    return __builtin_popcount((unsigned)_mm256_movemask_ps((__m256)mask));
#endif
    int n = 0;
    for (int i = 0; i < IFT_VL; i++) n -= mask[i];
    return n;
}
INLINE vf vset(float x) { return x - (vf){0}; }
INLINE vf vfirst(float x) { return (vf){x}; }
/* max(a, b), and vmax(zero, x) lets a NaN in x through. */
INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__) && IFT_VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && IFT_VL == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__) && IFT_VL == 4
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    vi take = a > b;
    return (vf)((take & (vi)a) | (~take & (vi)b));
#endif
}
INLINE v4 v4load(const float *p) {
    v4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void v4store(float *p, v4 v) { memcpy(p, &v, sizeof v); }

/* Sum of the quarters (halves) of a vector. */
INLINE v4 vfold(vf v) {
#if IFT_VL == 4
    return v;
#else
    v4 q[IFT_VL / 4];
    memcpy(q, &v, sizeof v);
#if IFT_VL == 8
    return q[0] + q[1];
#else
    return (q[0] + q[1]) + (q[2] + q[3]);
#endif
#endif
}
INLINE float vmaximum(vf v) { /* of lanes without NaN */
#if IFT_VL == 16 && defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float lane[IFT_VL];
    vstore(lane, v);
    for (int w = IFT_VL / 2; w; w /= 2)
        for (int l = 0; l < w; l++) lane[l] = lane[l] > lane[l + w] ? lane[l] : lane[l + w];
    return lane[0];
#endif
}
/* (sum a, sum b, sum c, sum d) */
INLINE v4 vsum4(vf a, vf b, vf c, vf d) {
    v4 x = vfold(a), y = vfold(b), z = vfold(c), w = vfold(d);
    v4 xy = SHUFFLE(i4, x, y, 0, 4, 1, 5) + SHUFFLE(i4, x, y, 2, 6, 3, 7); /* x02 y02 x13 y13 */
    v4 zw = SHUFFLE(i4, z, w, 0, 4, 1, 5) + SHUFFLE(i4, z, w, 2, 6, 3, 7);
    return SHUFFLE(i4, xy, zw, 0, 1, 4, 5) + SHUFFLE(i4, xy, zw, 2, 3, 6, 7);
}
#if IFT_BY_LANE
/* 16·n bytes times a scale; n is constant at every call. A table look-up spreads four bytes over a register. */
INLINE void vbytes(int n, const uint8_t *x, float scale, float *to) {
    uint8x16_t b[4];
    UNROLL for (int i = 0; i < n; i++) b[i] = vld1q_u8(x + 16 * i);
    UNROLL for (int i = 0; i < n; i++)
        UNROLL for (uint32_t k = 0; k < 4; k++) {
            const uint32x4_t first = {0x80808000, 0x80808001, 0x80808002, 0x80808003};
            const uint32x4_t at = vaddq_u32(first, vdupq_n_u32(4 * k));
            const float32x4_t v = vcvtq_f32_u32(vreinterpretq_u32_u8(vqtbl1q_u8(b[i], vreinterpretq_u8_u32(at))));
            vst1q_f32(to + 16 * i + 4 * k, vmulq_n_f32(v, scale));
        }
}
/* Here w to z, of which every product that follows needs one, the first na of a and nb of b (8 at most) must be in registers,
 * and p, q and n have their next values: a processor that runs in order stops where loads and sums lie between products. */
#define LOADED(w, x, y, z, p, q, n, a, na, b, nb)                                                                        \
    __asm__("" : "+w"(w), "+w"(x), "+w"(y), "+w"(z), "+r"(p), "+r"(q), "+r"(n) : OF_EIGHT(a, na), OF_EIGHT(b, nb))
#define OF_EIGHT(a, n)                                                                                                   \
    "w"(a[0]), "w"(a[1 < (n) ? 1 : 0]), "w"(a[2 < (n) ? 2 : 0]), "w"(a[3 < (n) ? 3 : 0]), "w"(a[4 < (n) ? 4 : 0]),       \
        "w"(a[5 < (n) ? 5 : 0]), "w"(a[6 < (n) ? 6 : 0]), "w"(a[7 < (n) ? 7 : 0])
/* acc + v·w[lane]; lane is a constant at every call */
INLINE vf vlane(vf acc, vf v, vf w, int lane) {
    switch (lane) {
    case 0: return (vf)vfmaq_laneq_f32((float32x4_t)acc, (float32x4_t)v, (float32x4_t)w, 0);
    case 1: return (vf)vfmaq_laneq_f32((float32x4_t)acc, (float32x4_t)v, (float32x4_t)w, 1);
    case 2: return (vf)vfmaq_laneq_f32((float32x4_t)acc, (float32x4_t)v, (float32x4_t)w, 2);
    default: return (vf)vfmaq_laneq_f32((float32x4_t)acc, (float32x4_t)v, (float32x4_t)w, 3);
    }
}
#endif
INLINE float vsum(vf v) {
    v4 q = vfold(v);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
#endif
#endif
