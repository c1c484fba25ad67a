// hymoe_set_weight: other values for one tensor of a loaded model, so that what an error in it costs can be measured
// without a file for every try.
//
// Lies among the models because that folder is globbed.

#include "llama-model.h"
#include "llama.h"

#include "ggml-backend.h"

#include <cstddef>

// data: the whole tensor in the type it has in the model. The model must be loaded without mmap and without repacking.
// Returns false where there is no such tensor, or its size is another.
extern "C" LLAMA_API bool hymoe_set_weight(
        const struct llama_model * model, const char * name, const void * data, size_t n_bytes) {
    for (const auto & [found, tensor] : llama_internal_get_tensor_map(model)) {
        if (found == name) {
            if (ggml_nbytes(tensor) != n_bytes) {
                return false;
            }
            ggml_backend_tensor_set(tensor, data, 0, n_bytes);
            return true;
        }
    }
    return false;
}
