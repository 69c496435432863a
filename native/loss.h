/* Softmax and cross-entropy, with samples side by side: C vectors instead of S rows of C. */
#ifndef IFT_LOSS_H
#define IFT_LOSS_H

#include "instantft.h"
#include "vec.h"

#include <math.h>

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

/* (C, ld) to rows (S, Cp). */
static void to_class_rows(int C, int Cp, int S, int ld, const float *z, float *rows) {
    for (int s = 0; s < S; s++)
        for (int c = 0; c < C; c++) rows[(ptrdiff_t)s * Cp + c] = z[(ptrdiff_t)c * ld + s];
}

#endif
