// What a machine has, and what a model would take of it: one JSON document on stdout, the log on stderr.
//
//   hymoe-measure devices                 [ARGUMENTS]    every device but the processor, with its memory
//   hymoe-measure speeds BYTES SECONDS    [ARGUMENTS]    the same, how fast memories and links are read, and what all
//                                                        processors compute; SECONDS for each of these numbers
//   hymoe-measure memory [CARD=BYTES,...]  ARGUMENTS     the buffers of a model and its context; nothing is allocated,
//                                                        and no weight is read; on cards that need not be there
//
// ARGUMENTS are llama-server's and mean what they mean there.

#include "hymoe-paper-device.h"

#include "arg.h"
#include "common.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "json.h"
#include "llama-cpp.h"
#include "llama.h"
#include "log.h"
#include "speculative.h"

#include "../src/llama-ext.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point start) {
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

// Seconds of the fastest of the runs of `run` that fit into `seconds`, the first not counted: it maps pages, compiles
// kernels and wakes clocks. Other work on the machine only ever makes a run slower.
double fastest(double seconds, const std::function<void()> & run) {
    run();
    const auto begun = clock_type::now();
    double     best  = HUGE_VAL;
    do {
        const auto start = clock_type::now();
        run();
        best = std::min(best, seconds_since(start));
    } while (seconds_since(begun) < seconds);
    return best;
}

// -- the machine ------------------------------------------------------------------------------------------------------

// Every thread adds up a part of its own of one buffer, which it has written itself: on machines with several memories
// its pages lie in the nearest.
double ram_bandwidth(size_t n_bytes, double seconds, int n_threads) {
    const size_t n_words = n_bytes / n_threads / sizeof(uint64_t);
    std::vector<std::vector<uint64_t>> parts(n_threads);
    std::atomic<uint64_t> total { 0 };
    const auto all = [&](const std::function<void(std::vector<uint64_t> &)> & work) {
        std::vector<std::thread> threads;
        for (auto & part : parts) {
            threads.emplace_back([&work, &part] { work(part); });
        }
        for (auto & thread : threads) {
            thread.join();
        }
    };
    all([n_words](std::vector<uint64_t> & part) { part.assign(n_words, 1); });
    return n_words * sizeof(uint64_t) * n_threads / fastest(seconds, [&] {
        all([&total](const std::vector<uint64_t> & part) {
            uint64_t sums[8] = {};
            for (size_t i = 0; i + 8 <= part.size(); i += 8) {
                for (size_t j = 0; j < 8; j++) {
                    sums[j] += part[i + j];
                }
            }
            for (const uint64_t sum : sums) {
                total += sum; // else nothing would have to be read
            }
        });
    });
}

