// Router modes of the HunYuan family as data: what a file asks for, which batches that allows, who used how many experts.
// See ../hymoe-router.h; the graph is hymoe-routed-ffn.cpp.

#include "../hymoe-router.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-memory.h"
#include "llama-model-loader.h"

#include "hymoe.h"

#include <algorithm>
#include <stdexcept>

// -- metadata --------------------------------------------------------------------------------------------------------

namespace {

struct hymoe_mode_name {
    hymoe_router_mode mode;
    const char *      name;
};

const hymoe_mode_name hymoe_mode_names[] = {
    { HYMOE_ROUTER_TOPK,     "topk"     },
    { HYMOE_ROUTER_CAPACITY, "capacity" },
    { HYMOE_ROUTER_ADAPTIVE, "adaptive" },
};

const uint32_t HYMOE_DEFAULT_MIN_EXPERTS = 4;
const float    HYMOE_DEFAULT_THRESHOLD   = 0.1f;

// One of the router's keys. The loader's own get_key ignores an override of another type and goes on with what the
// file says; here that is an error, as a mode that is not the one asked for would be.
class hymoe_router_key {
public:
    hymoe_router_key(const llama_model_loader & ml, const char * name) :
            key(ml.get_arch_name() + ".router." + name), metadata(ml.metadata), id(gguf_find_key(ml.metadata, key.c_str())) {
        const auto found = ml.kv_overrides.find(key);
        override = found == ml.kv_overrides.end() ? nullptr : &found->second;
    }

    std::string text(const std::string & absent) const {
        if (override) {
            require(override->tag == LLAMA_KV_OVERRIDE_TYPE_STR, "a string (str:...)");
            return override->val_str;
        }
        if (id < 0) {
            return absent;
        }
        require(gguf_get_kv_type(metadata, id) == GGUF_TYPE_STRING, "a string");
        return gguf_get_val_str(metadata, id);
    }

    int64_t whole(int64_t absent) const {
        if (override) {
            require(override->tag == LLAMA_KV_OVERRIDE_TYPE_INT, "an integer (int:...)");
            return override->val_i64;
        }
        if (id < 0) {
            return absent;
        }
        require(gguf_get_kv_type(metadata, id) == GGUF_TYPE_UINT32, "an integer (uint32)");
        return gguf_get_val_u32(metadata, id);
    }

    double real(double absent) const {
        if (override) {
            require(override->tag == LLAMA_KV_OVERRIDE_TYPE_FLOAT, "a number (float:...)");
            return override->val_f64;
        }
        if (id < 0) {
            return absent;
        }
        require(gguf_get_kv_type(metadata, id) == GGUF_TYPE_FLOAT32, "a number (float32)");
        return gguf_get_val_f32(metadata, id);
    }

    [[noreturn]] void refuse(const std::string & value, const std::string & expected) const {
        throw std::runtime_error(key + " is " + value + ": expected " + expected);
    }

    const std::string key;

private:
    void require(bool right, const char * expected) const {
        if (!right) {
            throw std::runtime_error(key + " has another type: expected " + expected);
        }
    }

    const gguf_context *            metadata;
    const int64_t                   id;
    const llama_model_kv_override * override;
};

// A misspelt key would leave the mode as it is without a word.
void hymoe_refuse_unknown_overrides(const llama_model_loader & ml) {
    const std::string prefix = ml.get_arch_name() + ".router.";
    for (const auto & entry : ml.kv_overrides) {
        const std::string & key = entry.first;
        if (key.compare(0, prefix.size(), prefix) != 0) {
            continue;
        }
        const std::string name = key.substr(prefix.size());
        if (name != "mode" && name != "min_experts" && name != "threshold") {
            throw std::runtime_error(key + ": unknown; expected mode, min_experts or threshold after \"" + prefix + "\"");
        }
    }
}

} // namespace

hymoe_router hymoe_router_load(const llama_model_loader & ml, uint32_t least_used, uint32_t most_used) {
    const hymoe_router_key mode       (ml, "mode");
    const hymoe_router_key min_experts(ml, "min_experts");
    const hymoe_router_key threshold  (ml, "threshold");

    hymoe_refuse_unknown_overrides(ml);

    hymoe_router router;

    const std::string name = mode.text("topk");
    for (const auto & known : hymoe_mode_names) {
        if (name == known.name) {
            router.mode = known.mode;
        }
    }
    if (router.mode == HYMOE_ROUTER_NONE) {
        mode.refuse("\"" + name + "\"", "topk, capacity or adaptive");
    }

    const double share = threshold.real(HYMOE_DEFAULT_THRESHOLD);
    if (!(share >= 0.0 && share <= 1.0)) { // nor NaN
        threshold.refuse(format("%g", share), "0 to 1");
    }
    router.threshold = float(share);

    if (most_used == 1) { // nothing to drop, whatever is asked for
        router.mode        = HYMOE_ROUTER_TOPK;
        router.min_experts = 1;
        return router;
    }
    const int64_t least = min_experts.whole(std::min(HYMOE_DEFAULT_MIN_EXPERTS, least_used));
    if (least < 1 || least > least_used) {
        min_experts.refuse(std::to_string(least), "1 to " + std::to_string(least_used) + ", the experts per token");
    }
    router.min_experts = uint32_t(least);
    return router;
}

