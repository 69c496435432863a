/* Softmax and cross-entropy, with samples side by side: C vectors instead of S rows of C; and the losses of ift_loss. */
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

/* z (C, ld) becomes dloss/dz·scale for the losses of ift_loss; lanes past S become 0. rows: of the S samples, in x and in
 * job->targets. Returns the sum of the losses and adds to *correct: the largest logit where the largest target is, all
 * logits on the right side of 0, or nothing. A value at a time: targets lie in rows, and few ask for this. */
static double target_loss(const ift_job *job, int C, int S, int ld, const int32_t *rows, float scale, float *z,
                          int64_t *correct) {
    double loss = 0;
    for (int s = 0; s < S; s++) {
        const float *t = job->targets + (int64_t)rows[s] * C;
        float w = job->weights[rows[s]] * scale, *at = z + s, best = at[0];
        double part = 0, weight = (double)job->weights[rows[s]];
        int own = 0, first = 0, right = 1;
        for (int c = 1; c < C; c++) {
            if (at[(ptrdiff_t)c * ld] > best) best = at[(ptrdiff_t)c * ld], first = c;
            if (t[c] > t[own]) own = c;
        }
        if (job->loss == IFT_SOFTMAX) {
            float sum = 0;
            for (int c = 0; c < C; c++) {
                float *v = at + (ptrdiff_t)c * ld, shifted = *v - best;
                part -= (double)t[c] * (double)shifted;
                *v = expf(shifted);
                sum += *v;
            }
            part += log((double)sum);
            for (int c = 0; c < C; c++) at[(ptrdiff_t)c * ld] = (at[(ptrdiff_t)c * ld] / sum - t[c]) * w;
            *correct += first == own;
        } else if (job->loss == IFT_SIGMOID) {
            for (int c = 0; c < C; c++) {
                float *v = at + (ptrdiff_t)c * ld, y = *v, e = expf(-fabsf(y)), p = y < 0 ? e / (1 + e) : 1 / (1 + e);
                part += (double)log1pf(e) + (double)(y > 0 ? y : 0) - (double)t[c] * (double)y;
                right &= (y > 0) == (t[c] > 0.5f);
                *v = (p - t[c]) * (w / (float)C);
            }
            part /= C;
            *correct += right;
        } else {
            for (int c = 0; c < C; c++) {
                float *v = at + (ptrdiff_t)c * ld, d = *v - t[c];
                part += (double)d * (double)d;
                *v = d * (2 * w / (float)C);
            }
            part /= C;
        }
        loss += weight * part;
    }
    for (int c = 0; c < C; c++)
        for (int s = S; s < ld; s++) z[(ptrdiff_t)c * ld + s] = 0;
    return loss;
}

/* The loss of a batch: what `softmax_loss` does, unless targets are given. */
INLINE double batch_loss(const ift_job *job, int C, int S, int ld, const int32_t *rows, const int32_t *y, float scale,
                         float *z, float *total, int64_t *correct) {
    if (job->targets) return target_loss(job, C, S, ld, rows, scale, z, correct);
    return softmax_loss(C, S, ld, y, scale, z, total, correct);
}

/* (C, ld) to rows (S, Cp). */
static void to_class_rows(int C, int Cp, int S, int ld, const float *z, float *rows) {
    for (int s = 0; s < S; s++)
        for (int c = 0; c < C; c++) rows[(ptrdiff_t)s * Cp + c] = z[(ptrdiff_t)c * ld + s];
}

#endif