ggml_context_ptr tensors_only(size_t n_tensors) {
    return ggml_context_ptr(ggml_init({ n_tensors * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
}

// What is computed with weights of one kind: the experts of a mixture, or a single matrix; a prompt, or one token.
struct work {
    static constexpr ggml_type type         = GGML_TYPE_Q4_K;
    static constexpr int64_t   n_per_row    = 4096;
    static constexpr int64_t   n_per_expert = 64; // tokens of a prompt
    static constexpr int64_t   step         = 32; // rows come in multiples of it: some kernels take several at a time

    bool    routed;
    bool    prompt;
    int64_t n_rows; // of each expert

    work(bool routed, bool prompt, double n_bytes) : routed(routed), prompt(prompt) {
        n_rows = std::max<int64_t>(n_bytes / n_expert() / ggml_row_size(type, n_per_row) / step, 1) * step;
    }

    int64_t n_expert() const { return routed ? 64 : 1; }
    int64_t n_used()   const { return routed ? 8 : 1; }
    // So many single tokens come that all experts are read once.
    int64_t n_tokens() const { return prompt ? n_per_expert * n_expert() / n_used() : 1; }
    int64_t n_turns()  const { return prompt ? 1 : n_expert() / n_used(); }

    double n_bytes() const { return double(n_expert() * n_rows) * ggml_row_size(type, n_per_row); }
    // what its rate is in: operations of a prompt, bytes read of one token
    double amount()  const { return prompt ? 2.0 * n_per_expert * n_expert() * n_rows * n_per_row : n_bytes(); }
};

// How much of it is done per second with weights in memory of `buft`; 0 where there is no kernel or no memory for it.
double rate(const work & todo, ggml_backend_t backend, ggml_backend_buffer_type_t buft, double seconds) {
    const ggml_context_ptr ctx = tensors_only(32);
    ggml_tensor * weights = ggml_new_tensor_3d(ctx.get(), work::type, work::n_per_row, todo.n_rows, todo.n_expert());
    ggml_tensor * input   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, work::n_per_row, 1, todo.n_tokens());
    const int64_t n_all   = todo.n_tokens() * todo.n_turns();
    ggml_tensor * ids     = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, todo.n_used(), n_all);
    ggml_cgraph * graph   = ggml_new_graph(ctx.get());
    for (int64_t i = 0; i < todo.n_turns(); i++) {
        ggml_tensor * chosen = ggml_view_2d(ctx.get(), ids, todo.n_used(), todo.n_tokens(), ids->nb[1],
                                            i * todo.n_tokens() * ids->nb[1]);
        ggml_build_forward_expand(graph, todo.routed
            ? ggml_mul_mat_id(ctx.get(), weights, input, chosen)
            : ggml_mul_mat(ctx.get(), weights, ggml_reshape_2d(ctx.get(), input, work::n_per_row, todo.n_tokens())));
    }
    const ggml_backend_buffer_ptr stored(
        ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, weights)));
    if (!stored) {
        return 0;
    }
    ggml_backend_tensor_alloc(stored.get(), weights, ggml_backend_buffer_get_base(stored.get()));
    if (!ggml_backend_supports_op(backend, ggml_graph_node(graph, -1))) {
        return 0;
    }
    const ggml_backend_buffer_ptr others(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    if (!others) {
        return 0;
    }
    // Pages of zeros would be one page of memory; as 16-bit floats these bytes are small numbers, wherever they stand.
    ggml_backend_buffer_clear(stored.get(), 0x11);
    const std::vector<float> ones(ggml_nelements(input), 1.0f);
    ggml_backend_tensor_set(input, ones.data(), 0, ggml_nbytes(input));
    std::vector<int32_t> turns(ggml_nelements(ids));
    for (size_t i = 0; i < turns.size(); i++) {
        turns[i] = i % todo.n_expert();
    }
    ggml_backend_tensor_set(ids, turns.data(), 0, ggml_nbytes(ids));
    return todo.amount() / fastest(seconds, [&] {
        ggml_backend_graph_compute(backend, graph);
        uint8_t back = 0; // a worker on the network answers only when it is asked for something
        ggml_backend_tensor_get(ggml_graph_node(graph, -1), &back, 0, sizeof(back));
    });
}

// On a device, which may be as slow as software: after a little work one of up to `n_bytes` that takes a part of the
// time.
double device_rate(bool routed, bool prompt, ggml_backend_t backend, size_t n_bytes, double seconds) {
    ggml_backend_buffer_type_t buft = ggml_backend_get_default_buffer_type(backend);
    const work   little(routed, prompt, 0);
    const double first = rate(little, backend, buft, seconds / 8);
    const double fits  = little.n_bytes() / little.amount() * first * seconds / 8;
    const work   more(routed, prompt, std::min<double>(n_bytes, fits));
    return more.n_rows > little.n_rows ? rate(more, backend, buft, seconds) : first;
}

common_json pace(double read, double ops) {
    return read > 0 && ops > 0 ? common_json { { "read", read }, { "ops", ops } } : common_json();
}

// Of experts, where there is a kernel for them, else of single matrices.
common_json device_pace(ggml_backend_t backend, size_t n_bytes, double seconds) {
    common_json found;
    for (const bool routed : { true, false }) {
        if (found.is_null()) {
            found = pace(device_rate(routed, false, backend, n_bytes, seconds),
                         device_rate(routed, true,  backend, n_bytes, seconds));
        }
    }
    return found;
}

// Operations per second of so many tokens' attention to n_kv others, with the heads of Hunyuan-A13B and a cache in F16.
double attention_rate(ggml_backend_t backend, int64_t n_tokens, int64_t n_kv, double seconds) {
    constexpr int64_t n_head = 32, n_head_kv = 8, head_dim = 128;
    const ggml_context_ptr ctx = tensors_only(8);
    ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, head_dim, n_tokens, n_head);
    const auto cached = [&] { // a token's heads lie side by side
        ggml_tensor * rows = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, head_dim, n_head_kv, n_kv);
        return ggml_permute(ctx.get(), rows, 0, 2, 1, 3);
    };
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_flash_attn_ext(ctx.get(), q, cached(), cached(), nullptr, 1.0f, 0.0f, 0.0f));
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    if (!buffer) {
        return 0;
    }
    ggml_backend_buffer_clear(buffer.get(), 0x11);
    const double n_ops = 4.0 * n_head * head_dim * n_tokens * n_kv;
    return n_ops / fastest(seconds, [&] { ggml_backend_graph_compute(backend, graph); });
}

