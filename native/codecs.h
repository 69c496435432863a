/* Codecs of one instruction set. They live in a file of their own because it is compiled without fused multiply-adds:
 * codes must match bit for bit everywhere. */
#ifndef IFT_CODECS_H
#define IFT_CODECS_H

#include "instantft.h"

#define IFT_GLUE2(a, b) a##_##b
#define IFT_GLUE(a, b) IFT_GLUE2(a, b)
#define codec_encode IFT_GLUE(ift_encode, IFT_CORE)
#define codec_decode IFT_GLUE(ift_decode, IFT_CORE)
#define codec_decode_part IFT_GLUE(ift_decode_part, IFT_CORE)

/* row (plan->row_width floats) to codec->stride bytes. scratch: 2 bytes a value. */
void codec_encode(const ift_plan *p, const ift_codec *c, const float *row, uint8_t *out, uint8_t *scratch);
/* The reverse; gaps of the row become zero. Reads up to 16 bytes past the record. */
void codec_decode(const ift_plan *p, const ift_codec *c, const uint8_t *in, float *row);
/* Values first … last-1 of segment k = 1 … L (L: the output) alone, of the m of `records` with these numbers, to rows
 * of `pitch` floats; past the segment's end they are zero, past `last` there may be anything. run: one that does not
 * begin behind them, 0 for instance. Returns such a run for what follows. Reads as far as codec_decode. */
int codec_decode_part(const ift_plan *p, const ift_codec *c, const uint8_t *records, const uint32_t *numbers, int m,
                      int k, int first, int last, int run, float *out, ptrdiff_t pitch);

#endif
