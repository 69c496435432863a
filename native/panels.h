/* Panels: a batch cut into groups of samples that lie side by side in vectors, and the lane kernels of lanes.h for each
 * width a panel can have. */
#ifndef IFT_PANELS_H
#define IFT_PANELS_H

#include "instantft.h"
#include "vec.h"

#if IFT_BY_LANE
#include "neon.h"
#endif

ALL_REGISTERS

#define GLUE2(a, b) a##b
#define GLUE(a, b) GLUE2(a, b)

#if IFT_MANY_REGISTERS
#define LANE_GW 4
#else
#define LANE_GW 2
#endif
#ifndef LANE_TILE /* weights that were packed beforehand bring theirs */
#define LANE_TILE (IFT_BY_LANE ? 4 : IFT_MANY_REGISTERS ? 6 : 3)
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

#endif
