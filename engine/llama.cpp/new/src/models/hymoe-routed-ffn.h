// The routed part of a HunYuan feed-forward block, in all router modes (see ../hymoe-router.h).
#pragma once

#include "llama-graph.h"
#include "llama-model.h"

#include "../hymoe-router.h"

#include <vector>

// What routing needs to know about the tokens of a ubatch. It has no tensors: the operations that choose run on the
// CPU and read it from here.
class hymoe_router_input : public llm_graph_input_i {
public:
    hymoe_router_input(const llm_graph_context & graph);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // How a slot whose expert was dropped fills its place.
    struct layer {
        const hymoe_router_input * input;

        int32_t il;
        int32_t n_expert;
        int32_t n_used;       // experts per token before any is dropped
        bool    outputs_only; // the layer sees only the tokens whose output is asked for
        bool    skip;         // with -1, which reads nothing; else with an expert weighted 0 that another token keeps
        bool    repeat;       // a single token's may be its own first choice; else its dropped experts' weights are read
    };

    // -- written while the graph is built

    std::vector<layer> layers; // [n_layer]

    // -- written for every ubatch

    bool is_prompt = false; // the ubatch is the beginning of one sequence and nothing else

    std::vector<llama_seq_id> seq_all; // [n_tokens]
    std::vector<llama_seq_id> seq_out; // [n_outputs]

    const hymoe_router router;

    const std::shared_ptr<hymoe_expert_counter> counter; // null: nobody counts
};

// Makes the graph's one input of this kind; to be called once, before the layers.
hymoe_router_input * hymoe_build_router_input(const llm_graph_context & graph);

// Whether layer il must see all tokens, even those whose output nobody asks for: then the caller picks the rows
// that are asked for after the block, else before it.
bool hymoe_routes_all_tokens(const llm_graph_context & graph, int il);

// Sum of the chosen experts' answers, weighted: x [n_embd, n_rows] -> [n_embd, n_rows]. The experts are SwiGLU, the
// gating is softmax over n_expert; hparams say how many a token gets and whether their weights are normalised.
// `outputs_only`: x has the rows of the outputs only.
ggml_tensor * hymoe_build_routed_ffn(
        const llm_graph_context & graph, hymoe_router_input * input, const llama_layer & w, ggml_tensor * x,
        bool outputs_only, int il);
