/* Plans: every shape, offset and size, resolved once. No arithmetic on samples happens here. */
#include "instantft.h"

#include <string.h>

_Static_assert(sizeof(ift_layer_desc) == 40, "bindings pass layer descriptions as rows of ten int32");
_Static_assert(sizeof(float) == 4, "buffers are counted in 4-byte floats");

static ift_tensor take(int64_t *cursor, int32_t rows, int32_t cols, int32_t pitch) {
    ift_tensor t = {*cursor, rows, cols, pitch};
    *cursor += ift_pad((int64_t)rows * pitch);
    return t;
}

static int64_t take_floats(int64_t *cursor, int64_t n) {
    int64_t at = *cursor;
    *cursor += ift_pad(n);
    return at;
}

/* Limits keep every product below well inside int32 and every size inside int64. */
enum { MAX_SIDE = 1 << 16, MAX_WIDTH = 1 << 22, MAX_RANK = 1 << 12, MAX_BATCH = 1 << 20 };

static int fits(int64_t a, int64_t b, int64_t c) {
    return a >= 1 && b >= 1 && c >= 1 && a <= MAX_WIDTH && b <= MAX_SIDE && c <= MAX_SIDE && a * b * c <= MAX_WIDTH;
}

static int shapes(ift_layer *y, int32_t ic, int32_t ih, int32_t iw) {
    const ift_layer_desc *d = &y->d;
    if (!fits(ic, ih, iw) || d->out < 1 || d->out > MAX_WIDTH || d->pool < 1 || d->pool > MAX_SIDE) return IFT_BAD_NETWORK;
    y->ic = ic, y->ih = ih, y->iw = iw;
    y->N = ic * ih * iw;
    if (d->kind == IFT_FC) {
        if (d->pool != 1) return IFT_BAD_NETWORK;
        y->oh = y->ow = 1;
    } else if (d->kind == IFT_CONV) {
        if (d->kh > MAX_SIDE || d->kw > MAX_SIDE) return IFT_BAD_NETWORK;
        if (d->kh < 1 || d->kw < 1 || d->ph < 0 || d->pw < 0 || d->ph >= d->kh || d->pw >= d->kw) return IFT_BAD_NETWORK;
        y->oh = ih + 2 * d->ph - d->kh + 1;
        y->ow = iw + 2 * d->pw - d->kw + 1;
    } else {
        return IFT_BAD_NETWORK;
    }
    y->qh = y->oh / d->pool, y->qw = y->ow / d->pool;
    if (y->qh < 1 || y->qw < 1 || !fits(d->out, y->oh, y->ow)) return IFT_BAD_NETWORK;
    if (d->kind == IFT_CONV && (int64_t)ic * d->kh * d->kw * d->out > (int64_t)1 << 28) return IFT_BAD_NETWORK;
    y->M = d->out * y->oh * y->ow;
    y->n_out = d->out * y->qh * y->qw;
    y->Np = (int32_t)ift_pad(y->N), y->Mp = (int32_t)ift_pad(y->M);
    return IFT_OK;
}

static void parameters(ift_plan *p) {
    int64_t at = 0;
    for (int k = 0; k < p->L; k++) {
        ift_layer *y = &p->layer[k];
        int32_t out = y->d.out, out_p = (int32_t)ift_pad(out);
        if (y->d.kind == IFT_FC) {
            y->t[IFT_ROLE_W] = take(&at, y->N, out, out_p);
        } else {
            int32_t taps = y->ic * y->d.kh * y->d.kw;
            y->t[IFT_ROLE_W] = take(&at, out, taps, taps);
        }
        y->t[IFT_ROLE_BIAS] = take(&at, 1, out, out_p);
        if (y->d.batch_norm)
            for (int r = IFT_ROLE_GAMMA; r <= IFT_ROLE_VAR; r++) y->t[r] = take(&at, 1, out, out_p);
        if (y->d.train & IFT_LAYER_ADAPTER) {
            y->t[IFT_ROLE_LAYER_A] = take(&at, p->Rp, y->N, y->Np);
            y->t[IFT_ROLE_LAYER_B] = take(&at, p->Rp, y->M, y->Mp);
        }
        if (y->d.train & IFT_SKIP_ADAPTER) y->t[IFT_ROLE_SKIP_A] = take(&at, p->Rp, y->N, y->Np);
    }
    /* all B of the skip adapters lie together: one (J, C) matrix, J = taps * Rp */
    for (int k = p->skip_first; k < p->L; k++) p->layer[k].t[IFT_ROLE_SKIP_B] = take(&at, p->Rp, p->C, p->Cp);
    p->gain = take_floats(&at, 1);
    p->bias = take_floats(&at, p->Cp);
    p->params = at;
}

