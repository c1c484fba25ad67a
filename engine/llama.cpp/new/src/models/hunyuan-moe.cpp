// HunYuan mixture-of-experts (Hunyuan-A13B and kin).
//
//   q, k  = g * rms(rope(W n1(x)))                       per head, the norm after the rotation
//   x    += W_o attention(q, k, v)
//   x    += shared(n2(x)) + sum_e w_e(n2(x)) expert_e(n2(x))
//
// Takes the place of the stock file of the same name and loads the same GGUFs. The operations and their order
// are those of the stock graph, so that an A13B file gives the same bits in both, unless its router's mode is another
// than "topk". The sources of models/ are compiled several to a unit: names of this file carry its prefix.

#include "hunyuan-moe.h"

#include "llama-impl.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace {

// A number of the file that the graph can only run between `lo` and `hi`.
struct hunyuan_moe_limit {
    llm_kv  key;
    int64_t value;
    int64_t lo;
    int64_t hi;
};

void hunyuan_moe_require(llm_arch arch, const hunyuan_moe_limit & limit) {
    if (limit.value >= limit.lo && limit.value <= limit.hi) {
        return;
    }
    const std::string key = LLM_KV(arch)(limit.key);
    const std::string hi  = limit.hi == INT64_MAX ? " or more" : limit.hi == limit.lo ? "" : " to " + std::to_string(limit.hi);
    throw std::runtime_error(format("%s is %lld: expected %lld%s", key.c_str(),
        (long long) limit.value, (long long) limit.lo, hi.c_str()));
}

} // namespace

hunyuan_moe_graph::hunyuan_moe_graph(const llama_model & model, const llm_graph_params & params) :
        llm_graph_context(params), model(model) {
}

void hunyuan_moe_graph::build() {
    ggml_tensor * x = build_inp_embd(model.tok_embd); // [n_embd, n_tokens]

    positions = build_inp_pos();
    kv        = build_attn_inp_kv();
    router    = hymoe_build_router_input(*this);
    outputs   = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        x = layer(x, il);
    }
    head(x);
}