// With experts as they are stored, and repacked where the processor has a layout for them.
common_json host_paces(size_t n_bytes, double seconds, int n_threads) {
    // of fewer rows, turning the activations into blocks would take a large part of the time
    constexpr size_t n_bytes_prompt = 64 << 20;
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    const ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    const auto set_n_threads = (ggml_backend_set_n_threads_t)
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    const auto get_extra_bufts = (ggml_backend_dev_get_extra_bufts_t)
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
    set_n_threads(backend.get(), n_threads);
    const auto measured = [&](ggml_backend_buffer_type_t buft) {
        return pace(rate(work(true, false, n_bytes), backend.get(), buft, seconds),
                    rate(work(true, true, n_bytes_prompt), backend.get(), buft, seconds));
    };
    common_json stored = measured(ggml_backend_dev_buffer_type(dev));
    common_json repacked;
    // the engine takes the first that has a kernel
    for (auto * buft = get_extra_bufts(dev); buft && *buft && repacked.is_null(); buft++) {
        repacked = measured(*buft);
    }
    return common_json {
        { "stored",           stored },
        { "repacked",         repacked },
        { "attention_token",  attention_rate(backend.get(), 1, 16384, seconds) },
        { "attention_prompt", attention_rate(backend.get(), 256, 512, seconds) },
    };
}

// What the host can send: from memory of `host`, the type that a device reads without a detour, or from any (nullptr).
double link_bandwidth(ggml_backend_t backend, ggml_backend_buffer_type_t host, size_t n_bytes, double seconds) {
    const ggml_context_ptr ctx = tensors_only(1);
    ggml_tensor * target = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, n_bytes);
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    const ggml_backend_buffer_ptr staged(host ? ggml_backend_buft_alloc_buffer(host, n_bytes) : nullptr);
    if (!buffer || (host && !staged)) {
        return 0;
    }
    std::vector<uint8_t> plain(host ? 0 : n_bytes, 1);
    void * source = host ? ggml_backend_buffer_get_base(staged.get()) : plain.data();
    memset(source, 1, n_bytes);
    uint8_t run = 0;
    return n_bytes / fastest(seconds, [&] {
        *static_cast<uint8_t *>(source) = ++run; // a worker on the network may know by its hash what it was sent before
        ggml_backend_tensor_set(target, source, 0, n_bytes);
        uint8_t back = 0; // its way is short, and it waits for what went before
        ggml_backend_tensor_get(target, &back, 0, 1);
    });
}

bool is_rpc(ggml_backend_dev_t dev) {
    return strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0;
}

common_json about(ggml_backend_dev_t dev) {
    size_t free  = 0;
    size_t total = 0;
    ggml_backend_dev_memory(dev, &free, &total);
    const bool integrated = ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_IGPU;
    return common_json {
        { "name",        ggml_backend_dev_name(dev) },
        { "description", ggml_backend_dev_description(dev) },
        { "kind",        is_rpc(dev) ? "rpc" : integrated ? "igpu" : "gpu" },
        { "total",       total },
        { "free",        free },
    };
}

void add_speeds(common_json & found, ggml_backend_dev_t dev, double seconds) {
    const ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    if (!backend) {
        return;
    }
    const size_t room = found.at("free").get<size_t>() / 4;
    const size_t size = std::min<size_t>(256 << 20, room) & ~size_t(0xFFFF); // larger than any cache
    const size_t sent = is_rpc(dev) ? std::min<size_t>(8 << 20, size) : size; // what a network can carry
    if (size == 0) {
        return;
    }
    const auto set = [&found](const char * key, double rate) {
        if (rate > 0) {
            found[key] = rate;
        }
    };
    ggml_backend_buffer_type_t host = ggml_backend_dev_host_buffer_type(dev);
    found["pace"] = device_pace(backend.get(), size, seconds);
    const double pageable = link_bandwidth(backend.get(), nullptr, sent, seconds);
    set("link",          host ? link_bandwidth(backend.get(), host, sent, seconds) : pageable);
    set("link_pageable", pageable);
}

common_json devices(double seconds) {
    common_json list = common_json::array();
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        const auto type = ggml_backend_dev_type(dev);
        if (type != GGML_BACKEND_DEVICE_TYPE_GPU && type != GGML_BACKEND_DEVICE_TYPE_IGPU) {
            continue;
        }
        common_json found = about(dev);
        if (seconds > 0) {
            add_speeds(found, dev, seconds);
        }
        list.push_back(found);
    }
    return list;
}

// -- the model --------------------------------------------------------------------------------------------------------

