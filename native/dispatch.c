/* Which cores this build holds and this processor can run. */
#include "instantft.h"

#include <string.h>

extern const ift_core ift_core_v4, ift_core_v3, ift_core_v2, ift_core_neon, ift_core_scalar;

#if defined(IFT_HAVE_V2) || defined(IFT_HAVE_V3) || defined(IFT_HAVE_V4)
static int x86_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt")) return 1;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return 2;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512cd"))
        return 3;
    return 4;
}
#endif

const ift_core *ift_core_at(int32_t i) {
    const ift_core *cores[6] = {0};
    int n = 0;
#ifdef IFT_HAVE_V4
    if (x86_level() >= 4) cores[n++] = &ift_core_v4;
#endif
#ifdef IFT_HAVE_V3
    if (x86_level() >= 3) cores[n++] = &ift_core_v3;
#endif
#ifdef IFT_HAVE_V2
    if (x86_level() >= 2) cores[n++] = &ift_core_v2;
#endif
#ifdef IFT_HAVE_NEON
    cores[n++] = &ift_core_neon;
#endif
    cores[n++] = &ift_core_scalar;
    return i >= 0 && i < n ? cores[i] : NULL;
}

const ift_core *ift_core_named(const char *name) {
    for (int32_t i = 0; ift_core_at(i); i++)
        if (!strcmp(ift_core_at(i)->name, name)) return ift_core_at(i);
    return NULL;
}
