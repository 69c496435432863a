/* Codec plans: which values share a scale and where their codes lie. Independent of the instruction set. */
#include "instantft.h"

enum { BLOCK = 64 };

/* Segment k = 1 … L of a record: its start, size, groups and whether a ReLU made it. */
static int64_t segment(const ift_plan *p, int k, int *n, int *groups, int *nonnegative) {
    const ift_layer *below = &p->layer[k - 1];
    *groups = below->d.kind == IFT_CONV ? below->d.out : 1;
    *n = below->n_out;
    *nonnegative = below->d.relu;
    return k == p->L ? p->output_at : p->layer[k].tap;
}

/* Runs of segment k for this codec; written to `runs` unless NULL. `value` and `code` count what came before. */
static int64_t segment_runs(const ift_plan *p, int32_t id, int k, int32_t value, int32_t code, int32_t scale,
                            ift_run *runs) {
    int n, groups, nonnegative;
    int64_t at = segment(p, k, &n, &groups, &nonnegative);
    int64_t count = 0;
    int levels = id == IFT_RELU4 && nonnegative ? 0 : 1;
    if (id == IFT_NF4_BLOCK64) { /* blocks go on across segments */
        for (int32_t i = 0; i < n;) {
            int32_t block = (value + i) / BLOCK, left = (block + 1) * BLOCK - (value + i);
            int32_t m = n - i < left ? n - i : left;
            if (runs) runs[count] = (ift_run){(int32_t)at + i, m, block, value + i, levels};
            count++, i += m;
        }
        return count;
    }
    for (int g = 0; g < groups; g++) {
        int32_t m = n / groups;
        if (runs) runs[count] = (ift_run){(int32_t)at + g * m, m, scale + g, code + g * m, levels};
        count++;
    }
    return count;
}

int64_t ift_codec_runs(const ift_plan *p, int32_t id) {
    int64_t count = 0;
    int32_t value = 0;
    if (id == IFT_FP32 || id == IFT_FP16) return 0;
    for (int k = 1; k <= p->L - (id == IFT_RELU4); k++) {
        int n, groups, nonnegative;
        count += segment_runs(p, id, k, value, 0, 0, NULL);
        (void)segment(p, k, &n, &groups, &nonnegative);
        value += n;
    }
    return count;
}

int ift_codec_init(ift_codec *c, const ift_plan *p, int32_t id, ift_run *runs) {
    if (id < 0 || id >= IFT_CODECS) return IFT_BAD_ARGUMENT;
    *c = (ift_codec){.id = id, .runs = runs, .half_at = -1, .half_first = p->L + 1};
    int four = id == IFT_NF4 || id == IFT_NF4_BLOCK64 || id == IFT_RELU4;
    int32_t values = 0, code = 0, scales = 0, halves = 0;
    for (int k = 1; k <= p->L; k++) {
        int n, groups, nonnegative;
        (void)segment(p, k, &n, &groups, &nonnegative);
        if (id == IFT_FP16 || (id == IFT_RELU4 && k == p->L)) {
            if (c->half_first > k) c->half_first = k;
            halves += n;
        } else if (id != IFT_FP32) {
            c->runs_n += (int32_t)segment_runs(p, id, k, values, code, scales, runs + c->runs_n);
            scales += groups;
            code += n;
            if (four && id != IFT_NF4_BLOCK64) code += code & 1; /* a segment starts on a byte */
        }
        values += n;
    }
    if (id == IFT_FP32) {
        c->bytes = c->stride = p->row_width * 4;
        return IFT_OK;
    }
    if (id == IFT_NF4_BLOCK64) scales = (values + BLOCK - 1) / BLOCK, code = scales * BLOCK;
    c->scales_n = scales, c->codes_n = code;
    c->codes_at = (int64_t)scales * (id == IFT_RELU4 ? 2 : 4);
    if (id == IFT_FP16) c->codes_at = 0;
    int64_t end = c->codes_at + (four ? code / 2 : code);
    if (halves) c->half_at = end, end += 2 * (int64_t)halves;
    c->bytes = end;
    c->stride = (end + 7) / 8 * 8;
    return IFT_OK;
}
