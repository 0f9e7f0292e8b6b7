/* Depthwise convolution over the present pixels of a lattice: see models/operators/sparse_conv/backend.py for the
   equation.

   Features are float32, rows of C channels, the points of all images laid end to end. A neighbour list names, for each
   point, the rows of the present pixels in its window and their taps: the entries ends[p - 1] .. ends[p] (0 for the
   first) of `rows` and `taps`. A list of one image (list_points < points) serves all images of the batch, whose rows
   follow each other. Sums run over the entries in order, so results do not depend on the number of threads. */

#include <string.h>

#include "../vectors.h"

enum { VECS = 4 };

/* Entries of point p, and the distance from their rows to those of its image. */
#define ENTRIES(p)                                                                                                     \
    const int64_t local = (p) % list_points, base = (p) - local;                                                       \
    const int64_t first = local ? ends[local - 1] : 0, last = ends[local];

/* index: (batch, points), pixel ids. map: (batch, height + kh - 1, width + kw - 1), the row of each present pixel, -1
   elsewhere and on the margin. faults: (batch), 0, or 1 if an id of image b is outside the lattice, 2 if one is
   repeated; the map is then unusable. */
void infty_index_map(const int64_t *index, int64_t batch, int64_t points, int64_t height, int64_t width, int64_t kh,
                     int64_t kw, int32_t *map, int32_t *faults) {
    const int64_t pitch = width + kw - 1, plane = (height + kh - 1) * pitch;
#pragma omp parallel for
    for (int64_t b = 0; b < batch; b++) {
        int32_t *image = map + b * plane;
        memset(image, 0xff, plane * sizeof(int32_t));
        faults[b] = 0;
        for (int64_t m = 0; m < points && !faults[b]; m++) {
            const int64_t id = index[b * points + m];
            if (id < 0 || id >= height * width) {
                faults[b] = 1;
                break;
            }
            int32_t *place = image + (id / width + kh / 2) * pitch + id % width + kw / 2;
            if (*place >= 0) faults[b] = 2;
            *place = (int32_t)(b * points + m);
        }
    }
}

/* index, map: as of infty_index_map. counts: (batch * points), the present pixels in the window of each point. */
void infty_count(const int64_t *index, const int32_t *map, int64_t batch, int64_t points, int64_t height, int64_t width,
                 int64_t kh, int64_t kw, int32_t *counts) {
    const int64_t pitch = width + kw - 1, plane = (height + kh - 1) * pitch;
#pragma omp parallel for
    for (int64_t p = 0; p < batch * points; p++) {
        const int32_t *corner = map + p / points * plane + index[p] / width * pitch + index[p] % width;
        int32_t count = 0;
        for (int64_t i = 0; i < kh; i++)
            for (int64_t j = 0; j < kw; j++) count += corner[i * pitch + j] >= 0;
        counts[p] = count;
    }
}

/* The list itself. index, map: as of infty_index_map. ends: (batch * points). rows, taps: (last of ends), the entries
   of a point in the order of taps. */
void infty_fill(const int64_t *index, const int32_t *map, const int64_t *ends, int64_t batch, int64_t points,
                int64_t height, int64_t width, int64_t kh, int64_t kw, int32_t *rows, int32_t *taps) {
    const int64_t pitch = width + kw - 1, plane = (height + kh - 1) * pitch;
#pragma omp parallel for
    for (int64_t p = 0; p < batch * points; p++) {
        const int32_t *corner = map + p / points * plane + index[p] / width * pitch + index[p] % width;
        int64_t entry = p ? ends[p - 1] : 0;
        const int64_t last = ends[p];
        for (int64_t i = 0; i < kh; i++)
            for (int64_t j = 0; j < kw && entry < last; j++) { /* written first, counted if present: no branch */
                rows[entry] = corner[i * pitch + j];
                taps[entry] = (int32_t)(i * kw + j);
                entry += corner[i * pitch + j] >= 0;
            }
    }
}

