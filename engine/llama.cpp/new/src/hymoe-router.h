// Which of its k experts a token gets: data that a model and a context of the HunYuan family carry.
#pragma once

#include "llama.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct hymoe_expert_count;
struct llama_batch_ext;
struct llama_hparams;
struct llama_memory_i;
struct llama_model_loader;

enum hymoe_router_mode : uint32_t {
    HYMOE_ROUTER_NONE = 0, // the model's architecture has no router modes
    HYMOE_ROUTER_TOPK,     // all k
    HYMOE_ROUTER_CAPACITY, // those that had room, counted over the whole prompt: the published gating
    HYMOE_ROUTER_ADAPTIVE, // min_experts, and further ones with p >= threshold * p_max
};

// Part of llama_hparams: trivially copyable.
struct hymoe_router {
    hymoe_router_mode mode        = HYMOE_ROUTER_NONE;
    uint32_t          min_experts = 0;
    float             threshold   = 0.0f;
};

// Reads <arch>.router.mode, .min_experts and .threshold, or what overrides them; a file without them has "topk".
// Throws std::runtime_error with key and value where one has a wrong type, is unknown or out of range.
// Layers have least_used to most_used experts per token. Where that is 1 in all of them the mode is "topk" whatever is asked
// for, and min_experts is not looked at.
hymoe_router hymoe_router_load(const llama_model_loader & ml, uint32_t least_used, uint32_t most_used);

// Why a batch cannot be routed as one forward of one sequence, or an empty string where it can or need not be.
// With "capacity" the tokens that begin a sequence are its prompt: they come in a batch of their own and fit one
// ubatch; after that a sequence grows by one token at a time.
std::string hymoe_router_refusal(
        const hymoe_router & router, const llama_batch_ext & batch, const llama_memory_i & memory, uint32_t n_ubatch);

// Counts by sequence and layer. Written by the thread that computes, read by any.
class hymoe_expert_counter {
public:
    hymoe_expert_counter(int32_t n_seq, int32_t n_layer);

    void add(llama_seq_id seq_id, int32_t il, uint64_t n_tokens, uint64_t n_experts);

    int32_t read(llama_seq_id seq_id, hymoe_expert_count * counts, int32_t n_max) const;

private:
    const int32_t n_seq;
    const int32_t n_layer;

    // [n_seq][n_layer][tokens, experts]
    std::vector<std::array<std::atomic<uint64_t>, 2>> counts;
};

// A counter for a context of this model; null where its architecture has no router modes.
std::shared_ptr<hymoe_expert_counter> hymoe_count_experts(const llama_hparams & hparams);
