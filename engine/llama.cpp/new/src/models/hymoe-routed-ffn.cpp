// The routed part of a feed-forward block: see hymoe-routed-ffn.h.
//
//   p    = softmax(W y)                       y: a token, p: one probability per expert
//   S    = the k largest of p, in order
//   w_e  = p_e / sum_S p                      where the file says so
//
// "capacity" drops pairs (token, expert) after the normalisation, "adaptive" before it; a dropped pair has weight 0.
// What is kept goes through the operations of the stock graph in the stock order, so that a mode in which nothing
// is dropped gives the bits of "topk".

#include "hymoe-routed-ffn.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// -- the ubatch ------------------------------------------------------------------------------------------------------

hymoe_router_input::hymoe_router_input(const llm_graph_context & graph) :
        layers(graph.n_layer), router(graph.hparams.router), counter(graph.cparams.expert_counter) {
}

bool hymoe_router_input::can_reuse(const llm_graph_params & /*params*/) {
    return true; // what shapes the graph is compared by the caller
}

void hymoe_router_input::set_input(const llama_ubatch * ubatch) {
    is_prompt = ubatch->n_tokens > 1 && ubatch->n_seqs_unq == 1 && ubatch->pos && ubatch->pos[0] == 0;

    seq_all.clear();
    seq_out.clear();
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch->n_seq_id[i] > 0 ? ubatch->seq_id[i][0] : -1;
        seq_all.push_back(seq_id);
        if (!ubatch->output || ubatch->output[i]) {
            seq_out.push_back(seq_id);
        }
    }
    for (const auto & layer : layers) {
        if (!counter || (router.mode != HYMOE_ROUTER_TOPK && layer.n_used > 1)) {
            continue; // the operation that chooses counts
        }
        for (const llama_seq_id seq_id : layer.outputs_only ? seq_out : seq_all) {
            counter->add(seq_id, layer.il, 1, layer.n_used);
        }
    }
}

hymoe_router_input * hymoe_build_router_input(const llm_graph_context & graph) {
    auto input = std::make_unique<hymoe_router_input>(graph);
    return static_cast<hymoe_router_input *>(graph.res->add_input(std::move(input)));
}

// -- the operations that choose --------------------------------------------------------------------------------------

namespace {

bool hymoe_is_repacked(const ggml_tensor * weights) {
    return weights->buffer && strcmp(ggml_backend_buffer_name(weights->buffer), "CPU_REPACK") == 0;
}

// Element (r, t) of a tensor [k, n_tokens], whatever its strides.
template <typename T> T & hymoe_at(const ggml_tensor * x, int64_t r, int64_t t) {
    return *(T *) ((char *) x->data + r*x->nb[0] + t*x->nb[1]);
}

// dst[k, n_tokens] = weights with 0 for the dropped. Sources: weights [k, n_tokens], largest first.
void hymoe_drop_small(ggml_tensor * dst, int ith, int /*nth*/, void * userdata) {
    if (ith > 0) {
        return;
    }
    const auto & router  = ((const hymoe_router_input::layer *) userdata)->input->router;
    const auto * weights = dst->src[0];

    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        const float least = router.threshold * hymoe_at<float>(weights, 0, t);
        for (int64_t r = 0; r < dst->ne[0]; ++r) {
            const float weight = hymoe_at<float>(weights, r, t);
            // with a NaN nothing is dropped: "adaptive" with threshold 0 is "topk" there too
            hymoe_at<float>(dst, r, t) = r >= router.min_experts && weight < least ? 0.0f : weight;
        }
    }
}

// dst[k, n_tokens] = weights with 0 for the pairs whose expert was full. Sources: weights and experts [k, n_tokens],
// largest first. Decoding, which is every ubatch that is not a prompt, drops nothing.
void hymoe_drop_over_capacity(ggml_tensor * dst, int ith, int /*nth*/, void * userdata) {
    if (ith > 0) {
        return;
    }
    const auto & layer   = *(const hymoe_router_input::layer *) userdata;
    const auto * weights = dst->src[0];
    const auto * experts = dst->src[1];

    const int64_t k        = dst->ne[0];
    const int64_t n_tokens = dst->ne[1];
    const int64_t capacity = layer.input->is_prompt ? std::max(k, k*n_tokens/layer.n_expert) : INT64_MAX;

    std::vector<int64_t> count(layer.n_expert, 0);
    for (int64_t r = 0; r < k; ++r) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            // a dropped pair is counted as well
            const bool kept = count[hymoe_at<int32_t>(experts, r, t)]++ < capacity;
            hymoe_at<float>(dst, r, t) = kept ? hymoe_at<float>(weights, r, t) : 0.0f;
        }
    }
}