/* Floats of one layer's feature maps for `lanes` samples, the border of zeros included. */
static int64_t padded_map(const ift_layer *y, int64_t lanes) {
    return (int64_t)y->ic * (y->ih + 2 * y->d.ph) * (y->iw + 2 * y->d.pw) * lanes;
}

static void frozen_workspace(ift_plan *p, int64_t *at) {
    int64_t pack = 0, lanes = 0;
    for (int k = 0; k < p->L; k++) {
        const ift_layer *y = &p->layer[k];
        if (y->d.kind != IFT_CONV) continue;
        int64_t maps[3] = {padded_map(y, IFT_PAD), (int64_t)y->M * IFT_PAD, (int64_t)y->n_out * IFT_PAD};
        for (int i = 0; i < 3; i++) lanes = maps[i] > lanes ? maps[i] : lanes;
        pack += ift_pad((int64_t)y->d.out * y->ic * y->d.kh * y->d.kw);
    }
    p->ws_pack = take_floats(at, pack);
    p->ws_lanes_a = take_floats(at, lanes);
    p->ws_lanes_b = take_floats(at, lanes);
    int64_t chunk = p->batch > IFT_CHUNK ? p->batch : IFT_CHUNK;
    p->ws_rows = take_floats(at, chunk * p->row_width + IFT_PAD);
    p->ws_decoded = take_floats(at, p->batch * p->row_width + IFT_PAD);
    /* an encoded record with slack for wide reads: at most a byte of codes and a scale a value, and nf4-hw's padding,
     * which is below 8 bytes a group and 16 a segment; its unpacked codes */
    int64_t padding = 0;
    for (int k = 0; k < p->L; k++) padding += 2 * (p->layer[k].d.kind == IFT_CONV ? p->layer[k].d.out : 1) + 4;
    p->ws_bytes = take_floats(at, 5 * p->row_width / 4 + padding + 64);
    p->ws_codes = take_floats(at, p->row_width / 2 + 64);
    /* a chunk's inputs, records and numbers, 8 bytes each, and labels; then the pointers of a batch and of the next */
    p->ws_chunk = take_floats(at, 7 * chunk + 2 * IFT_PAD);
    p->ws_pointers = take_floats(at, 4 * chunk);
}

static void skip_workspace(ift_plan *p, int64_t *at) {
    int64_t J = (int64_t)(p->L - p->skip_first) * p->Rp;
    p->ws_h = take_floats(at, J * p->batch_p);
    p->ws_dh = take_floats(at, J * p->batch_p);
    p->ws_z = take_floats(at, (int64_t)(p->C + 4) * p->batch_p);
    p->ws_g = take_floats(at, (int64_t)p->batch_p * p->Cp);
}