ggml_tensor * hunyuan_moe_graph::rotate(ggml_tensor * x, int il) const {
    return ggml_rope_ext(ctx0, x, positions, model.get_rope_factors(cparams, il),
        n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
}

ggml_tensor * hunyuan_moe_graph::rms(ggml_tensor * x, ggml_tensor * weight, const char * name, int il) const {
    x = build_norm(x, weight, nullptr, LLM_NORM_RMS, il);
    cb(x, name, il);
    return x;
}

ggml_tensor * hunyuan_moe_graph::attention(ggml_tensor * x, int il) const {
    const llama_layer & w = model.layers[il];

    // [head_dim, n_head or n_head_kv, n_tokens]
    auto [q, k, v] = build_qkv(w, x, n_embd_head_k, n_head, n_head_kv, il);

    q = rotate(q, il);
    cb(q, "Qcur", il);
    cb(k, "Kcur", il);
    cb(v, "Vcur", il);
    k = rotate(k, il);

    k = rms(k, w.attn_k_norm, "Kcur_norm", il);
    q = rms(q, w.attn_q_norm, "Qcur_norm", il);

    const float scale = 1.0f / sqrtf(float(n_embd_head_k));
    ggml_tensor * out = build_attn(kv, w.wo, w.wo_b, w.wo_s, q, k, v, nullptr, nullptr, nullptr, scale, il);
    cb(out, "attn_out", il);
    return out;
}

ggml_tensor * hunyuan_moe_graph::shared_expert(ggml_tensor * x, int il) const {
    const llama_layer & w = model.layers[il];

    ggml_tensor * out = build_ffn(x,
        w.ffn_up_shexp,   nullptr, w.ffn_up_shexp_s,
        w.ffn_gate_shexp, nullptr, w.ffn_gate_shexp_s,
        w.ffn_down_shexp, nullptr, w.ffn_down_shexp_s,
        nullptr, LLM_FFN_SILU, LLM_FFN_PAR, il);
    cb(out, "ffn_mlp", il);
    return out;
}

ggml_tensor * hunyuan_moe_graph::wanted_rows(ggml_tensor * x) const {
    return outputs ? ggml_get_rows(ctx0, x, outputs) : x;
}

ggml_tensor * hunyuan_moe_graph::layer(ggml_tensor * x, int il) const {
    const llama_layer & w = model.layers[il];

    ggml_tensor * attended = attention(rms(x, w.attn_norm, "attn_norm", il), il);

    // past the last attention only the rows that are asked for matter, unless the others have a say in the routing
    const bool last   = il == n_layer - 1;
    const bool picked = last && !hymoe_routes_all_tokens(*this, il);
    if (picked) {
        attended = wanted_rows(attended);
        x        = wanted_rows(x);
    }
    ggml_tensor * mid = ggml_add(ctx0, attended, x);
    cb(mid, "ffn_inp", il);

    ggml_tensor * normed = rms(mid, w.ffn_norm, "ffn_norm", il);
    ggml_tensor * shared = shared_expert (normed, il);
    ggml_tensor * routed = hymoe_build_routed_ffn(*this, router, w, normed, picked, il);

    ggml_tensor * sum = ggml_add(ctx0, routed, shared);
    cb(sum, "ffn_out", il);

    ggml_tensor * out = build_cvec(ggml_add(ctx0, sum, mid), il);
    cb(out, "l_out", il);
    return last && !picked ? wanted_rows(out) : out;
}

void hunyuan_moe_graph::head(ggml_tensor * x) {
    res->t_embd = rms(x, model.output_norm, "result_norm", -1);

    res->t_logits = build_lora_mm(model.output, res->t_embd, model.output_s); // [n_vocab, n_outputs]
    cb(res->t_logits, "result_output", -1);

    ggml_build_forward_expand(gf, res->t_logits);
}

void llama_model_hunyuan_moe::load_arch_hparams(llama_model_loader & ml) {
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key_or_arr(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp_arr, hparams.n_layer_all);

    // files without a shared width have shared experts as wide as their dense layers would be
    hparams.n_ff_shexp = hparams.n_ff();
    ml.get_key(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp, false);

    // top-1 models weigh their expert with the raw probability; files of other converters do not say so
    hparams.expert_weights_norm = hparams.n_expert_used() > 1;
    ml.get_key(LLM_KV_EXPERT_WEIGHTS_NORM, hparams.expert_weights_norm, false);

    uint32_t gating = LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX;
    ml.get_key(LLM_KV_EXPERT_GATING_FUNC, gating, false);

    const int64_t any      = INT64_MAX;
    const int64_t softmax  = LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX;
    const int64_t head_dim = hparams.n_embd_head_k();

    const hunyuan_moe_limit limits[] = {
        { LLM_KV_ATTENTION_HEAD_COUNT,              hparams.n_head(),        1,        any              },
        { LLM_KV_ATTENTION_HEAD_COUNT_KV,           hparams.n_head_kv(),     1,        hparams.n_head() },
        { LLM_KV_ATTENTION_KEY_LENGTH,              head_dim,                2,        any              },
        { LLM_KV_ATTENTION_VALUE_LENGTH,            hparams.n_embd_head_v(), head_dim, head_dim         },
        { LLM_KV_ROPE_DIMENSION_COUNT,              hparams.n_rot(),         head_dim, head_dim         },
        { LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp,      1,        any              },
        { LLM_KV_EXPERT_GATING_FUNC,                gating,                  softmax,  softmax          },
    };
    for (const auto & limit : limits) {
        hunyuan_moe_require(arch, limit);
    }
    if (hparams.n_head() % hparams.n_head_kv() != 0) {
        throw std::runtime_error(format("%s.attention.head_count_kv is %u: expected a divisor of head_count, which is %u",
            llm_arch_name(arch), hparams.n_head_kv(), hparams.n_head()));
    }
    if (head_dim % 2 != 0) {
        throw std::runtime_error(format("%s.attention.key_length is %lld: expected an even number", llm_arch_name(arch), (long long) head_dim));
    }
    if (!(hparams.f_norm_rms_eps >= 0.0f)) { // nor NaN
        throw std::runtime_error(format("%s.attention.layer_norm_rms_epsilon is %g: expected 0 or more", llm_arch_name(arch), hparams.f_norm_rms_eps));
    }
    uint32_t least_used = hparams.n_expert;
    uint32_t most_used  = 1;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        least_used = std::min(least_used, hparams.n_expert_used(il));
        most_used  = std::max(most_used,  hparams.n_expert_used(il));
        hunyuan_moe_require(arch, { LLM_KV_EXPERT_USED_COUNT,          hparams.n_expert_used(il), 1, hparams.n_expert });
        hunyuan_moe_require(arch, { LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp(il),      1, any              });
    }

    hparams.router = hymoe_router_load(ml, least_used, most_used);

    type = hparams.n_layer() == 32 ? LLM_TYPE_A13B : LLM_TYPE_UNKNOWN;
}

