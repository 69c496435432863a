/* Adapts when the world has changed, and only then: the samples that came with the export are met one by one, and those
 * labels that come say how often the network was wrong. printf is the example's; the library needs none. */
#include "../../include/instantft_data.h"
#include "../../include/instantft_device.h"
#include "../../include/instantft_drift.h"

#include <stdio.h>

static _Alignas(16) uint8_t arena[INSTANTFT_ARENA];

/* What is known of the network in its own world: its error rate there, and mean and deviation of its doubt, measured on a
 * PC or by its first few hundred samples. */
static const double RATE = 0.05, DOUBT = 0.05, DEVIATION = 0.1;
enum { KNOWN_BY = 256, ENOUGH = INSTANTFT_SAMPLES < 32 ? INSTANTFT_SAMPLES : 32 };

int main(void) {
    instantft *t = instantft_init(arena, sizeof arena);
    if (!t) return 1;
    instantft_errors errors;
    instantft_errors_init(&errors);
    instantft_errors_expect(&errors, RATE, KNOWN_BY);
    instantft_cusum doubt;
    instantft_cusum_init(&doubt, DOUBT, DEVIATION, 0);
    int changed = 0, kept = 0, right = 0;
    for (int i = 0; i < INSTANTFT_DATA; i++) {
        const instantft_value *x = instantft_data_x + (size_t)i * INSTANTFT_N;
        float logits[INSTANTFT_C];
        const int said = instantft_infer(t, x, logits);
        if (said < 0) continue; /* NaN in the sample: skipped */
        right += said == instantft_data_y[i];
        /* without a label: the change is seen, but there is nothing to learn from yet */
        const int surprised = instantft_cusum_add(&doubt, instantft_doubt(logits, INSTANTFT_C));
        /* with one, which may as well come later */
        const int worse = instantft_errors_add(&errors, said != instantft_data_y[i]);
        if (!changed && (surprised || worse)) {
            printf("sample %d: another world, says %s\n", i, worse ? "its errors" : "its doubt");
            changed = 1;
        }
        if (!changed) continue;
        if (instantft_add_sample(t, x, instantft_data_y[i]) == INSTANTFT_DONE) kept++;
        if (kept < ENOUGH) continue;
        int status;
        while ((status = instantft_train(t, 1)) == INSTANTFT_MORE) continue; /* a board does its other work here */
        if (status || instantft_commit(t)) return 1;
        printf("sample %d: adapted to %d samples\n", i, kept);
        instantft_clear_samples(t);
        instantft_errors_init(&errors);
        instantft_cusum_init(&doubt, DOUBT, DEVIATION, 0);
        changed = kept = 0;
    }
    printf("%d of %d right\n", right, INSTANTFT_DATA);
    return 0;
}
