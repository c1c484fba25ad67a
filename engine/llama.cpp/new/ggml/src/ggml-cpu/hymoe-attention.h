// Attention over a cache in F16 or a quantized type, for all query heads that share a key head at once.
//
// ggml takes one query head after the other: a row of the cache is read and converted for each of them. Fewer tokens
// than a tile of its own, and all of them over a quantized cache, it takes one by one, with sums in 16-bit floats or
// queries that are quantized too. Here a block of rows is converted once for the heads and tokens that see it, and
// everything is in 32-bit floats. Where the threads share out the cache of one token, what comes out are the partial
// results that ggml's own reduction takes; everything else is done in pieces of tokens and key heads.

#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "ops.h"
#include "quants.h"
#include "simd-gemm.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static constexpr int64_t HYMOE_ATTEND_DIMS  = 128; // of a head, at most
static constexpr int64_t HYMOE_ATTEND_HEADS = 16;  // that share a key head, at most

// Rows of the cache in a block, for one token's part and for a piece, and a piece's tokens, at most.
static constexpr int64_t HYMOE_TOKEN_ROWS    = 32;
static constexpr int64_t HYMOE_PROMPT_ROWS   = 64;
static constexpr int64_t HYMOE_PROMPT_TOKENS = 64;

// Where simd_gemm has vectors.
#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
static constexpr bool HYMOE_ATTENDS = true;
#else
static constexpr bool HYMOE_ATTENDS = false;
#endif

// Whether types and shapes are those that this file computes; of one stream.
static bool hymoe_attends(const ggml_tensor * dst) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    float max_bias      = 0.0f;
    float logit_softcap = 0.0f;
    memcpy(&max_bias,      (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    const auto cached = [](ggml_type type) {
        return type == GGML_TYPE_F16 || (ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float);
    };
    return HYMOE_ATTENDS && q->type == GGML_TYPE_F32 && cached(k->type) && cached(v->type) &&
           q->ne[3] == 1 && k->ne[2] == v->ne[2] && k->ne[0] <= HYMOE_ATTEND_DIMS && v->ne[0] <= HYMOE_ATTEND_DIMS &&
           q->ne[2] % k->ne[2] == 0 && q->ne[2] / k->ne[2] <= HYMOE_ATTEND_HEADS &&
           !dst->src[4] && (!mask || mask->ne[2] == 1) && max_bias == 0.0f && logit_softcap == 0.0f;
}

// These two of the quantized types here, since ggml's own conversions are compiled for any processor.
static void hymoe_dequantize(const block_q8_0 * blocks, float * out, int64_t n) {
    for (int64_t i = 0; i < n / QK8_0; i++, out += QK8_0) {
        const float d = GGML_CPU_FP16_TO_FP32(blocks[i].d);
        for (int64_t j = 0; j < QK8_0; j++) {
            out[j] = d * blocks[i].qs[j];
        }
    }
}

static void hymoe_dequantize(const block_q4_0 * blocks, float * out, int64_t n) {
    for (int64_t i = 0; i < n / QK4_0; i++, out += QK4_0) {
        const float d = GGML_CPU_FP16_TO_FP32(blocks[i].d);
        for (int64_t j = 0; j < QK4_0 / 2; j++) {
            out[j]             = d * ((blocks[i].qs[j] & 15) - 8);
            out[j + QK4_0 / 2] = d * ((blocks[i].qs[j] >> 4) - 8);
        }
    }
}

// What a row of the cache holds for one key head.
static void hymoe_read_row(const ggml_tensor * cache, int64_t row, int64_t kv_head, float * out) {
    const void * from = (const char *) cache->data + row * cache->nb[1] + kv_head * cache->nb[2];
    switch (cache->type) {
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) from, out, cache->ne[0]); break;
        case GGML_TYPE_Q8_0: hymoe_dequantize((const block_q8_0 *) from, out, cache->ne[0]); break;
        case GGML_TYPE_Q4_0: hymoe_dequantize((const block_q4_0 *) from, out, cache->ne[0]); break;
        default: ggml_get_type_traits(cache->type)->to_float(from, out, cache->ne[0]);
    }
}

static float hymoe_highest(int64_t n, const float * x) {
    constexpr int64_t n_lanes = 16;
    float lanes[n_lanes];
    std::fill(lanes, lanes + n_lanes, -INFINITY);
    int64_t i = 0;
    for (; i + n_lanes <= n; i += n_lanes) {
        for (int64_t lane = 0; lane < n_lanes; lane++) {
            lanes[lane] = lanes[lane] < x[i + lane] ? x[i + lane] : lanes[lane];
        }
    }
    for (; i < n; i++) {
        lanes[0] = std::max(lanes[0], x[i]);
    }
    return *std::max_element(lanes, lanes + n_lanes);
}

// How far a query head of a token is: the highest score so far, and the sum of the weights.
struct hymoe_softmax {
    float highest = -INFINITY;
    float sum     = 0.0f;

