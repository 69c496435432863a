/* The skip step: y = gain·c + Σ_k x^k·A_k·B_k + bias (Skip2-LoRA eq. 17), then eqs. 10-12 and SGD, from records alone. */
#ifndef IFT_SKIP_H
#define IFT_SKIP_H

#include "linalg.h"
#include "loss.h"

/* Outputs first … last-1 of the frozen network, c, in a sample's column of z (C, ld): gain·c + bias. */
INLINE void skip_frozen(const ift_plan *p, const float *params, const float *c, int first, int last, int ld, float *z) {
    const float gain = params[p->gain], *bias = params + p->bias;
    for (int i = first; i < last; i++) z[(ptrdiff_t)i * ld] = gain * c[i - first] + bias[i];
}

/* z (C, ld) = gain·c + bias and h (J, ld) = A_k·x^k of every adapter. x, rec: inputs and record rows. */
static void skip_hidden(const ift_plan *p, const float *params, int S, int ld, const float *const *x,
                        const float *const *rec, float *h, float *z) {
    for (int s = 0; s < S; s++) skip_frozen(p, params, rec[s] + p->output_at, 0, p->C, ld, z + s);
    for (int k = p->skip_first; k < p->L; k++, h += (ptrdiff_t)p->Rp * ld) {
        const ift_layer *y = &p->layer[k];
        const float *a = params + y->t[IFT_ROLE_SKIP_A].offset;
        if (k == 0) dot(S, x, 0, p->Rp, a, y->Np, y->Np, 0, h, ld);
        else dot(S, rec, y->tap, p->Rp, a, y->Np, y->Np, 0, h, ld);
    }
}

/* z += B·h, the logits of S samples; columns past S become zero. */
static void skip_output(const ift_plan *p, const float *params, int S, int ld, float *h, float *z) {
    int J = (p->L - p->skip_first) * p->Rp;
    for (int c = 0; c < p->C; c++)
        for (int s = S; s < ld; s++) z[(ptrdiff_t)c * ld + s] = 0;
    if (!J) return;
    for (int j = 0; j < J; j++)
        for (int s = S; s < ld; s++) h[(ptrdiff_t)j * ld + s] = 0;
    const float *b = params + p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(p->C, ld, J, b, 1, p->Cp, h, ld, z, ld, FROM_C, NULL, 0);
}

/* Logits of a whole batch. */
static void skip_logits(const ift_plan *p, const float *params, int S, int ld, const float *const *x,
                        const float *const *rec, float *h, float *z) {
    skip_hidden(p, params, S, ld, x, rec, h, z);
    skip_output(p, params, S, ld, h, z);
}

/* Lanes of a step of S samples: whole vectors, and at least fours. */
INLINE int skip_lanes(int S) {
    int lanes = IFT_VL < 4 ? 4 : IFT_VL;
    return (S + lanes - 1) / lanes * lanes;
}

/* Velocity holds u = −lr·v. Before a step u *= momentum; after it, with the gradients added, the parameters move by u. */
static void skip_velocity(const ift_plan *p, float *params, float *velocity, float momentum, int move) {
    for (int k = p->skip_first; k < p->L; k++)
        for (int r = IFT_ROLE_SKIP_A; r <= IFT_ROLE_SKIP_B; r++) {
            const ift_tensor *t = &p->layer[k].t[r];
            float *u = velocity + t->offset, *w = params + t->offset;
            for (int64_t i = 0; i < (int64_t)t->rows * t->pitch; i++) {
                if (move) w[i] += u[i];
                else u[i] *= momentum;
            }
        }
}

/* From z = −lr/S · dL/dy of S samples, so that updates are additions: dh (J, ld), and B's part of the update, added to
 * target. g: (S, Cp). */
static void skip_gradient(const ift_plan *p, const float *params, float *target, int S, int ld, const float *h, float *dh,
                          const float *z, float *g) {
    int J = (p->L - p->skip_first) * p->Rp;
    int64_t b = p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(J, ld, p->C, params + b, p->Cp, 1, z, ld, dh, ld, FROM_ZERO, NULL, 0);
    to_class_rows(p->C, p->Cp, S, ld, z, g);
    gemm(J, p->Cp, S, h, ld, 1, g, p->Cp, target + b, p->Cp, FROM_C, NULL, 0);
}

/* A's part of the update, added to target. */
static void skip_outer(const ift_plan *p, float *target, int S, int ld, const float *const *x, const float *const *rec,
                       const float *const *next_x, const float *const *next_rec, const float *dh) {
    for (int k = p->skip_first; k < p->L; k++, dh += (ptrdiff_t)p->Rp * ld) {
        const ift_layer *y = &p->layer[k];
        float *a = target + y->t[IFT_ROLE_SKIP_A].offset;
        outer(S, k ? rec : x, k ? next_rec : next_x, k ? y->tap : 0, p->Rp, dh, ld, a, y->Np, y->Np);
    }
}

/* One batch: forward, loss, backward, update. Returns the loss sum; nothing is updated if it is not finite. */
static double skip_step(const ift_plan *p, ift_job *job, int S, const float *const *x, const float *const *rec,
                        const float *const *next_x, const float *const *next_rec, const int32_t *rows,
                        const int32_t *labels, int64_t *correct) {
    float *ws = job->workspace, *params = job->params, *target = job->velocity ? job->velocity : params;
    float *h = ws + p->ws_h, *dh = ws + p->ws_dh, *z = ws + p->ws_z;
    int ld = skip_lanes(S);
    skip_logits(p, params, S, ld, x, rec, h, z);
    int64_t hits = 0;
    double loss = batch_loss(job, p->C, S, ld, rows, labels, -job->lr / (float)S, z, z + (ptrdiff_t)p->C * ld, &hits);
    if (!isfinite(loss)) return loss;
    *correct += hits;
    if (job->velocity) skip_velocity(p, params, job->velocity, job->momentum, 0);
    skip_gradient(p, params, target, S, ld, h, dh, z, ws + p->ws_g);
    skip_outer(p, target, S, ld, x, rec, next_x, next_rec, dh);
    if (job->velocity) skip_velocity(p, params, job->velocity, job->momentum, 1);
    return loss;
}

#endif
