/* The skip step: y = gain·c + Σ_k x^k·A_k·B_k + bias (Skip2-LoRA eq. 17), then eqs. 10-12 and SGD, from records alone. */
#ifndef IFT_SKIP_H
#define IFT_SKIP_H

#include "linalg.h"
#include "loss.h"

/* h (J, ld) = A_k·x^k for every adapter; z (C, ld) = logits. x, rec: the batch's inputs and record rows. */
static void skip_logits(const ift_plan *p, const float *params, int S, int ld, const float *const *x,
                        const float *const *rec, float *h, float *z) {
    float gain = params[p->gain];
    const float *bias = params + p->bias;
    for (int s = 0; s < S; s++)
        for (int c = 0; c < p->C; c++) z[(ptrdiff_t)c * ld + s] = gain * rec[s][p->output_at + c] + bias[c];
    for (int c = 0; c < p->C; c++)
        for (int s = S; s < ld; s++) z[(ptrdiff_t)c * ld + s] = 0;
    if (p->skip_first == p->L) return;
    int J = 0;
    for (int k = p->skip_first; k < p->L; k++, J += p->Rp) {
        const ift_layer *y = &p->layer[k];
        const float *a = params + y->t[IFT_ROLE_SKIP_A].offset;
        if (k == 0) dot(S, x, 0, p->Rp, a, y->Np, y->Np, h, ld);
        else dot(S, rec, y->tap, p->Rp, a, y->Np, y->Np, h + (ptrdiff_t)J * ld, ld);
    }
    for (int j = 0; j < J; j++)
        for (int s = S; s < ld; s++) h[(ptrdiff_t)j * ld + s] = 0;
    const float *b = params + p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(p->C, ld, J, b, 1, p->Cp, h, ld, z, ld, FROM_C, NULL, 0);
}

/* Velocity holds u = −lr·v. Before a step u *= momentum; after it, with the gradients added, the parameters move by u. */
static void skip_velocity(const ift_plan *p, const ift_job *job, int move) {
    for (int k = p->skip_first; k < p->L; k++)
        for (int r = IFT_ROLE_SKIP_A; r <= IFT_ROLE_SKIP_B; r++) {
            const ift_tensor *t = &p->layer[k].t[r];
            float *u = job->velocity + t->offset, *w = job->params + t->offset;
            for (int64_t i = 0; i < (int64_t)t->rows * t->pitch; i++) {
                if (move) w[i] += u[i];
                else u[i] *= job->momentum;
            }
        }
}

/* One batch: forward, loss, backward, update. Returns the loss sum; *finite 0 and nothing updated if it is not. */
static double skip_step(const ift_plan *p, ift_job *job, int S, const float *const *x, const float *const *rec,
                        const float *const *next_x, const float *const *next_rec, const int32_t *rows,
                        const int32_t *labels, int64_t *correct) {
    float *ws = job->workspace, *params = job->params;
    int ld = (S + IFT_VL - 1) / IFT_VL * IFT_VL;
#if IFT_VL < 4
    ld = (S + 3) / 4 * 4;
#endif
    float *h = ws + p->ws_h, *dh = ws + p->ws_dh, *z = ws + p->ws_z, *g = ws + p->ws_g;
    int J = (p->L - p->skip_first) * p->Rp;
    skip_logits(p, params, S, ld, x, rec, h, z);
    int64_t hits = 0;
    double loss = batch_loss(job, p->C, S, ld, rows, labels, -job->lr / (float)S, z, z + (ptrdiff_t)p->C * ld, &hits);
    if (!isfinite(loss)) return loss;
    *correct += hits;
    /* z now holds −lr/B · dL/dy, so every update below is an addition, to the parameters or to their velocity */
    float *target = job->velocity ? job->velocity : params;
    int64_t b = p->layer[p->skip_first].t[IFT_ROLE_SKIP_B].offset;
    gemm(J, ld, p->C, params + b, p->Cp, 1, z, ld, dh, ld, FROM_ZERO, NULL, 0);
    to_class_rows(p->C, p->Cp, S, ld, z, g);
    if (job->velocity) skip_velocity(p, job, 0);
    gemm(J, p->Cp, S, h, ld, 1, g, p->Cp, target + b, p->Cp, FROM_C, NULL, 0);
    J = 0;
    for (int k = p->skip_first; k < p->L; k++, J += p->Rp) {
        const ift_layer *y = &p->layer[k];
        float *a = target + y->t[IFT_ROLE_SKIP_A].offset;
        outer(S, k ? rec : x, k ? next_rec : next_x, k ? y->tap : 0, p->Rp, dh + (ptrdiff_t)J * ld, ld, a, y->Np, y->Np);
    }
    if (job->velocity) skip_velocity(p, job, 1);
    return loss;
}

#endif
