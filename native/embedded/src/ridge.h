/* The closed form on the device: what solvers/ridge.py does with all taps alike, at full rank, in the dual (T, T).
 *
 *     (K + 1 + λI)·α = Y,   K = s²·X·Xᵀ,   A_k = β·s²·X_kᵀ·α,   B_k = I,   bias = β·Σ α_i
 *
 * Records beyond 3 median norms are shrunk, s makes the mean norm 1, λ has the smallest left-out squared error on a grid
 * (solvers/taps.py: best_lambda), β is the temperature of the left-out scores (solvers/calibration.py).
 *
 * Memory: G and V of T² floats each. K waits above G's diagonal, which the factorisation leaves alone, and its diagonal
 * beside it. In parts of bounded work: four rows of K, one λ, the solution. Included by instantft_device.c only.
 */

enum { GRAM, SEARCH };

static const float lambdas[IFT_LAMBDAS] = {1e-4f, 3.1622776e-4f, 1e-3f, 3.1622776e-3f, 1e-2f, 3.1622776e-2f, 0.1f,
                                           0.31622776f, 1.0f, 3.1622776f, 10.0f, 31.622776f, 100.0f};
enum { FIRST_LAMBDA = 6 };

static float *kept_squares(const instantft *t) { return floats(t, IFT_AT_DIAGONAL); }
static float *kept_shrink(const instantft *t) { return floats(t, IFT_AT_DIAGONAL) + CAPACITY; }

static void begin(instantft *t) {
    t->T = t->samples, t->spare = TRAINING;
    t->steps = t->epoch = 0, t->phase = GRAM, t->block = 0;
    for (int i = 0; i < IFT_LAMBDAS; i++) t->error[i] = -1;
}

/* K[i][j] of four rows i and all j ≤ i. */
static void gram_rows(instantft *t, int first) {
    const ift_plan *p = &t->plan;
    float *G = floats(t, IFT_AT_GRAM), *h = scratch(t) + IFT_WS_GROUP;
    const float *x, *rec;
    int rows = t->T - first < 4 ? t->T - first : 4;
    for (int j = 0; j < first + rows; j++) {
        int r = j < first ? 4 : j - first; /* where it is, or goes */
        if (j == 0)
            for (int s = 0; s < rows; s++) {
                decode_input(t, first + s, 0, (int)ift_pad(N), input_row(t, s));
                codec_decode(p, &t->codec, kept_record(t, first + s), record_row(t, s));
            }
        if (j < first) {
            decode_input(t, j, 0, (int)ift_pad(N), input_row(t, r));
            codec_decode(p, &t->codec, kept_record(t, j), record_row(t, r));
        }
        x = input_row(t, r), rec = record_row(t, r);
        float sum[4] = {0};
        for (int k = 0; k < p->L; k++) {
            const ift_layer *y = &p->layer[k];
            if (k == 0) dot(1, &x, 0, 4, input_row(t, 0), ift_pad(N), y->Np, 0, h, 4);
            else dot(1, &rec, y->tap, 4, record_row(t, 0) + y->tap, p->row_width, y->Np, 0, h, 4);
            for (int s = 0; s < 4; s++) sum[s] += h[4 * s];
        }
        for (int s = 0; s < rows; s++) {
            if (j < first + s) G[(ptrdiff_t)j * t->T + first + s] = sum[s];
            else if (j == first + s) kept_squares(t)[j] = sum[s];
        }
    }
}

/* The scale, and how much of each record counts. */
static int balance(instantft *t) {
    float *norm = scratch(t) + IFT_WS_INVERSE, *c = kept_shrink(t);
    double mean = 0;
    for (int i = 0; i < t->T; i++) {
        if (!isfinite(kept_squares(t)[i])) return 0;
        float v = sqrtf(kept_squares(t)[i] > 0 ? kept_squares(t)[i] : 0);
        int at = i;
        for (; at > 0 && norm[at - 1] > v; at--) norm[at] = norm[at - 1];
        norm[at] = v;
    }
    float limit = 3 * (norm[(t->T - 1) / 2] + norm[t->T / 2]) / 2;
    for (int i = 0; i < t->T; i++) {
        float v = sqrtf(kept_squares(t)[i] > 0 ? kept_squares(t)[i] : 0);
        c[i] = limit > 0 && v > limit ? limit / v : 1;
        mean += (double)(c[i] * v);
    }
    mean /= t->T;
    t->scale = mean > 0 ? (float)(1 / mean) : 1;
    return 1;
}

