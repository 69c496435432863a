/* Holds the loops of an export with vectors of four (native/neon.h and what stands beside it) to plain ones, whose sums
 * run in the same order with one rounding a step: results are the same to the bit. */
#include "instantft_device.h"

#include "instantft.h"

#pragma GCC diagnostic ignored "-Wunused-function"
#include "linalg.h"
#include "panels.h"

#include <stdio.h>
#include <stdlib.h>

enum { LANES = 4, MOST = 1 << 16 };
static float x[MOST], w[MOST], packed[MOST], y[MOST], want[MOST], bias[64];
static int differ, done;

static void draw(float *to, int n) {
    for (int i = 0; i < n; i++) to[i] = (float)(rand() % 2001 - 1000) * 1e-3f;
}
static void compare(const char *what, int a, int b, int c, int n) {
    done++;
    if (!memcmp(y, want, (size_t)n * sizeof *y)) return;
    if (!differ++) printf("the first that differs: %s %d %d %d\n", what, a, b, c);
}

/* Outputs (oc, oh, ow), pooled by twos where pool is 2. */
static void convolution(int oc, int ic, int kh, int kw, int oh, int ow, int pool) {
    conv_args g = {.ic = ic, .oc = oc, .kh = kh, .kw = kw, .oh = oh, .ow = ow, .pool2 = pool == 2, .relu = pool == 2};
    g.x_pitch = pool * ow + kw - 1, g.x_rows = pool * oh + kh - 1;
    g.x_plane = g.x_pitch * g.x_rows, g.y_plane = (ptrdiff_t)oh * ow;
    const int taps = ic * kh * kw;
    draw(x, ic * (int)g.x_plane * LANES), draw(w, oc * taps), draw(bias, oc);
    conv_pack(w, oc, taps, packed);
    conv_4(&g, x, packed, bias, y);
    for (int o = 0; o < oc; o++)
        for (int r = 0; r < oh; r++)
            for (int c = 0; c < ow; c++)
                for (int l = 0; l < LANES; l++) {
                    float most = -INFINITY;
                    for (int at = 0; at < pool * pool; at++) {
                        float sum = bias[o];
                        for (int t = 0; t < taps; t++) {
                            int i = t / (kh * kw), ky = t / kw % kh, kx = t % kw;
                            ptrdiff_t row = pool * r + at / pool + ky, column = pool * c + at % pool + kx;
                            sum = fmaf(w[o * taps + t], x[(i * g.x_plane + row * g.x_pitch + column) * LANES + l], sum);
                        }
                        most = sum > most ? sum : most;
                    }
                    want[((o * g.y_plane) + r * ow + c) * LANES + l] = g.relu && most < 0 ? 0 : most;
                }
    compare(pool == 2 ? "pooled convolution" : "convolution", oc, 10 * kh + kw, ow, oc * oh * ow * LANES);
}

static void product(int m, int n, int K, int start) {
    const int pitch = K + 3;
    draw(x, m * pitch), draw(w, K * n), draw(bias, 48), draw(y, m * n);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = start == FROM_ZERO ? 0 : start == FROM_C ? y[i * n + j] : bias[j];
            for (int k = 0; k < K; k++) sum = fmaf(x[i * pitch + k], w[k * n + j], sum);
            want[i * n + j] = start == FROM_BIAS && sum < 0 ? 0 : sum;
        }
    gemm(m, n, K, x, pitch, 1, w, n, y, n, (enum gemm_start)start, bias, start == FROM_BIAS);
    compare("product", m, n, K, m * n);
}

/* Rows evenly apart, or all but the last. */
static void outer_product(int S, int n, int even) {
    const float *rows[16];
    const int R = 8, ld = (S + 3) / 4 * 4, pitch = n + 5;
    for (int s = 0; s < S; s++) rows[s] = x + s * pitch + (!even && s == S - 1 ? 7 : 0);
    draw(x, (S + 1) * pitch), draw(w, R * ld), draw(y, R * n);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < n; i++) {
            float sum = y[r * n + i];
            for (int s = 0; s < S; s++) sum = fmaf(w[r * ld + s], rows[s][i + 2], sum);
            want[r * n + i] = sum;
        }
    outer(S, rows, NULL, 2, R, w, ld, y, n, n);
    compare("outer product", S, n, even, R * n);
}

int main(void) {
    static const int kernels[][2] = {{5, 5}, {2, 5}, {1, 5}, {6, 5}, {3, 3}, {2, 4}};
    for (int k = 0; k < 6; k++)
        for (int oc = 1; oc <= 9; oc++)
            for (int ow = 1; ow <= 9; ow += 1 + (ow > 1))
                for (int pool = 1; pool <= 2; pool++)
                    convolution(oc, 1 + (oc + ow) % 3, kernels[k][0], kernels[k][1], 1 + ow % 2, ow, pool);
    for (int m = 1; m <= 9; m++)
        for (int n = 16; n <= 48; n += 16)
            for (int K = 1; K <= 13; K++)
                for (int start = FROM_ZERO; start <= FROM_BIAS; start++) product(m, n, K, start);
    for (int S = 1; S <= 13; S++)
        for (int n = 16; n <= 48; n += 16)
            for (int even = 0; even < 2; even++) outer_product(S, n, even);
    printf("kernels %d\nthat differ %d\n", done, differ);
    return differ != 0;
}
