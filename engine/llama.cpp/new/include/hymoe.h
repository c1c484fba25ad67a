// What hymoe adds to llama.h: the router of a HunYuan model, and how many experts its tokens got.
#pragma once

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

// Since the context was made: (token, layer) pairs of one layer, and experts that they read.
struct hymoe_expert_count {
    uint64_t n_tokens;
    uint64_t n_experts;
};

// "topk", "capacity" or "adaptive"; null for models without a router of this family.
LLAMA_API const char * hymoe_router_mode_name(const struct llama_model * model);

// Writes one count per layer, n_max at most, of the tokens of sequence seq_id (-1: of all sequences).
// Returns how many were written: the model's layers, or 0 for models without a router of this family.
// May be called while the context is computing.
LLAMA_API int32_t hymoe_expert_usage(
        const struct llama_context * ctx, llama_seq_id seq_id, struct hymoe_expert_count * counts, int32_t n_max);

#ifdef __cplusplus
}
#endif