/* α (T, Cp) and the diagonal of G⁻¹ at λ. Returns 0 where the system is not positive definite in float32. */
static int solve(instantft *t, float lambda) {
    const ptrdiff_t T = t->T;
    const int Cp = t->plan.Cp;
    float *G = floats(t, IFT_AT_GRAM), *V = floats(t, IFT_AT_FACTOR), *inverse = scratch(t) + IFT_WS_INVERSE;
    float *alpha = scratch(t) + IFT_WS_ALPHA, *beta = scratch(t) + IFT_WS_BETA;
    const float *c = kept_shrink(t), s2 = t->scale * t->scale;
    for (ptrdiff_t i = 0; i < T; i++) {
        for (ptrdiff_t j = 0; j < i; j++) G[i * T + j] = c[i] * c[j] * (s2 * G[j * T + i] + 1);
        G[i * T + i] = c[i] * c[i] * (s2 * kept_squares(t)[i] + 1) + lambda;
    }
    memset(V, 0, (size_t)(T * T) * sizeof *V);
    if (inverse_factor_f(G, T, V, T, T, scratch(t) + IFT_WS_DENSE)) return 0;
    memset(alpha, 0, (size_t)(T * Cp) * sizeof *alpha);
    for (ptrdiff_t i = 0; i < T; i++) alpha[i * Cp + kept_labels(t)[i]] = c[i];
    gemm((int)T, Cp, T, V, T, 1, alpha, Cp, beta, Cp, FROM_ZERO, NULL, 0);
    gemm((int)T, Cp, T, V, 1, T, beta, Cp, alpha, Cp, FROM_ZERO, NULL, 0);
    memset(inverse, 0, (size_t)T * sizeof *inverse);
    for (ptrdiff_t r = 0; r < T; r++)
        for (ptrdiff_t i = 0; i <= r; i++) inverse[i] += V[r * T + i] * V[r * T + i];
    return 1;
}

/* Left-out squared error, mean over samples. */
static float left_out_error(const instantft *t) {
    const float *alpha = scratch(t) + IFT_WS_ALPHA, *inverse = scratch(t) + IFT_WS_INVERSE;
    double sum = 0;
    for (ptrdiff_t i = 0; i < t->T; i++)
        for (int c = 0; c < C; c++) {
            float e = alpha[i * t->plan.Cp + c] / inverse[i];
            sum += (double)(e * e);
        }
    return (float)(sum / t->T);
}

/* The next λ of the grid to look at, or -1: found, and *lambda is between two of them. */
static int search(const instantft *t, float *lambda) {
    const float *error = t->error;
    int i = FIRST_LAMBDA;
    *lambda = lambdas[i];
    if (t->T < 2) return -1;
    if (error[i] < 0) return i;
    for (;;) {
        int best = -1;
        for (int j = i - 1; j <= i + 1; j += 2) {
            if (j < 0 || j >= IFT_LAMBDAS) continue;
            if (error[j] < 0) return j;
            if (best < 0 || error[j] < error[best]) best = j;
        }
        if (error[best] >= error[i]) break;
        i = best;
    }
    *lambda = lambdas[i];
    if (i > 0 && i + 1 < IFT_LAMBDAS && isfinite(error[i - 1]) && isfinite(error[i + 1])) {
        float curve = error[i - 1] - 2 * error[i] + error[i + 1];
        if (curve > 0) { /* 10^(shift/2), by the core's own exponential */
            float shift = 0.5f * (error[i - 1] - error[i + 1]) / curve, e[IFT_VL];
            vstore(e, vexp(vset(-1.15129255f * fabsf(shift))));
            *lambda = shift < 0 ? *lambda * e[0] : *lambda / e[0];
        }
    }
    return -1;
}

