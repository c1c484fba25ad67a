// What hy-imatrix needs of llama-imatrix besides the sums: where it stands, saves that it can go on from, and experts
// that compute tokens which the router did not give them. It says what it wants with --override-kv, under keys that no
// model has: hymoe.imatrix.save_seconds and hymoe.imatrix.n_weighted.
#pragma once

#include "common.h"
#include "ggml-backend.h"
#include "gguf.h"
#include "log.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

inline int64_t hymoe_int_override(const common_params & params, const char * key, int64_t otherwise) {
    for (const auto & other : params.kv_overrides) {
        if (other.tag == LLAMA_KV_OVERRIDE_TYPE_INT && strcmp(other.key, key) == 0) {
            return other.val_i64;
        }
    }
    return otherwise;
}

// What is logged just before an exit is in a race with the log's thread, and lost where that comes too late.
inline void hymoe_keep_log() {
    std::atexit([] { common_log_flush(common_log_main()); });
}

// Writes a file that is whole or not there at all, or ends the process.
inline void hymoe_write_gguf(const gguf_context * ctx, const std::string & fname) {
    const std::string part = fname + ".new";
    if (!gguf_write_to_file(ctx, part.c_str(), false) || std::rename(part.c_str(), fname.c_str()) != 0) {
        fprintf(stderr, "hymoe-imatrix: cannot write %s\n", fname.c_str());
        std::remove(part.c_str());
        exit(1);
    }
}

inline volatile std::sig_atomic_t hymoe_stop_asked = 0;

// Between two passes: says how far it is, and whether to save or to stop.
class hymoe_passes {
public:
    hymoe_passes(const common_params & params, size_t n_tokens, int n_chunk) :
            seconds(hymoe_int_override(params, "hymoe.imatrix.save_seconds", 15)), saved(clock::now()) {
        say(string_format("%zu tokens, %d chunks", n_tokens, n_chunk));
        for (const int number : { SIGINT, SIGTERM }) {
            std::signal(number, [](int) { hymoe_stop_asked = 1; });
        }
    }

    void done(int n_chunk) const {
        say(string_format("done %d", n_chunk));
    }

    bool save_due() {
        const auto now = clock::now();
        if (now - saved < std::chrono::seconds(seconds)) {
            return false;
        }
        saved = now;
        return true;
    }

    bool stopped() const {
        return hymoe_stop_asked != 0;
    }

private:
    using clock = std::chrono::steady_clock;

    // In one piece: the log writes to the same place from a thread of its own.
    static void say(const std::string & text) {
        const std::string line = "hymoe-imatrix: " + text + "\n";
        fwrite(line.data(), 1, line.size(), stdout);
        fflush(stdout);
    }

    const int64_t seconds;

    clock::time_point saved;
};

// Every expert computes every token: the caller has overridden the number of experts used with all of them. What the
// model answers stays the same, since only the first n_weighted keep their weights. Of the tokens of a ubatch each
// expert counts as many as an even router would give it, and those that the router would give it first.
class hymoe_forced_routing {
public:
    explicit hymoe_forced_routing(const common_params & params = {}) :
            n_weighted(hymoe_int_override(params, "hymoe.imatrix.n_weighted", 0)) {
    }

    // The weights of a layer's experts [1, n_expert, n_tokens], largest first, before they are normalised. Views of
    // them begin with the same name.
    bool wants(const ggml_tensor * t) const {
        const char * name = "ffn_moe_weights-";
        return n_weighted > 0 && t->op == GGML_OP_GET_ROWS && strncmp(t->name, name, strlen(name)) == 0;
    }

    void take(ggml_tensor * t) {
        weights.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, weights.data(), 0, ggml_nbytes(t));

        std::vector<float> kept(weights);
        for (size_t i = 0; i < kept.size(); ++i) {
            kept[i] = int64_t(i) % t->ne[1] < n_weighted ? kept[i] : 0.0f;
        }
        ggml_backend_tensor_set(t, kept.data(), 0, ggml_nbytes(t));
    }

    // Which pairs of slot and token count, [n_tokens][n_ids]; all of them where nothing is forced.
    // ids: [n_ids, n_tokens] with the strides of `shape`
    std::vector<char> counted(const ggml_tensor * shape, const char * ids, int64_t n_expert) const {
        const int64_t n_ids    = shape->ne[0];
        const int64_t n_tokens = shape->ne[1];
        if (n_weighted <= 0) {
            return std::vector<char>(n_ids * n_tokens, 1);
        }
        GGML_ASSERT(n_ids == n_expert && int64_t(weights.size()) == n_ids * n_tokens);

        std::vector<std::vector<std::pair<float, int64_t>>> pairs(n_expert);
        for (int64_t i = 0; i < n_ids * n_tokens; ++i) {
            const int32_t expert = *(const int32_t *) (ids + i / n_ids * shape->nb[1] + i % n_ids * shape->nb[0]);
            GGML_ASSERT(expert >= 0 && expert < n_expert);
            pairs[expert].emplace_back(-weights[i], i);
        }
        std::vector<char> chosen(n_ids * n_tokens, 0);
        const int64_t share = std::max<int64_t>(1, n_tokens * n_weighted / n_expert);
        for (auto & of_expert : pairs) {
            const int64_t n = std::min<int64_t>(share, of_expert.size());
            std::partial_sort(of_expert.begin(), of_expert.begin() + n, of_expert.end());
            for (int64_t i = 0; i < n; ++i) {
                chosen[of_expert[i].second] = 1;
            }
        }
        return chosen;
    }

private:
    int64_t n_weighted;

    std::vector<float> weights; // of the layer that is computed, [n_tokens][n_expert]
};