    // Turns n more scores into weights; what was summed up with lower ones as the highest is made smaller.
    void weigh(int64_t n, float * scores, int64_t n_v, float * values) {
        const float now = std::max(highest, hymoe_highest(n, scores));
        if (now == -INFINITY) {
            std::replace(scores, scores + n, -INFINITY, 0.0f); // what is not a number stays
            return;
        }
        if (now > highest) {
            const float shrunk = expf(highest - now);
            ggml_vec_scale_f32(n_v, values, shrunk);
            sum *= shrunk;
            highest = now;
        }
        sum += ggml_vec_soft_max_f32(n, scores, scores, highest);
    }
};

// Attends to the rows from `first` up to `last`, not included, for one token. Of each query head goes to its place in
// `partials`, which are `stride` floats apart: the highest score, the sum of the weights, and the weighted sum of the
// values.
static void hymoe_attend_token(
        const ggml_tensor * dst, int64_t first, int64_t last, float * partials, int64_t stride) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    const int64_t n_k    = k->ne[0];
    const int64_t n_v    = v->ne[0];
    const int64_t n_head = q->ne[2] / k->ne[2];

    float scale = 1.0f;
    memcpy(&scale, (const float *) dst->op_params + 0, sizeof(float));

    float rows[HYMOE_TOKEN_ROWS * HYMOE_ATTEND_DIMS]; // keys, then values
    float weights[HYMOE_ATTEND_HEADS * HYMOE_TOKEN_ROWS];
    float bias[HYMOE_TOKEN_ROWS];
    int64_t seen[HYMOE_TOKEN_ROWS];

    for (int64_t kv_head = 0; kv_head < k->ne[2]; kv_head++) {
        float         sums[HYMOE_ATTEND_HEADS * HYMOE_ATTEND_DIMS] = {};
        hymoe_softmax softmax[HYMOE_ATTEND_HEADS];

        for (int64_t block = first; block < last; block += HYMOE_TOKEN_ROWS) {
            int64_t n = 0;
            for (int64_t row = block; row < std::min(block + HYMOE_TOKEN_ROWS, last); row++) {
                bias[n] = mask ? GGML_CPU_FP16_TO_FP32(((const ggml_fp16_t *) mask->data)[row]) : 0.0f;
                if (bias[n] != -INFINITY) {
                    seen[n++] = row;
                }
            }

            for (int64_t i = 0; i < n; i++) {
                hymoe_read_row(k, seen[i], kv_head, rows + i * n_k);
            }
            for (int64_t head = 0; head < n_head; head++) {
                const float * query = (const float *) ((const char *) q->data + (kv_head * n_head + head) * q->nb[2]);
                float *       score = weights + head * n;
                for (int64_t i = 0; i < n; i++) {
                    ggml_vec_dot_f32(n_k, &score[i], 0, rows + i * n_k, 0, query, 0, 1);
                    score[i] = score[i] * scale + bias[i];
                }
                softmax[head].weigh(n, score, n_v, sums + head * n_v);
            }

            for (int64_t i = 0; i < n; i++) {
                hymoe_read_row(v, seen[i], kv_head, rows + i * n_v);
            }
            simd_gemm(sums, weights, rows, n_head, n, n_v);
        }

        for (int64_t head = 0; head < n_head; head++) {
            float * partial = partials + (kv_head * n_head + head) * stride;
            partial[0] = softmax[head].highest;
            partial[1] = softmax[head].sum;
            memcpy(partial + 2, sums + head * n_v, n_v * sizeof(float));
        }
    }
}

// A thread's memory for many tokens: their queries and sums for all heads that share a key head, and what it takes to
// go through a block of the cache with some of them.
struct hymoe_prompt_memory {
    const int64_t n_k, n_v, n_head;

    explicit hymoe_prompt_memory(const ggml_tensor * dst) :
            n_k(dst->src[1]->ne[0]), n_v(dst->src[2]->ne[0]), n_head(dst->src[0]->ne[2] / dst->src[1]->ne[2]) {
    }

    int64_t n_queries() const { return n_head * HYMOE_PROMPT_TOKENS; }

    int64_t n_scores() const { return HYMOE_PROMPT_TOKENS * HYMOE_PROMPT_ROWS; }

    // in floats
    int64_t size() const { return (n_queries() + HYMOE_PROMPT_ROWS) * (n_k + n_v) + 2 * n_scores(); }
};

// Bytes of work memory that each thread needs.
size_t hymoe_attention_wsize(const ggml_tensor * dst) {
    return hymoe_attends(dst) ? (hymoe_prompt_memory(dst).size() + CACHE_LINE_SIZE_F32) * sizeof(float) : 0;
}

enum class hymoe_seen { NOTHING, ALL, SOME };

// What some tokens see of some rows of the cache; of SOME the biases are in `bias`, [n_tokens][n].
static hymoe_seen hymoe_read_mask(
        const ggml_tensor * mask, int64_t token, int64_t n_tokens, int64_t row, int64_t n, float * bias) {
    if (!mask) {
        return hymoe_seen::ALL;
    }
    constexpr uint16_t hidden = 0xfc00; // -INFINITY
    uint16_t any       = 0;
    uint16_t different = 0;
    const auto * first = (const char *) mask->data + token * mask->nb[1] + row * sizeof(ggml_fp16_t);
    for (int64_t t = 0; t < n_tokens; t++) {
        const auto * bits = (const uint16_t *) (first + t * mask->nb[1]);
        for (int64_t i = 0; i < n; i++) {
            any       |= bits[i];
            different |= bits[i] ^ hidden;
        }
    }
    if (!different || !any) {
        return different ? hymoe_seen::ALL : hymoe_seen::NOTHING;
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) (first + t * mask->nb[1]), bias + t * n, n);
    }
    return hymoe_seen::SOME;
}

