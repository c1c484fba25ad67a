// Hunyuan-Large (A52B): Hunyuan-A13B's graph with cross-layer attention.
//
// Only layers 0, f, 2f, ... have W_k and W_v; the layers up to the next of them take its keys as they are before
// rotation and norm, and its values. Every layer norms queries and keys with weights of its own:
//
//   k'    = rms(rope(W_k n1(x)))                         of the owner: one for all layers that share it, and cached
//   q     = g_k * g_q * rms(rope(W_q n1(x)))             of the layer itself
//   x    += W_o attention(q, k', v)
//
// which is the published form, since q . (g_k * k') = (g_k * q) . k'. Numbers of experts and what their weights mean
// are data of the file, as for Hunyuan-A13B.

#include "hunyuan-moe.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <memory>
#include <stdexcept>

namespace {

struct hunyuan_large_graph : public hunyuan_moe_graph {
    using hunyuan_moe_graph::hunyuan_moe_graph;

private:
    ggml_tensor * attention(ggml_tensor * x, int il) const override;
    ggml_tensor * queries(ggml_tensor * x, int il) const;
    ggml_tensor * attend_to_shared(ggml_tensor * q, float scale, int il) const;
};

ggml_tensor * hunyuan_large_graph::attention(ggml_tensor * x, int il) const {
    const llama_layer & w = model.layers[il];

    const float scale = 1.0f / sqrtf(float(n_embd_head_k));

    ggml_tensor * out = nullptr;
    if (hparams.has_kv(il)) {
        // [head_dim, n_head or n_head_kv, n_tokens]
        auto [q, k, v] = build_qkv(w, x, n_embd_head_k, n_head, n_head_kv, il);

        q = queries(q, il);
        k = rms(rotate(k, il), nullptr, "Kcur_norm", il);
        out = build_attn(kv, w.wo, w.wo_b, w.wo_s, q, k, v, nullptr, nullptr, nullptr, scale, il);
    } else {
        ggml_tensor * q = build_lora_mm(w.wq, x, w.wq_s);
        cb(q, "Qcur", il);
        q = queries(ggml_reshape_3d(ctx0, q, n_embd_head_k, n_head, n_tokens), il);
        out = build_lora_mm(w.wo, attend_to_shared(q, scale, il), w.wo_s);
    }
    cb(out, "attn_out", il);
    return out;
}

ggml_tensor * hunyuan_large_graph::queries(ggml_tensor * x, int il) const {
    const llama_layer & w = model.layers[il];

    x = rms(rotate(x, il), w.attn_q_norm, "Qcur_norm", il);
    x = ggml_mul(ctx0, x, w.attn_k_norm);
    cb(x, "Qcur_k_norm", il);
    return x;
}

// Attention to the keys and values that the owner has put into the cache, before this layer's nodes in the graph.
ggml_tensor * hunyuan_large_graph::attend_to_shared(ggml_tensor * q, float scale, int il) const {
    GGML_ASSERT(!cparams.training && "shared keys and values are read from the cache, which training does not fill");

    // a quantized cache holds keys and values rotated; the rotation is its own inverse
    if (kv->self_k_rot) {
        q = llama_mul_mat_hadamard(ctx0, q, kv->self_k_rot);
    }
    ggml_build_forward_expand(gf, q);

    ggml_tensor * k = kv->mctx->get_k(ctx0, il);
    ggml_tensor * v = kv->mctx->get_v(ctx0, il);

    ggml_tensor * out = build_attn_mha(q, k, v, nullptr, kv->get_kq_mask(), nullptr, nullptr, 0, scale, il);
    cb(out, "kqv_out", il);
    return kv->self_v_rot ? llama_mul_mat_hadamard(ctx0, out, kv->self_v_rot) : out;
}

} // namespace

void llama_model_hunyuan_large::load_arch_hparams(llama_model_loader & ml) {
    llama_model_hunyuan_moe::load_arch_hparams(ml);

    ml.get_key(LLM_KV_ATTENTION_SHARED_KV_FACTOR, hparams.shared_kv_factor);
    if (hparams.shared_kv_factor < 1) {
        throw std::runtime_error(format("%s is 0: expected 1 or more", LLM_KV(arch)(LLM_KV_ATTENTION_SHARED_KV_FACTOR).c_str()));
    }
    type = LLM_TYPE_UNKNOWN;
}

std::unique_ptr<llm_graph_context> llama_model_hunyuan_large::build_arch_graph(const llm_graph_params & params) const {
    auto graph = std::make_unique<hunyuan_large_graph>(*this, params);
    graph->build();
    return graph;
}