// llama-server's own defaults, which it settles after its arguments are read.
void settle(common_params & params) {
    if (params.n_parallel < 0) {
        params.n_parallel = 4;
        params.kv_unified = true;
    }
    const auto limits = common_speculative_get_output_limits(params.n_batch, params.n_parallel, 0);
    params.n_outputs_max         = std::max<int32_t>(1, limits.total);
    params.n_outputs_max_per_seq = std::max<int32_t>(1, limits.per_seq);
}

// Cards that need not be there, from "NAME=BYTES,..."; the end of the list is a null, as in common_params.
std::vector<ggml_backend_dev_t> paper_devices(const std::string & list) {
    std::vector<ggml_backend_dev_t> found;
    for (const auto & card : string_split<std::string>(list, ',')) {
        const size_t at = card.find('=');
        if (at == std::string::npos) {
            throw std::invalid_argument("a card is NAME=BYTES, not " + card);
        }
        found.push_back(hymoe_paper_device(card.substr(0, at), std::stoull(card.substr(at + 1))));
    }
    found.push_back(nullptr);
    return found;
}

common_json memory(common_params & params) {
    settle(params);
    auto mparams = common_model_params_to_llama(params);
    auto cparams = common_context_params_to_llama(params);
    mparams.no_alloc  = true;
    mparams.load_mode = LLAMA_LOAD_MODE_NONE; // a mapping would be made, and would be all that is counted
    const llama_model_ptr model(llama_model_load_from_file(params.model.path.c_str(), mparams));
    if (!model) {
        throw std::runtime_error("the model does not load");
    }
    const llama_context_ptr context(llama_init_from_model(model.get(), cparams));
    if (!context) {
        throw std::runtime_error("no context can be made for the model");
    }
    common_json buffers = common_json::array();
    for (const auto & [buft, bytes] : llama_get_memory_breakdown(context.get())) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        const bool cpu = !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
        buffers.push_back({
            { "name",    ggml_backend_buft_name(buft) },
            // memory of the host that a card can read belongs to the host
            { "device",  cpu || ggml_backend_buft_is_host(buft) ? "CPU" : ggml_backend_dev_name(dev) },
            { "weights", bytes.model },
            { "kv",      bytes.context },
            { "compute", bytes.compute },
        });
    }
    common_json used = common_json::array();
    for (int i = 0; i < llama_model_n_devices(model.get()); i++) {
        used.push_back(ggml_backend_dev_name(llama_model_get_device(model.get(), i)));
    }
    return common_json { { "n_ctx", llama_n_ctx(context.get()) }, { "devices", used }, { "buffers", buffers } };
}

int usage(const char * program) {
    fprintf(stderr, "usage: %s devices [ARGUMENTS] | speeds BYTES SECONDS [ARGUMENTS] | memory [CARD=BYTES,...] ARGUMENTS\n",
            program);
    return 2;
}

int run(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    const bool speeds   = mode == "speeds";
    const bool on_paper = mode == "memory" && argc > 2 && argv[2][0] != '-';
    const int  n_own    = speeds ? 3 : on_paper ? 2 : 1; // arguments that are not llama-server's
    if ((mode != "devices" && mode != "memory" && !speeds) || argc <= n_own) {
        return usage(argv[0]);
    }
    common_init();
    // before the arguments, which may name them
    const std::vector<ggml_backend_dev_t> paper = on_paper ? paper_devices(argv[2]) : std::vector<ggml_backend_dev_t>();
    common_params params;
    std::vector<char *> rest { argv[0] };
    rest.insert(rest.end(), argv + 1 + n_own, argv + argc);
    if (!common_params_parse((int) rest.size(), rest.data(), params, LLAMA_EXAMPLE_SERVER)) {
        return 1;
    }
    llama_backend_init();
    llama_numa_init(params.numa);
    common_json found;
    if (mode == "memory") {
        if (params.devices.empty()) {
            params.devices = paper; // and none of those that are there
        }
        found = memory(params);
    } else {
        const double seconds = speeds ? atof(argv[3]) : 0;
        found["devices"] = devices(seconds);
        if (speeds) {
            const size_t n_bytes = strtoull(argv[2], nullptr, 10);
            found["bandwidth"] = ram_bandwidth(n_bytes, seconds, params.cpuparams.n_threads);
            found["host"]      = host_paces(n_bytes, seconds, params.cpuparams.n_threads);
        }
    }
    common_log_flush(common_log_main());
    printf("%s\n", found.dump_safe().c_str());
    return 0;
}

} // namespace

int main(int argc, char ** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception & err) {
        common_log_flush(common_log_main());
        fprintf(stderr, "error: %s\n", err.what());
        return 1;
    }
}