// Of one key head: some tokens through all of the cache.
static void hymoe_attend_tokens(
        const ggml_tensor * dst, int64_t kv_head, int64_t token, int64_t n_tokens, float * memory) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];

    const hymoe_prompt_memory parts(dst);
    const int64_t n_k       = parts.n_k;
    const int64_t n_v       = parts.n_v;
    const int64_t n_queries = parts.n_head * n_tokens; // [n_head][n_tokens]

    float * queries = memory;
    float * sums    = queries + parts.n_queries() * n_k;
    float * keys    = sums    + parts.n_queries() * n_v;
    float * values  = keys    + HYMOE_PROMPT_ROWS * n_k;
    float * scores  = values  + HYMOE_PROMPT_ROWS * n_v;
    float * bias    = scores  + parts.n_scores();
    hymoe_softmax softmax[HYMOE_ATTEND_HEADS * HYMOE_PROMPT_TOKENS];

    float scale = 1.0f;
    memcpy(&scale, (const float *) dst->op_params + 0, sizeof(float));
    for (int64_t i = 0; i < n_queries; i++) {
        const int64_t head = kv_head * parts.n_head + i / n_tokens;
        const char * query = (const char *) q->data + head * q->nb[2] + (token + i % n_tokens) * q->nb[1];
        memcpy(queries + i * n_k, query, n_k * sizeof(float));
    }
    ggml_vec_scale_f32(n_queries * n_k, queries, scale);
    memset(sums, 0, n_queries * n_v * sizeof(float));

    for (int64_t row = 0; row < k->ne[1]; row += HYMOE_PROMPT_ROWS) {
        const int64_t n = std::min(HYMOE_PROMPT_ROWS, k->ne[1] - row);
        const hymoe_seen seen = hymoe_read_mask(dst->src[3], token, n_tokens, row, n, bias);
        if (seen == hymoe_seen::NOTHING) {
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            float key[HYMOE_ATTEND_DIMS];
            hymoe_read_row(k, row + i, kv_head, key);
            for (int64_t dim = 0; dim < n_k; dim++) {
                keys[dim * n + i] = key[dim];
            }
            hymoe_read_row(v, row + i, kv_head, values + i * n_v);
        }
        // As many queries at a time as one head has of a whole piece, so that their scores stay in the cache.
        for (int64_t first = 0; first < n_queries; first += HYMOE_PROMPT_TOKENS) {
            const int64_t m = std::min(HYMOE_PROMPT_TOKENS, n_queries - first);
            memset(scores, 0, m * n * sizeof(float));
            for (int64_t i = 0; i < m && seen == hymoe_seen::SOME; i++) {
                ggml_vec_cpy_f32(n, scores + i * n, bias + (first + i) % n_tokens * n);
            }
            simd_gemm(scores, queries + first * n_k, keys, m, n_k, n);
            for (int64_t i = 0; i < m; i++) {
                softmax[first + i].weigh(n, scores + i * n, n_v, sums + (first + i) * n_v);
            }
            simd_gemm(sums + first * n_v, scores, values, m, n, n_v);
        }
    }

    for (int64_t i = 0; i < n_queries; i++) {
        const int64_t head = kv_head * parts.n_head + i / n_tokens;
        float * out = (float *) ((char *) dst->data + head * dst->nb[1] + (token + i % n_tokens) * dst->nb[2]);
        const float weight = softmax[i].sum;
        ggml_vec_cpy_f32(n_v, out, sums + i * n_v);
        ggml_vec_scale_f32(n_v, out, weight > 0.0f ? 1.0f / weight : 0.0f);
    }
}

// Attends for all tokens, a piece of them for one key head at a time, in `params->wdata`.
static void hymoe_attend_prompt(const ggml_compute_params * params, const ggml_tensor * dst) {
    const int64_t n_tokens  = dst->src[0]->ne[1];
    const int64_t n_kv_head = dst->src[1]->ne[2];
    const auto n_pieces = [&](int64_t size) { return (n_tokens + size - 1) / size * n_kv_head; };

    int64_t size = HYMOE_PROMPT_TOKENS;
    while (size > 1 && n_pieces(size) < params->nth) {
        size /= 2;
    }

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    float * memory = (float *) ((char *) params->wdata + params->ith * hymoe_attention_wsize(dst));
    // The last tokens see most: they come first, so that no thread is left with them at the end.
    for (int64_t piece = n_pieces(size) - 1 - params->ith; piece >= 0;
            piece = n_pieces(size) - 1 - ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t token = piece / n_kv_head * size;
        hymoe_attend_tokens(dst, piece % n_kv_head, token, std::min(size, n_tokens - token), memory);
    }
}
