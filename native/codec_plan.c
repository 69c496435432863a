/* Codec plans: which values share a scale and where their codes lie. Independent of the instruction set. */
#include "instantft.h"

_Static_assert(sizeof(ift_run) == 20 && sizeof(ift_block) == 24, "both are 4-byte aligned and lie behind each other");

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

static int64_t runs_of(const ift_plan *p, int32_t id) {
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

int64_t ift_codec_memory(const ift_plan *p, int32_t id) {
    return runs_of(p, id) * (int64_t)sizeof(ift_run) + (p->row_width / 16 + p->L) * (int64_t)sizeof(ift_block) + 8;
}

/* Cut the runs of 4-bit codes into blocks. Runs that follow each other in the row and in the codes, on the same levels,
 * are cut together. Returns how many blocks, or 0 where they cannot serve. */
static int32_t make_blocks(const ift_codec *c, ift_block *blocks) {
    if (c->scales_n > IFT_BLOCK_SCALES) return 0;
    int32_t count = 0;
    for (int32_t r = 0; r < c->runs_n;) {
        int32_t start = c->runs[r].at, code = c->runs[r].code, levels = c->runs[r].levels, end = start, last = r;
        for (; last < c->runs_n; end += c->runs[last++].n) {
            const ift_run *u = &c->runs[last];
            if (u->at != end || u->code - code != end - start || u->levels != levels) break;
        }
        if (code & 1) return 0;
        for (int32_t at = start; at < end; at += 32) {
            ift_block b = {.at = at, .code = (code + at - start) / 2, .halves = at + 16 < end ? 2 : 1,
                           .levels = (int16_t)levels};
            for (int half = 0; half < b.halves; half++) {
                int32_t from = at + 16 * half, to = from + 16 < end ? from + 16 : end;
                while (c->runs[r].at + c->runs[r].n <= from) r++;
                b.a[half] = b.b[half] = (int16_t)c->runs[r].scale;
                for (int32_t q = r + 1; q < last && c->runs[q].at < to; q++) {
                    if (c->runs[q].scale == b.a[half]) continue;
                    if (b.mask[half]) return 0; /* a third scale */
                    b.b[half] = (int16_t)c->runs[q].scale;
                    b.mask[half] = (uint16_t)(0xffffu << (c->runs[q].at - from));
                }
            }
            blocks[count++] = b;
        }
        r = last;
    }
    return count;
}

int ift_codec_init(ift_codec *c, const ift_plan *p, int32_t id, void *memory) {
    if (id < 0 || id >= IFT_CODECS) return IFT_BAD_ARGUMENT;
    ift_run *runs = memory;
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
    ift_block *blocks = (ift_block *)(void *)(runs + runs_of(p, id));
    c->blocks = blocks;
    if (four) c->blocks_n = make_blocks(c, blocks);
    c->stride = (end + 7) / 8 * 8;
    return IFT_OK;
}