// An expert for a dropped slot of token t where it must be a valid one: one that some token keeps, so that it is read
// anyway, and that no other slot of this token has, since GPU kernels for batches look a token up once per expert. Where
// nobody keeps such a one, as for a single token, it is one that is then read for nothing.
int32_t hymoe_stand_in(const ggml_tensor * experts, int64_t t, const std::vector<char> & read) {
    int32_t unread = 0;
    for (int32_t expert = 0; expert < (int32_t) read.size(); ++expert) {
        bool taken = false;
        for (int64_t r = 0; r < experts->ne[0]; ++r) {
            taken |= hymoe_at<int32_t>(experts, r, t) == expert;
        }
        if (!taken && read[expert]) {
            return expert;
        }
        unread = taken ? unread : expert;
    }
    return unread;
}

// dst[k, n_tokens] = experts, with what their layer says in dropped slots. Sources: the experts and the weights that
// are left of them, both [k, n_tokens]. Counts what is kept.
void hymoe_fill_dropped(ggml_tensor * dst, int ith, int /*nth*/, void * userdata) {
    if (ith > 0) {
        return;
    }
    const auto & layer = *(const hymoe_router_input::layer *) userdata;
    const auto & seqs  = layer.outputs_only ? layer.input->seq_out : layer.input->seq_all;

    std::vector<char> read(layer.n_expert, 0);
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        uint64_t n_kept = 0;
        for (int64_t r = 0; r < dst->ne[0]; ++r) {
            const int32_t expert = hymoe_at<int32_t>(dst->src[0], r, t);
            const bool    kept   = hymoe_at<float>  (dst->src[1], r, t) != 0.0f;

            hymoe_at<int32_t>(dst, r, t) = kept ? expert : -1;
            read[expert] |= kept;
            n_kept       += kept;
        }
        if (layer.input->counter) {
            layer.input->counter->add(seqs[t], layer.il, 1, n_kept);
        }
    }
    if (layer.skip) {
        return;
    }
    const bool repeat = layer.repeat && dst->ne[1] == 1;
    for (int64_t t = 0; t < dst->ne[1]; ++t) {
        for (int64_t r = 0; r < dst->ne[0]; ++r) {
            int32_t & expert = hymoe_at<int32_t>(dst, r, t);
            if (expert < 0) {
                expert = repeat ? hymoe_at<int32_t>(dst->src[0], 0, t) : hymoe_stand_in(dst, t, read);
            }
        }
    }
}

// Whether the scheduler leaves a product of expert weights to the CPU's own code, which understands -1: the weights
// lie in its memory and no other backend would take the operation, here or by copying the weights.
bool hymoe_runs_on_cpu(const llm_graph_context & g, const ggml_tensor * node) {
    const ggml_backend_buffer_t buffer = node->src[0]->buffer;
    if (!buffer) {
        return false;
    }
    const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(buffer);
    if (!ggml_backend_buffer_is_host(buffer) && !hymoe_is_repacked(node->src[0])) {
        return false;
    }
    for (int i = 0; i < ggml_backend_sched_get_n_backends(g.sched); ++i) {
        const ggml_backend_t backend = ggml_backend_sched_get_backend(g.sched, i);
        if (backend == g.backend_cpu || !ggml_backend_supports_op(backend, node)) {
            continue;
        }
        if (ggml_backend_supports_buft(backend, type) || (g.cparams.op_offload && ggml_backend_offload_op(backend, node))) {
            return false;
        }
    }
    return true;
}

// An operation of ours on [k, n_tokens], pinned to the CPU: a backend that says yes to everything, as RPC does, could
// not call it.
ggml_tensor * hymoe_cpu_op(
        const llm_graph_context & g, ggml_type type, ggml_tensor * a, ggml_tensor * b, ggml_custom_op_t op,
        hymoe_router_input::layer & layer) {
    ggml_tensor * sources[] = { a, b };
    ggml_tensor * out = ggml_custom_4d(g.ctx0, type, a->ne[0], a->ne[1], 1, 1, sources, 2, op, 1, &layer);
    ggml_backend_sched_set_tensor_backend(g.sched, out, g.backend_cpu);
    return out;
}