/* β by maximum likelihood on the left-out scores z (T, Cp), which are used up; also counts those that are right. */
static float temperature(instantft *t, float *z) {
    const int T = t->T, Cp = t->plan.Cp;
    double spread = 0, own = 0, all = 0;
    t->report.right_after = 0;
    for (ptrdiff_t i = 0; i < T; i++) {
        float *row = z + i * Cp, mean = 0;
        int best = 0;
        for (int c = 0; c < C; c++) mean += row[c] / (float)C, best = row[c] > row[best] ? c : best;
        t->report.right_after += best == kept_labels(t)[i];
        for (int c = 0; c < C; c++) row[c] -= mean, spread += (double)(row[c] * row[c]);
    }
    spread = sqrt(spread / T / C);
    if (!(spread > 1e-6)) return 1;
    for (ptrdiff_t i = 0; i < T; i++) {
        float *row = z + i * Cp, top = row[0];
        for (int c = 0; c < C; c++) top = row[c] > top ? row[c] : top;
        for (int c = 0; c < C; c++) row[c] = (row[c] - top) / (float)spread, all += (double)row[c];
        own += (double)row[kept_labels(t)[i]];
    }
    const double share = 1.0 / (T + 1), wanted = (1 - share) * own / T + share * all / T / C;
    double low = 1e-3, high = 1e3, beta = 1;
    for (int step = 0; step < 50; step++) {
        double slope = -wanted, curvature = 0;
        for (ptrdiff_t i = 0; i < T; i++) {
            float sum = 0, first = 0, second = 0, e[IFT_VL];
            for (int c = 0; c < C; c++) {
                float v = z[i * Cp + c];
                vstore(e, vexp(vset((float)beta * v)));
                sum += e[0], first += e[0] * v, second += e[0] * v * v;
            }
            float m = first / sum;
            slope += (double)m / T, curvature += (double)(second / sum - m * m) / T;
        }
        if (slope > 0) high = beta;
        else low = beta;
        double next = curvature > 0 ? beta - slope / curvature : -1, change;
        int inside = low < next && next < high;
        if (!inside) next = sqrt(low * high);
        change = fabs(next - beta) / beta, beta = next;
        if (change <= (inside ? 1e-3 : 1e-6)) break;
    }
    return (float)(beta / spread);
}

/* The adapter of α at the λ that was found. */
static int write_adapter(instantft *t) {
    const ift_plan *p = &t->plan;
    const int T = t->T, Cp = p->Cp;
    float *alpha = scratch(t) + IFT_WS_ALPHA, *z = scratch(t) + IFT_WS_BETA, *to = adapter(t, !t->live);
    const float *c = kept_shrink(t), *inverse = scratch(t) + IFT_WS_INVERSE;
    for (ptrdiff_t i = 0; i < T; i++)
        for (int j = 0; j < C; j++)
            z[i * Cp + j] = (j == kept_labels(t)[i] ? c[i] : 0) - alpha[i * Cp + j] / inverse[i];
    float beta = temperature(t, z), *g = scratch(t) + IFT_WS_GROUP;
    blank(t, to, 0);
    to[p->gain] = 0;
    for (int k = 0; k < p->L; k++)
        for (int j = 0; j < C; j++) to[p->layer[k].t[IFT_ROLE_SKIP_B].offset + (ptrdiff_t)j * Cp + j] = 1;
    for (ptrdiff_t i = 0; i < T; i++)
        for (int j = 0; j < C; j++) to[p->bias + j] += beta * c[i] * alpha[i * Cp + j];
    for (int i = 0; i < T; i += 4) {
        const float *x[4], *rec[4];
        int m = T - i < 4 ? T - i : 4;
        for (int s = 0; s < m; s++) {
            decode_input(t, i + s, 0, (int)ift_pad(N), input_row(t, s));
            codec_decode(p, &t->codec, kept_record(t, i + s), record_row(t, s));
            x[s] = input_row(t, s), rec[s] = record_row(t, s);
        }
        memset(g, 0, (size_t)(4 * p->Rp) * sizeof *g);
        for (int s = 0; s < m; s++)
            for (int j = 0; j < C; j++)
                g[4 * j + s] = beta * t->scale * t->scale * c[i + s] * alpha[(ptrdiff_t)(i + s) * Cp + j];
        for (int k = 0; k < p->L; k++) {
            const ift_layer *y = &p->layer[k];
            outer(m, k ? rec : x, NULL, k ? y->tap : 0, p->Rp, g, 4, to + y->t[IFT_ROLE_SKIP_A].offset, y->Np, y->Np);
        }
    }
    for (int64_t i = 0; i < p->params; i++)
        if (!isfinite(to[i])) return 0;
    return 1;
}

static int work(instantft *t) {
    t->steps++;
    if (t->phase == GRAM) {
        gram_rows(t, 4 * t->block++);
        if (4 * t->block < t->T) return INSTANTFT_MORE;
        t->phase = SEARCH;
        if (balance(t)) return INSTANTFT_MORE;
        t->spare = EMPTY; /* records too large to be squared */
        return INSTANTFT_DIVERGED;
    }
    float lambda;
    int next = search(t, &lambda);
    if (next >= 0) {
        t->error[next] = solve(t, lambdas[next]) ? left_out_error(t) : INFINITY;
        return INSTANTFT_MORE;
    }
    t->report.lambda = lambda;
    int solved = solve(t, lambda);
    if (solved) t->report.loss = left_out_error(t); /* before its memory is that of decoded rows */
    if (!solved || !write_adapter(t)) {
        t->spare = EMPTY;
        return INSTANTFT_DIVERGED;
    }
    t->spare = TRAINED;
    return INSTANTFT_DONE;
}