static void general_workspace(ift_plan *p, int64_t *at) {
    int64_t B = p->batch, lanes = p->batch_p;
    for (int k = p->first; k < p->L; k++) {
        ift_layer *y = &p->layer[k];
        int bits = y->d.train, adapter = bits & IFT_LAYER_ADAPTER, conv = y->d.kind == IFT_CONV;
        if (!conv || adapter) y->x_rows = take_floats(at, B * y->Np);
        if (adapter) {
            y->h = take_floats(at, (int64_t)p->Rp * lanes);
            y->gh = take_floats(at, (int64_t)p->Rp * lanes);
        }
        if (!conv || adapter) y->g_rows = take_floats(at, B * y->Mp);
        if (y->d.batch_norm) y->bn = take_floats(at, 5 * ift_pad(y->d.out));
        if (!conv) {
            y->z_rows = take_floats(at, B * y->Mp);
            if (y->d.batch_norm) y->xhat = take_floats(at, B * y->Mp);
            if (bits & IFT_X) y->wt = take_floats(at, (int64_t)y->M * y->Np);
            continue;
        }
        y->gx_pad = bits & IFT_X ? y->d.kw - 1 - y->d.pw : 0;
        y->x_lanes = take_floats(at, padded_map(y, lanes));
        y->z_lanes = take_floats(at, (int64_t)y->M * lanes);
        if (y->d.batch_norm) y->xhat = take_floats(at, (int64_t)y->M * lanes);
        y->gz_lanes = take_floats(at, (int64_t)y->d.out * y->oh * (y->ow + 2 * y->gx_pad) * lanes);
        y->q_lanes = take_floats(at, (int64_t)y->n_out * lanes);
        y->gq_lanes = take_floats(at, (int64_t)y->n_out * lanes);
        /* packed for the forward pass, then turned for gx */
        int64_t weights = ift_pad((int64_t)y->d.out * y->ic * y->d.kh * y->d.kw);
        y->wt = take_floats(at, bits & IFT_X ? 2 * weights : weights);
    }
}

int ift_plan_init(ift_plan *p, const ift_layer_desc *layers, int32_t L, const int32_t input[3], int32_t rank,
                  int32_t batch) {
    if (L < 1 || L > IFT_MAX_LAYERS || rank < 0 || rank > MAX_RANK || batch < 1 || batch > MAX_BATCH)
        return IFT_BAD_ARGUMENT;
    memset(p, 0, sizeof *p);
    p->L = L, p->Rp = (rank + 3) / 4 * 4;
    p->batch = batch, p->batch_p = (int32_t)ift_pad(batch);
    p->first = p->skip_first = L;
    int32_t c = input[0], h = input[1], w = input[2];
    for (int k = 0; k < L; k++) {
        ift_layer *y = &p->layer[k];
        y->d = layers[k];
        if (shapes(y, c, h, w) != IFT_OK) return IFT_BAD_NETWORK;
        if (y->d.kind == IFT_CONV && k > 0 && p->layer[k - 1].d.kind == IFT_FC) return IFT_BAD_NETWORK;
        y->tap = k == 0 ? -1 : p->row_width;
        if (k > 0) p->row_width += y->Np;
        c = y->d.out, h = y->qh, w = y->qw;
        if (y->d.kind == IFT_FC) h = w = 1;
        int bits = y->d.train;
        if ((bits & (IFT_W | IFT_B | IFT_GAMMA | IFT_BETA | IFT_BATCH_STATS | IFT_LAYER_ADAPTER)) && p->first > k)
            p->first = k;
        if ((bits & IFT_SKIP_ADAPTER) && p->skip_first > k) p->skip_first = k;
        p->layer_adapters |= (bits & IFT_LAYER_ADAPTER) != 0;
    }
    const ift_layer_desc *last = &p->layer[L - 1].d;
    if (last->kind != IFT_FC || last->batch_norm || last->relu) return IFT_BAD_NETWORK;
    if (p->layer[0].d.train & IFT_X) return IFT_BAD_ARGUMENT;
    /* the general path starts from samples, or from a record's vector */
    if (p->first > 0 && p->first < L && p->layer[p->first].d.kind == IFT_CONV) return IFT_BAD_ARGUMENT;
    for (int k = p->skip_first; k < L; k++)
        if (!(p->layer[k].d.train & IFT_SKIP_ADAPTER)) return IFT_BAD_ARGUMENT;
    if ((p->layer_adapters || p->skip_first < L) && rank < 1) return IFT_BAD_ARGUMENT;
    p->general = p->first < L;
    p->C = p->layer[L - 1].d.out, p->Cp = (int32_t)ift_pad(p->C);
    p->output_at = p->row_width;
    p->row_width += p->Cp;
    p->input_width = p->layer[0].N;
    parameters(p);
    int64_t at = 0;
    frozen_workspace(p, &at);
    skip_workspace(p, &at);
    if (p->general) general_workspace(p, &at);
    p->workspace = at + IFT_PAD;
    return IFT_OK;
}