// weights [k, n_tokens] divided by their sum; the smallest divisor is stock's
ggml_tensor * hymoe_normalise(const llm_graph_context & g, ggml_tensor * weights, int il) {
    ggml_tensor * sum = ggml_sum_rows(g.ctx0, weights); // [1, n_tokens]
    g.cb(sum, "ffn_moe_weights_sum", il);
    sum = ggml_clamp(g.ctx0, sum, 6.103515625e-5, INFINITY);
    g.cb(sum, "ffn_moe_weights_sum_clamped", il);
    weights = ggml_div(g.ctx0, weights, sum);
    g.cb(weights, "ffn_moe_weights_norm", il);
    return weights;
}

// What the experts answer, one by one: x [n_embd, n_tokens], experts [k, n_tokens] -> [n_embd, k, n_tokens]
ggml_tensor * hymoe_experts(
        const llm_graph_context & g, const llama_layer & w, ggml_tensor * x, ggml_tensor * experts,
        hymoe_router_input::layer & layer) {
    const int il = layer.il;

    x = ggml_reshape_3d(g.ctx0, x, x->ne[0], 1, x->ne[1]);

    ggml_tensor * up = g.build_lora_mm_id(w.ffn_up_exps, x, experts, w.ffn_up_exps_s);
    g.cb(up, "ffn_moe_up", il);
    ggml_tensor * gate = g.build_lora_mm_id(w.ffn_gate_exps, x, experts, w.ffn_gate_exps_s);
    g.cb(gate, "ffn_moe_gate", il);
    ggml_tensor * inner = ggml_swiglu_split(g.ctx0, gate, up);
    g.cb(inner, "ffn_moe_swiglu", il);
    ggml_tensor * down = g.build_lora_mm_id(w.ffn_down_exps, inner, experts, w.ffn_down_exps_s);
    g.cb(down, "ffn_moe_down", il);

    // adapters and scales index their own tensors with the experts; a callback (imatrix, debugging) may as well
    const bool others = !g.loras->empty() || w.ffn_up_exps_s || w.ffn_gate_exps_s || w.ffn_down_exps_s || g.cparams.cb_eval;

    layer.skip   = !others;
    layer.repeat = true;
    for (const ggml_tensor * node : { up, gate, down }) {
        layer.skip = layer.skip && hymoe_runs_on_cpu(g, node);
        // of these two, repacked weights have room for a token once per expert, and kernels for floats find it once
        layer.repeat = layer.repeat && node->op == GGML_OP_MUL_MAT_ID && ggml_is_quantized(node->src[0]->type) &&
            !hymoe_is_repacked(node->src[0]);
    }
    return down;
}

// sum over k of x [n_embd, k, n_tokens], in stock's order
ggml_tensor * hymoe_sum_slots(const llm_graph_context & g, ggml_tensor * x) {
    ggml_build_forward_expand(g.gf, x);

    std::vector<ggml_tensor *> slots;
    for (int64_t r = 0; r < x->ne[1]; ++r) {
        slots.push_back(ggml_view_2d(g.ctx0, x, x->ne[0], x->ne[2], x->nb[2], r*x->nb[1]));
        ggml_build_forward_expand(g.gf, slots.back());
    }
    ggml_tensor * sum = slots[0];
    for (size_t r = 1; r < slots.size(); ++r) {
        sum = ggml_add(g.ctx0, sum, slots[r]);
        ggml_build_forward_expand(g.gf, sum);
    }
    return sum;
}

// The k likeliest experts of x [n_embd, n_tokens] and their probabilities, both [k, n_tokens].
struct hymoe_choice {
    ggml_tensor * experts;
    ggml_tensor * weights;
};