void llama_model_hunyuan_moe::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    tok_embd    = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD,  "weight"), { n_embd, n_vocab }, 0);
    output_norm = create_tensor(tn(LLM_TENSOR_OUTPUT_NORM, "weight"), { n_embd },          0);
    output      = create_tensor(tn(LLM_TENSOR_OUTPUT,      "weight"), { n_embd, n_vocab }, TENSOR_NOT_REQUIRED);
    if (!output) {
        output = create_tensor(tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, TENSOR_DUPLICATED);
    }

    for (int il = 0; il < n_layer; ++il) {
        llama_layer & w = layers[il];

        const auto load = [&](ggml_tensor *& slot, llm_tensor kind, const std::initializer_list<int64_t> & shape) {
            slot = create_tensor(tn(kind, "weight", il), shape, 0);
        };
        const int64_t n_embd_q   = n_embd_head_k * n_head;
        const int64_t n_ff_exp   = hparams.n_ff_exp(il);
        const int64_t n_ff_shexp = hparams.n_ff_shexp;

        if (hparams.has_kv(il)) {
            create_tensor_qkv(w, il, n_embd, n_embd_q, n_embd_k_gqa, n_embd_v_gqa, 0);
        } else {
            load(w.wq, LLM_TENSOR_ATTN_Q, { n_embd, n_embd_q });
        }

        load(w.attn_norm,      LLM_TENSOR_ATTN_NORM,      { n_embd                     });
        load(w.wo,             LLM_TENSOR_ATTN_OUT,       { n_embd_q, n_embd           });
        load(w.attn_q_norm,    LLM_TENSOR_ATTN_Q_NORM,    { n_embd_head_k              });
        load(w.attn_k_norm,    LLM_TENSOR_ATTN_K_NORM,    { n_embd_head_k              });
        load(w.ffn_norm,       LLM_TENSOR_FFN_NORM,       { n_embd                     });
        load(w.ffn_gate_inp,   LLM_TENSOR_FFN_GATE_INP,   { n_embd, n_expert           });
        load(w.ffn_gate_exps,  LLM_TENSOR_FFN_GATE_EXPS,  { n_embd, n_ff_exp, n_expert });
        load(w.ffn_up_exps,    LLM_TENSOR_FFN_UP_EXPS,    { n_embd, n_ff_exp, n_expert });
        load(w.ffn_down_exps,  LLM_TENSOR_FFN_DOWN_EXPS,  { n_ff_exp, n_embd, n_expert });
        load(w.ffn_gate_shexp, LLM_TENSOR_FFN_GATE_SHEXP, { n_embd, n_ff_shexp         });
        load(w.ffn_up_shexp,   LLM_TENSOR_FFN_UP_SHEXP,   { n_embd, n_ff_shexp         });
        load(w.ffn_down_shexp, LLM_TENSOR_FFN_DOWN_SHEXP, { n_ff_shexp, n_embd         });
    }
}

std::unique_ptr<llm_graph_context> llama_model_hunyuan_moe::build_arch_graph(const llm_graph_params & params) const {
    auto graph = std::make_unique<hunyuan_moe_graph>(*this, params);
    graph->build();
    return graph;
}
