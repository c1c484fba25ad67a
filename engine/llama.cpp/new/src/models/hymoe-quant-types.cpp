// hymoe_quant_types: which type llama-quantize gives every tensor of a model, asked before a weight exists.
//
// The rules are those of src/llama-quant.cpp. They depend on the tensors' order, names and shapes, on the number of
// layers, heads and experts, and on whether there is an importance matrix; all of that is passed here. Lies among the
// models because that folder is globbed; the sources of models/ are compiled several to a unit, so that names of this
// file carry its prefix.

#include "llama-ext.h"
#include "llama-model-loader.h"
#include "llama.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// Mirrored by engine/quant_types.py.
struct hymoe_quant_model {
    const char * architecture;
    uint32_t n_embd;
    uint32_t n_ff;
    uint32_t n_layer;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_expert;
    uint32_t n_embd_head;
};

// type:  in, the type in the file that would be quantized; out, the chosen one
// fixed: the user has chosen `type`: the rules see that the tensor is there, and are not asked
struct hymoe_quant_tensor {
    const char * name;
    int64_t ne[4];
    int32_t type;
    int32_t fixed;
    int32_t requires_imatrix;
};

namespace {

struct hymoe_quant_free {
    void operator()(quantize_state_impl * state) const { llama_quant_free(state); }
    void operator()(llama_model * model) const { llama_model_free(model); }
};

// What the rules log about single tensors is for the caller to say.
struct hymoe_quant_silence {
    ggml_log_callback callback;
    void *            data;

    hymoe_quant_silence() {
        llama_log_get(&callback, &data);
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    ~hymoe_quant_silence() { llama_log_set(callback, data); }
};

int32_t hymoe_quant_choose(const hymoe_quant_model & about, llama_ftype ftype, bool has_imatrix,
                           hymoe_quant_tensor * tensors, size_t n_tensors) {
    if (about.n_layer < 1 || about.n_layer > LLAMA_MAX_LAYERS) {
        throw std::runtime_error("the number of layers is " + std::to_string(about.n_layer) + ": expected 1 to " + std::to_string(LLAMA_MAX_LAYERS));
    }
    if (llama_ftype_get_default_type(ftype) == GGML_TYPE_COUNT) {
        throw std::runtime_error("unknown file type " + std::to_string((int) ftype));
    }
    const llama_quant_model_desc desc = {
        about.architecture, about.n_embd, about.n_ff, about.n_layer, about.n_head, about.n_head_kv, about.n_expert,
        about.n_embd_head, about.n_embd_head,
    };
    const std::unique_ptr<llama_model, hymoe_quant_free> model(llama_quant_model_from_metadata(&desc));

    // An importance matrix without entries: only whether there is one matters.
    const llama_model_imatrix_data imatrix = { nullptr, nullptr, 0 };
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype   = ftype;
    params.imatrix = has_imatrix ? &imatrix : nullptr;
    const std::unique_ptr<quantize_state_impl, hymoe_quant_free> state(llama_quant_init(model.get(), &params));

    // The quantizer goes through a file's tensors in the loader's order.
    std::vector<size_t> order(n_tensors);
    std::iota(order.begin(), order.end(), 0);
    const llama_model_loader::weight_name_comparer before;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return before(tensors[a].name, tensors[b].name);
    });

    const ggml_context_ptr context(ggml_init({ (n_tensors + 1)*ggml_tensor_overhead(), nullptr, /*no_alloc=*/ true }));
    std::vector<ggml_tensor *> mocks;
    for (const size_t i : order) {
        const hymoe_quant_tensor & tensor = tensors[i];
        // A vector counts by its name, and keeps its type.
        ggml_tensor * mock = tensor.fixed
            ? ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, tensor.ne[0])
            : ggml_new_tensor(context.get(), (ggml_type) tensor.type, 4, tensor.ne);
        ggml_set_name(mock, tensor.name);
        mocks.push_back(mock);
    }
    std::vector<ggml_type> chosen(n_tensors);
    llama_quant_compute_types(state.get(), ftype, mocks.data(), chosen.data(), n_tensors);

    for (size_t i = 0; i < n_tensors; ++i) {
        hymoe_quant_tensor & tensor = tensors[order[i]];
        const bool asked = !tensor.fixed && llama_quant_tensor_allows_quantization(state.get(), mocks[i]);
        if (asked) {
            tensor.type = chosen[i];
        }
        tensor.requires_imatrix = (asked || tensor.fixed) &&
            llama_quant_tensor_requires_imatrix(tensor.name, (ggml_type) tensor.type, ftype);
    }
    return llama_quant_n_fallback(state.get());
}

} // namespace

// Set `type` and `requires_imatrix` of every tensor. Returns how many have a row that is no whole number of blocks of
// the wanted type, and another type for it; or -1 with the reason in `error`.
extern "C" LLAMA_API int32_t hymoe_quant_types(const hymoe_quant_model * about, int32_t ftype, bool has_imatrix,
                                               hymoe_quant_tensor * tensors, size_t n_tensors, char * error, size_t n_error);

int32_t hymoe_quant_types(const hymoe_quant_model * about, int32_t ftype, bool has_imatrix,
                          hymoe_quant_tensor * tensors, size_t n_tensors, char * error, size_t n_error) {
    const hymoe_quant_silence silence;
    try {
        return hymoe_quant_choose(*about, (llama_ftype) ftype, has_imatrix, tensors, n_tensors);
    } catch (const std::exception & exc) {
        std::snprintf(error, n_error, "%s", exc.what());
        return -1;
    }
}
