// hymoe_type_speed: how many weights of a type this processor multiplies per second, for the experts of one token.
//
// That is what a server computes where experts lie in RAM. The experts take turns, so that no cache holds them, and lie
// in a plain buffer: beside a GPU nothing is repacked. Among the models because that folder is globbed.

#include "llama.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <chrono>
#include <cstdint>
#include <vector>

// Weights [n_expert, n_ff, n_embd] of `type`, of which n_used experts are read at a time, for `seconds` at least.
// Returns weights per second, 0 where there is no memory for it.
extern "C" LLAMA_API double hymoe_type_speed(int32_t type, int64_t n_embd, int64_t n_ff, int32_t n_expert,
        int32_t n_used, int32_t n_threads, double seconds) {
    ggml_backend_ptr backend(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    if (!backend || !ctx) {
        return 0.0;
    }
    auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend.get()));
    auto   set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set != nullptr) {
        set(backend.get(), n_threads);
    }
    ggml_tensor * experts = ggml_new_tensor_3d(ctx.get(), (ggml_type) type, n_embd, n_ff, n_expert);
    ggml_tensor * input   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd, 1, 1);
    ggml_tensor * ids     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_used, 1);
    ggml_cgraph * graph   = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_mul_mat_id(ctx.get(), experts, input, ids));
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    if (!buffer) {
        return 0.0;
    }
    // Pages of zeros would be one page of memory; as 16-bit floats these bytes are small numbers.
    ggml_backend_buffer_clear(buffer.get(), 0x11);

    std::vector<int32_t> chosen(n_used);
    int64_t n_rounds = -2;  // the first ones touch memory for the first time
    auto    begun    = std::chrono::steady_clock::now();
    double  elapsed  = 0.0;
    for (int32_t first = 0; n_rounds < 1 || elapsed < seconds; first = (first + n_used) % n_expert) {
        for (int32_t i = 0; i < n_used; i++) {
            chosen[i] = (first + i) % n_expert;
        }
        ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
        if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
            return 0.0;
        }
        const auto now = std::chrono::steady_clock::now();
        if (++n_rounds <= 0) {
            begun = now;
        }
        elapsed = std::chrono::duration<double>(now - begun).count();
    }
    return (double) n_rounds * n_used * n_embd * n_ff / elapsed;
}