/* `n` vectors of out(p) from channel c on. */
#define FORWARD(n)                                                                                                     \
    {                                                                                                                  \
        vec sum[n] = {0};                                                                                              \
        for (int64_t e = first; e < last; e++) {                                                                       \
            const float *q = x + (rows[e] + base) * channels + c, *w = kernel + (int64_t)taps[e] * channels + c;       \
            for (int v = 0; v < n; v++) sum[v] += load(w + v * LANES) * load(q + v * LANES);                           \
        }                                                                                                              \
        for (int v = 0; v < n; v++) {                                                                                  \
            const int64_t at = p * channels + c + v * LANES;                                                           \
            store(out + at, (residual ? load(residual + at) : (vec){0}) + sum[v] * weight);                            \
        }                                                                                                              \
    }

/* out(p) = residual(p) + scale(p) * sum over entries of kernel(tap) * x(row). x, residual, out: (points, channels);
   residual may be NULL. kernel: (number of taps, channels). scale, ends: (list_points). rows, taps: (last of ends). */
void infty_forward(const float *x, const float *kernel, const float *scale, const float *residual, const int64_t *ends,
                   const int32_t *rows, const int32_t *taps, int64_t points, int64_t list_points, int64_t channels,
                   float *out) {
#pragma omp parallel for
    for (int64_t p = 0; p < points; p++) {
        ENTRIES(p)
        const float weight = scale[local];
        int64_t c = 0;
        for (; c + VECS * LANES <= channels; c += VECS * LANES) FORWARD(4)
        for (; c + LANES <= channels; c += LANES) FORWARD(1)
        for (; c < channels; c++) {
            float sum = 0;
            for (int64_t e = first; e < last; e++)
                sum += kernel[taps[e] * channels + c] * x[(rows[e] + base) * channels + c];
            out[p * channels + c] = (residual ? residual[p * channels + c] : 0) + sum * weight;
        }
    }
}

/* `n` vectors of the gradients from channel c on. */
#define BACKWARD(n)                                                                                                    \
    {                                                                                                                  \
        vec sum[n] = {0}, own[n];                                                                                      \
        for (int v = 0; v < n; v++) own[v] = load(g + p * channels + c + v * LANES);                                   \
        for (int64_t e = first; e < last; e++) {                                                                       \
            const int64_t q = (rows[e] + base) * channels + c, tap = (int64_t)taps[e] * channels + c;                  \
            const float *w = kernel + (num_taps - 1) * channels + 2 * c - tap; /* the opposite tap */                  \
            for (int v = 0; v < n; v++) {                                                                              \
                sum[v] += load(w + v * LANES) * load(g + q + v * LANES);                                               \
                store(dk + tap + v * LANES, load(dk + tap + v * LANES) + own[v] * load(x + q + v * LANES));            \
            }                                                                                                          \
        }                                                                                                              \
        for (int v = 0; v < n; v++) store(dx + p * channels + c + v * LANES, sum[v]);                                  \
    }

/* Gradients from g = scale * (gradient of out): dx(p) = sum of kernel(opposite tap) * g(row), as p is in the window of
   row at the opposite tap; and for each chunk of points, dkernel(tap) = sum of g(p) * x(row), to be added in order.
   g, x, dx: (points, channels). kernel: (num_taps, channels). ends: (list_points). rows, taps: (last of ends).
   dkernel: (chunks, num_taps, channels), zeros on entry. */
void infty_backward(const float *g, const float *x, const float *kernel, const int64_t *ends, const int32_t *rows,
                    const int32_t *taps, int64_t points, int64_t list_points, int64_t channels, int64_t num_taps,
                    int64_t chunk, float *dx, float *dkernel) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < (points + chunk - 1) / chunk; part++) {
        float *dk = dkernel + part * num_taps * channels;
        const int64_t stop = (part + 1) * chunk < points ? (part + 1) * chunk : points;
        for (int64_t p = part * chunk; p < stop; p++) {
            ENTRIES(p)
            int64_t c = 0;
            for (; c + VECS * LANES <= channels; c += VECS * LANES) BACKWARD(4)
            for (; c + LANES <= channels; c += LANES) BACKWARD(1)
            for (; c < channels; c++) {
                float sum = 0;
                for (int64_t e = first; e < last; e++) {
                    const int64_t q = (rows[e] + base) * channels + c;
                    sum += kernel[(num_taps - 1 - taps[e]) * channels + c] * g[q];
                    dk[taps[e] * channels + c] += g[p * channels + c] * x[q];
                }
                dx[p * channels + c] = sum;
            }
        }
    }
}
