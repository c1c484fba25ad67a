// What the server does and says about the router of a HunYuan model.
#pragma once

#include "server-common.h"

#include "hymoe.h"

#include <sstream>
#include <string>
#include <vector>

using server_expert_counts = std::vector<hymoe_expert_count>; // [n_layer]

// Whether a prompt must be computed by itself, whole and from its first token: who gets an expert depends on it all.
inline bool server_routes_whole_prompts(const llama_model * model) {
    const char * mode = model ? hymoe_router_mode_name(model) : nullptr;
    return mode && std::string(mode) == "capacity";
}

// Counts of one sequence, or with -1 of all; empty for models without a router of this family.
inline server_expert_counts server_count_experts(const llama_context * ctx, llama_seq_id seq_id) {
    server_expert_counts counts(llama_model_n_layer(llama_get_model(ctx)));
    counts.resize(hymoe_expert_usage(ctx, seq_id, counts.data(), counts.size()));
    return counts;
}

// Experts per token and layer; null where no token was seen.
inline json server_mean_experts(const server_expert_counts & counts) {
    hymoe_expert_count sum = { 0, 0 };
    for (const auto & count : counts) {
        sum.n_tokens  += count.n_tokens;
        sum.n_experts += count.n_experts;
    }
    return sum.n_tokens ? json(double(sum.n_experts) / sum.n_tokens) : json();
}

inline server_expert_counts server_count_between(const server_expert_counts & from, const server_expert_counts & to) {
    server_expert_counts counts = to;
    for (size_t il = 0; il < counts.size(); ++il) {
        counts[il].n_tokens  -= from[il].n_tokens;
        counts[il].n_experts -= from[il].n_experts;
    }
    return counts;
}

// How many experts the tokens of one request got.
class server_expert_usage {
public:
    // Forgets what was; `on`: the request asks for it.
    void begin(const llama_context * ctx, llama_seq_id seq_id, bool on) {
        this->ctx    = on ? ctx : nullptr;
        this->seq_id = seq_id;
        at_begin     = on ? server_count_experts(ctx, seq_id) : server_expert_counts();
        at_prompt    = at_begin;
    }

    void prompt_done() {
        if (ctx) {
            at_prompt = server_count_experts(ctx, seq_id);
        }
    }

    // {"mode", "prompt", "predicted": means, "layers": mean of each layer}; null where nobody asked or nobody counts.
    json to_json() const {
        if (at_begin.empty()) {
            return json();
        }
        const auto now = server_count_experts(ctx, seq_id);
        json layers = json::array();
        for (const auto & count : server_count_between(at_begin, now)) {
            layers.push_back(server_mean_experts({ count }));
        }
        return json {
            {"mode",      hymoe_router_mode_name(llama_get_model(ctx))},
            {"prompt",    server_mean_experts(server_count_between(at_begin, at_prompt))},
            {"predicted", server_mean_experts(server_count_between(at_prompt, now))},
            {"layers",    layers},
        };
    }

private:
    const llama_context * ctx    = nullptr;
    llama_seq_id          seq_id = -1;

    server_expert_counts at_begin;
    server_expert_counts at_prompt;
};

// Since the server began, in the text form of Prometheus; empty where nobody counts.
inline std::string server_expert_metrics(const server_expert_counts & before, const server_expert_counts & now) {
    const auto counts = server_count_between(before, now);
    if (counts.empty()) {
        return "";
    }
    const auto head = [](const char * name, const char * help, const char * type) {
        return std::string("# HELP llamacpp:") + name + " " + help + "\n# TYPE llamacpp:" + name + " " + type + "\n";
    };
    std::stringstream out;
    out << head("experts_used_total", "Experts that the tokens of a layer got", "counter");
    for (size_t il = 0; il < counts.size(); ++il) {
        out << "llamacpp:experts_used_total{layer=\"" << il << "\"} " << counts[il].n_experts << "\n";
    }
    out << head("expert_tokens_total", "Tokens that a layer routed", "counter");
    for (size_t il = 0; il < counts.size(); ++il) {
        out << "llamacpp:expert_tokens_total{layer=\"" << il << "\"} " << counts[il].n_tokens << "\n";
    }
    const json mean = server_mean_experts(counts);
    out << head("experts_used_per_token", "Mean number of experts per token and layer", "gauge");
    out << "llamacpp:experts_used_per_token " << (mean.is_null() ? 0.0 : mean.get<double>()) << "\n";
    return out.str();
}
