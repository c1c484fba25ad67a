// The graph that HunYuan's mixtures of experts have in common; what they differ in, the attention, is virtual.

#pragma once

#include "hymoe-routed-ffn.h"
#include "models.h"

struct hunyuan_moe_graph : public llm_graph_context {
    hunyuan_moe_graph(const llama_model & model, const llm_graph_params & params);

    void build();

protected:
    ggml_tensor * rotate(ggml_tensor * x, int il) const;
    ggml_tensor * rms(ggml_tensor * x, ggml_tensor * weight, const char * name, int il) const;

    virtual ggml_tensor * attention(ggml_tensor * x, int il) const; // [n_embd, n_tokens], W_o applied

    const llama_model & model;

    ggml_tensor             * positions = nullptr; // [n_tokens]
    llm_graph_input_attn_kv * kv        = nullptr;
    hymoe_router_input      * router    = nullptr;
    ggml_tensor             * outputs   = nullptr; // [n_outputs] rows that the caller wants, null where that is all

private:
    ggml_tensor * shared_expert(ggml_tensor * x, int il) const;
    ggml_tensor * wanted_rows(ggml_tensor * x) const;
    ggml_tensor * layer(ggml_tensor * x, int il) const;
    void          head(ggml_tensor * x);
};
