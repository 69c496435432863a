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

/* Bits of a code in a segment. */
static int32_t bits_of(int32_t id, int nonnegative) {
    return id == IFT_INT8 ? 8 : id == IFT_RELU2 && nonnegative ? 2 : 4;
}

/* relu4, relu2: steps after a ReLU, short scales. */
static int relu_made(int32_t id) { return id == IFT_RELU4 || id == IFT_RELU2; }

/* The output is kept: relu4, relu2 in binary16, nf4-hw in 32 bits. */
static int keeps_output(int32_t id) { return relu_made(id) || (IFT_FIXED && id == IFT_NF4_HW); }

/* To a multiple of 16, as nf4-hw pads codes of a group, bytes of a segment, of all scales and of the output. */
static int32_t padded(int32_t n) { return (n + 15) & ~15; }

/* Codes that a group of n takes. */
static int32_t group_codes(int32_t id, int32_t n) { return IFT_FIXED && id == IFT_NF4_HW ? padded(n) : n; }

/* Runs of segment k for this codec; written to `runs` unless NULL. `value` and `code` count what came before. */
static int64_t segment_runs(const ift_plan *p, int32_t id, int k, int32_t value, int32_t code, int32_t scale,
                            ift_run *runs) {
    int n, groups, nonnegative;
    int64_t at = segment(p, k, &n, &groups, &nonnegative);
    int64_t count = 0;
    int levels = relu_made(id) && nonnegative ? 0 : 1;
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
        if (runs) runs[count] = (ift_run){(int32_t)at + g * m, m, scale + g, code + g * group_codes(id, m), levels};
        count++;
    }
    return count;
}

static int64_t runs_of(const ift_plan *p, int32_t id) {
    int64_t count = 0;
    int32_t value = 0;
    if (id == IFT_FP32 || id == IFT_FP16) return 0;
    for (int k = 1; k <= p->L - keeps_output(id); k++) {
        int n, groups, nonnegative;
        count += segment_runs(p, id, k, value, 0, 0, NULL);
        (void)segment(p, k, &n, &groups, &nonnegative);
        value += n;
    }
    return count;
}

int64_t ift_codec_memory(const ift_plan *p, int32_t id) {
    int64_t blocks = IFT_BLOCKS ? p->row_width / 16 + p->L : 0;
    return runs_of(p, id) * (int64_t)sizeof(ift_run) + blocks * (int64_t)sizeof(ift_block) + 8;
}

/* Cut the runs of 4-bit and 2-bit codes into blocks. Runs that follow each other in the row and in the codes, on the same
 * levels, are cut together. Returns how many blocks, or 0 where they cannot serve. */
static int32_t make_blocks(ift_codec *c, ift_block *blocks) {
    if (c->scales_n > IFT_BLOCK_SCALES) return 0;
    int32_t count = 0, r = 0;
    for (ift_span *span = c->spans; span < c->spans + c->spans_n; span->blocks_to = count, span++) {
        const int32_t bits = span->bits;
        while (r < span->runs_to) {
            int32_t start = c->runs[r].at, code = c->runs[r].code, levels = c->runs[r].levels, end = start, last = r;
            for (; last < span->runs_to; end += c->runs[last++].n) {
                const ift_run *u = &c->runs[last];
                if (u->at != end || u->code - code != end - start || u->levels != levels) break;
            }
            if (code * bits % 8) return 0;
            for (int32_t at = start; at < end; at += 32) {
                ift_block b = {.at = at, .code = (code + at - start) * bits / 8, .halves = at + 16 < end ? 2 : 1,
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
    }
    return count;
}

/* Codes of another segment, from the next byte on (nf4-hw: the next 16 bytes); returns the index of the first one. */
static int32_t add_codes(ift_codec *c, int32_t bits, int32_t n, int32_t *bytes) {
    int32_t first = *bytes * 8 / bits, whole = (n * bits + 7) / 8;
    if (IFT_FIXED && c->fixed) whole = padded(whole);
    ift_span *last = c->spans + c->spans_n - 1;
    if (!c->spans_n || last->bits != bits) {
        last = c->spans + c->spans_n++;
        *last = (ift_span){.bits = bits, .code = first};
    }
    last->codes_n += whole * 8 / bits;
    *bytes += whole;
    return first;
}

int ift_codec_init(ift_codec *c, const ift_plan *p, int32_t id, void *memory) {
    if (id < 0 || id >= IFT_CODECS || (!IFT_FIXED && id == IFT_NF4_HW)) return IFT_BAD_ARGUMENT;
    ift_run *runs = memory;
    *c = (ift_codec){.id = id, .runs = runs, .kept_at = -1, .kept_first = p->L + 1, .short_scales = relu_made(id),
                     .empty = id == IFT_NF4_BLOCK64 ? 7 : 0, .fixed = id == IFT_NF4_HW};
    if (id == IFT_FP32) {
        c->bytes = c->stride = p->row_width * 4;
        return IFT_OK;
    }
    int32_t values = 0, bytes = 0, kept = 0;
    for (int k = 1; k <= p->L; k++) {
        int n, groups, nonnegative;
        (void)segment(p, k, &n, &groups, &nonnegative);
        if (id == IFT_FP16 || (keeps_output(id) && k == p->L)) {
            if (c->kept_first > k) c->kept_first = k;
            kept += n;
        } else {
            int32_t codes = groups * group_codes(id, n / groups);
            int32_t code = id == IFT_NF4_BLOCK64 ? 0 : add_codes(c, bits_of(id, nonnegative), codes, &bytes);
            c->runs_n += (int32_t)segment_runs(p, id, k, values, code, c->scales_n, runs + c->runs_n);
            c->scales_n += groups;
            if (c->spans_n) c->spans[c->spans_n - 1].runs_to = c->runs_n;
        }
        values += n;
    }
    if (id == IFT_NF4_BLOCK64) {
        c->scales_n = (values + BLOCK - 1) / BLOCK;
        (void)add_codes(c, 4, c->scales_n * BLOCK, &bytes);
        c->spans[0].runs_to = c->runs_n;
    }
    c->codes_at = (int64_t)c->scales_n * (c->short_scales ? 2 : 4);
    if (IFT_FIXED && c->fixed) c->codes_at = padded((int32_t)c->codes_at);
    int64_t end = c->codes_at + bytes;
    if (kept) c->kept_at = end, end += IFT_FIXED && c->fixed ? padded(4 * kept) : 2 * (int64_t)kept;
    c->bytes = end;
    ift_block *blocks = (ift_block *)(void *)(runs + runs_of(p, id));
    c->blocks = blocks;
    if (IFT_BLOCKS && id != IFT_INT8 && !c->fixed) c->blocks_n = make_blocks(c, blocks);
    c->stride = (end + 7) / 8 * 8;
    return IFT_OK;
}
