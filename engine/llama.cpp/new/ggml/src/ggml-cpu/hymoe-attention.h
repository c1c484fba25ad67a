// Attention of one token over a cache in F16, for all query heads that share a key head at once.
//
// ggml takes one query head after the other: a row of the cache is read and converted for each of them, and the weighted
// sum of the values is kept in 16-bit floats. Here a block of rows is converted once for the heads that share it, and
// sums are 32-bit floats. What comes out are the partial results that ggml's own reduction takes.

#pragma once

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static constexpr int64_t HYMOE_ATTEND_ROWS  = 32;  // of the cache in a block
static constexpr int64_t HYMOE_ATTEND_DIMS  = 128; // of a head, at most
static constexpr int64_t HYMOE_ATTEND_HEADS = 16;  // that share a key head, at most

// Whether `hymoe_attend` computes this; of one token and one sequence, with types and shapes that fit together.
static bool hymoe_attends(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    float max_bias      = 0.0f;
    float logit_softcap = 0.0f;
    memcpy(&max_bias,      (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    return k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && k->ne[2] == v->ne[2] &&
           k->ne[0] <= HYMOE_ATTEND_DIMS && v->ne[0] <= HYMOE_ATTEND_DIMS &&
           q->ne[2] % k->ne[2] == 0 && q->ne[2] / k->ne[2] <= HYMOE_ATTEND_HEADS &&
           !dst->src[4] && (!mask || mask->ne[2] == 1) && max_bias == 0.0f && logit_softcap == 0.0f;
}

// Attends to the rows from `first` up to `last`, not included. Of each query head goes to its place in `partials`, which
// are `stride` floats apart: the highest score, the sum of the weights, and the weighted sum of the values.
static void hymoe_attend(const ggml_tensor * dst, int64_t first, int64_t last, float * partials, int64_t stride) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const int64_t n_k    = k->ne[0];
    const int64_t n_v    = v->ne[0];
    const int64_t n_head = q->ne[2] / k->ne[2];

    float scale = 1.0f;
    memcpy(&scale, (const float *) dst->op_params + 0, sizeof(float));

    float rows[HYMOE_ATTEND_ROWS * HYMOE_ATTEND_DIMS]; // keys, then values
    float weights[HYMOE_ATTEND_HEADS * HYMOE_ATTEND_ROWS];
    float bias[HYMOE_ATTEND_ROWS];
    int64_t seen[HYMOE_ATTEND_ROWS];

    for (int64_t kv_head = 0; kv_head < k->ne[2]; kv_head++) {
        float * partial = partials + kv_head * n_head * stride;
        float   sums[HYMOE_ATTEND_HEADS * HYMOE_ATTEND_DIMS] = {};
        for (int64_t head = 0; head < n_head; head++) {
            partial[head * stride + 0] = -INFINITY;
            partial[head * stride + 1] = 0.0f;
        }

        for (int64_t block = first; block < last; block += HYMOE_ATTEND_ROWS) {
            int64_t n = 0;
            for (int64_t row = block; row < std::min(block + HYMOE_ATTEND_ROWS, last); row++) {
                bias[n] = mask ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) mask->data)[row]) : 0.0f;
                if (bias[n] != -INFINITY) {
                    seen[n++] = row;
                }
            }
            const auto convert = [&](const ggml_tensor * cache) {
                for (int64_t i = 0; i < n; i++) {
                    const char * row = (const char *) cache->data + seen[i] * cache->nb[1] + kv_head * cache->nb[2];
                    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) row, rows + i * cache->ne[0], cache->ne[0]);
                }
            };

            convert(k);
            for (int64_t head = 0; head < n_head; head++) {
                const float * query = (const float *) ((const char *) q->data + (kv_head * n_head + head) * q->nb[2]);
                float *       score = weights + head * n;
                float &       most  = partial[head * stride + 0];
                float &       sum   = partial[head * stride + 1];
                float         now   = most;
                for (int64_t i = 0; i < n; i++) {
                    ggml_vec_dot_f32(n_k, &score[i], 0, rows + i * n_k, 0, query, 0, 1);
                    score[i] = score[i] * scale + bias[i];
                    now = std::max(now, score[i]);
                }
                if (now > most) {
                    const float shrunk = expf(most - now);
                    ggml_vec_scale_f32(n_v, sums + head * n_v, shrunk);
                    sum *= shrunk;
                    most = now;
                }
                sum += ggml_vec_soft_max_f32(n, score, score, most);
            }

            convert(v);
            simd_gemm(sums, weights, rows, n_head, n, n_v);
        }

        for (int64_t head = 0; head < n_head; head++) {
            memcpy(partial + head * stride + 2, sums + head * n_v, n_v * sizeof(float));
        }
    }
}