std::string hymoe_router_refusal(
        const hymoe_router & router, const llama_batch_ext & batch, const llama_memory_i & memory, uint32_t n_ubatch) {
    const size_t n_tokens = batch.tokens.size();
    if (router.mode != HYMOE_ROUTER_CAPACITY || n_tokens < 2) {
        return "";
    }
    std::vector<size_t> count(LLAMA_MAX_SEQ, 0);
    for (const auto & token : batch.tokens) {
        if (token.seq_ids.size() != 1) {
            return format("a token of %zu sequences among %zu tokens: a prompt is one sequence's", token.seq_ids.size(), n_tokens);
        }
        for (const llama_seq_id seq_id : token.seq_ids) {
            ++count[seq_id];
        }
    }
    for (llama_seq_id seq_id = 0; seq_id < LLAMA_MAX_SEQ; ++seq_id) {
        if (count[seq_id] < 2) {
            continue;
        }
        if (memory.seq_pos_max(seq_id) >= 0) {
            return format("%zu tokens at once for sequence %d, which has begun: a prompt is given whole, then one token at a time",
                count[seq_id], seq_id);
        }
        if (count[seq_id] != n_tokens) {
            return format("the prompt of sequence %d shares its batch with other sequences", seq_id);
        }
        if (batch.tokens[0].pos[0] != 0) {
            return format("the prompt of sequence %d begins at position %d: expected 0", seq_id, batch.tokens[0].pos[0]);
        }
        if (n_tokens > n_ubatch) {
            return format("a prompt of %zu tokens: at most %u (n_ubatch) at once", n_tokens, n_ubatch);
        }
    }
    return "";
}

// -- counting --------------------------------------------------------------------------------------------------------

hymoe_expert_counter::hymoe_expert_counter(int32_t n_seq, int32_t n_layer) :
        n_seq(n_seq), n_layer(n_layer), counts(size_t(n_seq) * n_layer) {
    for (auto & count : counts) {
        count[0] = 0;
        count[1] = 0;
    }
}

void hymoe_expert_counter::add(llama_seq_id seq_id, int32_t il, uint64_t n_tokens, uint64_t n_experts) {
    if (seq_id < 0 || seq_id >= n_seq || il >= n_layer) {
        return;
    }
    auto & count = counts[size_t(seq_id) * n_layer + il];
    count[0].fetch_add(n_tokens,  std::memory_order_relaxed);
    count[1].fetch_add(n_experts, std::memory_order_relaxed);
}

int32_t hymoe_expert_counter::read(llama_seq_id seq_id, hymoe_expert_count * out, int32_t n_max) const {
    const int32_t n = std::min(n_max, n_layer);
    std::fill(out, out + n, hymoe_expert_count { 0, 0 });
    for (llama_seq_id s = std::max(seq_id, 0); s < (seq_id < 0 ? n_seq : std::min(seq_id + 1, n_seq)); ++s) {
        for (int32_t il = 0; il < n; ++il) {
            const auto & count = counts[size_t(s) * n_layer + il];
            out[il].n_tokens  += count[0].load(std::memory_order_relaxed);
            out[il].n_experts += count[1].load(std::memory_order_relaxed);
        }
    }
    return n;
}

std::shared_ptr<hymoe_expert_counter> hymoe_count_experts(const llama_hparams & hparams) {
    if (hparams.router.mode == HYMOE_ROUTER_NONE) {
        return nullptr;
    }
    return std::make_shared<hymoe_expert_counter>(LLAMA_MAX_SEQ, hparams.n_layer());
}

int32_t hymoe_expert_usage(const llama_context * ctx, llama_seq_id seq_id, hymoe_expert_count * counts, int32_t n_max) {
    const auto & counter = ctx->get_cparams().expert_counter;
    return counter ? counter->read(seq_id, counts, n_max) : 0;
}

const char * hymoe_router_mode_name(const llama_model * model) {
    for (const auto & known : hymoe_mode_names) {
        if (known.mode == model->hparams.router.mode) {
            return known.name;
        }
    }
    return nullptr;
}
