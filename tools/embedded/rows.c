/* Prints checksums of what the exported codec makes of made-up rows: of the codes, of all values decoded, and of the values
 * decoded part by part, which must be the same. They are the same on every machine, with vectors and without. */
#include "instantft_device.h"

#include "instantft.h"

#include "codecs.h"

#include <math.h>
#include <stdio.h>

enum { ROWS = 64, WIDTH = IFT_ROW_WIDTH, RECORDS = 3 };
extern const ift_layer_desc instantft_layers[];
static uint64_t memory[IFT_RUNS_BYTES / 8];
static float row[WIDTH], all[RECORDS][WIDTH], part[RECORDS * (WIDTH + 32)];
static uint8_t codes[(RECORDS + 1) * IFT_STRIDE + 64], scratch[2 * WIDTH + 64]; /* the last RECORDS rows; one aside */
static ift_plan plan;
static ift_codec codec;

static uint32_t seed = 1;
static float draw(void) {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return (float)(int32_t)seed * 0x1p-31f;
}
static uint32_t hash(uint32_t h, const void *data, size_t n) {
    for (const uint8_t *p = data; n; n--) h = (h ^ *p++) * 16777619u;
    return h;
}

int main(void) {
    static const int32_t shape[3] = IFT_INPUT_SHAPE;
    uint32_t coded = 2166136261u, decoded = coded;
    int differ = 0;
    if (ift_plan_init(&plan, instantft_layers, INSTANTFT_LAYERS, shape, INSTANTFT_RANK, 1)) return 1;
    if (ift_codec_init(&codec, &plan, IFT_CODEC, memory)) return 1;
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < WIDTH; i++) {
            float v = draw();
            row[i] = r % 3 == 1 && v < 0 ? 0 : r % 3 == 2 ? v * v * v * 1e-3f : v; /* as after a ReLU; mostly small */
            if (r == 3 && i % 40 < 20) row[i] = 0; /* whole groups of zeros */
            if (r == 4) row[i] = roundf(16 * v);   /* ties */
            if (r == 6) row[i] = i % 65 < 64 ? (float)(i % 65) / 32 - 125.0f / 128 : 1; /* between bins of encode_bins */
        }
        if (r == 5) row[1] = NAN;
        for (int k = 1; k <= plan.L; k++) /* gaps are zero in every row */
            for (int n = k < plan.L ? plan.layer[k].N : plan.C, i = n; i < (int)ift_pad(n); i++)
                row[(k < plan.L ? plan.layer[k].tap : plan.output_at) + i] = 0;
        const uint32_t at = r == 5 ? RECORDS : (uint32_t)r % RECORDS;
        const uint32_t numbers[RECORDS] = {at, (at + 1) % RECORDS, (at + 2) % RECORDS};
        codec_encode(&plan, &codec, row, codes + at * IFT_STRIDE, scratch);
        coded = hash(coded, codes + at * IFT_STRIDE, IFT_STRIDE);
        if (r == 5) continue; /* a NaN may be written in more than one way */
        codec_decode(&plan, &codec, codes + at * IFT_STRIDE, all[at]);
        for (int k = 1, run = 0; k <= plan.L; k++) {
            const size_t column = (size_t)(k < plan.L ? plan.layer[k].tap : plan.output_at);
            int n = k < plan.L ? plan.layer[k].N : plan.C, width = (int)ift_pad(n);
            const int columns = 16 * (1 + r % 5), m = r < RECORDS ? 1 : 1 + r / 3 % RECORDS;
            for (int first = 0; first < width; first += columns) {
                int last = first + columns < width ? first + columns : width, pitch = last - first + r % 2 * 32;
                run = codec_decode_part(&plan, &codec, codes, numbers, m, k, first, last, run, part, pitch);
                for (int i = first; i < last; i++)
                    for (int s = 0; s < m; s++) differ += part[s * pitch + i - first] != all[numbers[s]][column + (size_t)i];
            }
            decoded = hash(decoded, all[at] + column, (size_t)n * sizeof(float));
        }
    }
    printf("codes %08lx\nvalues %08lx\nparts that differ %d\n", (unsigned long)coded, (unsigned long)decoded, differ);
    return differ != 0;
}