hymoe_choice hymoe_choose(
        const llm_graph_context & g, const llama_layer & w, ggml_tensor * x, const hymoe_router_input::layer & layer) {
    const int il = layer.il;

    ggml_tensor * logits = g.build_lora_mm(w.ffn_gate_inp, x); // [n_expert, n_tokens]
    g.cb(logits, "ffn_moe_logits", il);
    ggml_tensor * probs = ggml_soft_max(g.ctx0, logits);
    g.cb(probs, "ffn_moe_probs", il);
    ggml_tensor * experts = ggml_argsort_top_k(g.ctx0, probs, layer.n_used);
    g.cb(experts->src[0], "ffn_moe_argsort", il);
    g.cb(experts, "ffn_moe_topk", il);

    probs = ggml_reshape_3d(g.ctx0, probs, 1, layer.n_expert, x->ne[1]);
    ggml_tensor * weights = ggml_get_rows(g.ctx0, probs, experts); // [1, k, n_tokens]
    g.cb(weights, "ffn_moe_weights", il);
    return { experts, ggml_reshape_2d(g.ctx0, weights, layer.n_used, x->ne[1]) };
}

// What the router's mode leaves of a choice, with the weights that are summed with.
hymoe_choice hymoe_drop(const llm_graph_context & g, const hymoe_choice & choice, hymoe_router_input::layer & layer) {
    const int  il        = layer.il;
    const bool normalise = g.hparams.expert_weights_norm;
    const bool capacity  = layer.input->router.mode == HYMOE_ROUTER_CAPACITY;

    ggml_tensor * weights = choice.weights;
    if (capacity && normalise) {
        weights = hymoe_normalise(g, weights, il);
    }
    weights = hymoe_cpu_op(g, GGML_TYPE_F32, weights, choice.experts, capacity ? hymoe_drop_over_capacity : hymoe_drop_small, layer);
    g.cb(weights, "ffn_moe_weights_kept", il);
    ggml_tensor * experts = hymoe_cpu_op(g, GGML_TYPE_I32, choice.experts, weights, hymoe_fill_dropped, layer);
    g.cb(experts, "ffn_moe_topk_kept", il);
    if (!capacity && normalise) {
        weights = hymoe_normalise(g, weights, il);
    }
    if (const float scale = g.hparams.expert_weights_scale; scale != 0.0f && scale != 1.0f) {
        weights = ggml_scale(g.ctx0, weights, scale);
        g.cb(weights, "ffn_moe_weights_scaled", il);
    }
    return { experts, weights };
}

// The block where experts may be dropped; k > 1.
ggml_tensor * hymoe_build_dropping(
        const llm_graph_context & g, const llama_layer & w, ggml_tensor * x, hymoe_router_input::layer & layer) {
    const hymoe_choice kept = hymoe_drop(g, hymoe_choose(g, w, x, layer), layer);

    ggml_tensor * weights = ggml_reshape_3d(g.ctx0, kept.weights, 1, layer.n_used, x->ne[1]);
    ggml_build_forward_expand(g.gf, weights);

    ggml_tensor * answers = ggml_mul(g.ctx0, hymoe_experts(g, w, x, kept.experts, layer), weights);
    g.cb(answers, "ffn_moe_weighted", layer.il);
    return hymoe_sum_slots(g, answers);
}

} // namespace

// -- the block -------------------------------------------------------------------------------------------------------

bool hymoe_routes_all_tokens(const llm_graph_context & graph, int il) {
    return graph.hparams.router.mode == HYMOE_ROUTER_CAPACITY && graph.hparams.n_expert_used(il) > 1;
}

ggml_tensor * hymoe_build_routed_ffn(
        const llm_graph_context & graph, hymoe_router_input * input, const llama_layer & w, ggml_tensor * x,
        bool outputs_only, int il) {
    const llama_hparams & hparams = graph.hparams;

    const int32_t n_used = hparams.n_expert_used(il);

    auto & layer = input->layers[il];
    layer = { input, il, int32_t(graph.n_expert), n_used, outputs_only, false, false };

    ggml_tensor * out = nullptr;
    if (input->router.mode == HYMOE_ROUTER_TOPK || n_used == 1) { // a top-1 model drops nothing in any mode
        out = graph.build_moe_ffn(x,
            w.ffn_gate_inp, w.ffn_up_exps, w.ffn_gate_exps, w.ffn_down_exps, nullptr,
            graph.n_expert, n_used, LLM_FFN_SILU,
            hparams.expert_weights_norm, hparams.expert_weights_scale,
            LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX, il,
            nullptr, nullptr, w.ffn_up_exps_s, w.ffn_gate_exps_s, w.ffn_down_exps_s);
    } else {
        out = hymoe_build_dropping(graph, w, x, layer);
    }
    graph.cb(out, "ffn_moe_out", il);
    return out;
}
