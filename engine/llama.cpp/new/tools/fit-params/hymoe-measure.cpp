// What a machine has, and what a model would take of it: one JSON document on stdout, the log on stderr.
//
//   hymoe-measure devices                 [ARGUMENTS]    every device but the processor, with its memory
//   hymoe-measure speeds BYTES SECONDS    [ARGUMENTS]    the same, and how fast memories and links are read
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

// Bytes per second of the fastest of the runs of `run` that fit into `seconds`, the first not counted: it maps pages,
// compiles kernels and wakes clocks. Other work on the machine only ever makes a run slower.
double fastest(size_t n_bytes, double seconds, const std::function<void()> & run) {
    run();
    const auto begun = clock_type::now();
    double     best  = 0;
    do {
        const auto start = clock_type::now();
        run();
        best = std::max(best, n_bytes / seconds_since(start));
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
    return fastest(n_words * sizeof(uint64_t) * n_threads, seconds, [&] {
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

// A matrix-vector product reads a device's memory as generating a token does.
double product_bandwidth(ggml_backend_t backend, size_t n_bytes, double seconds) {
    constexpr int64_t n_per_row = 4096;
    const int64_t n_rows = n_bytes / ggml_row_size(GGML_TYPE_Q8_0, n_per_row);
    const ggml_context_ptr ctx = tensors_only(8);
    ggml_tensor * weights = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_Q8_0, n_per_row, n_rows);
    ggml_tensor * vector  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_per_row);
    ggml_cgraph * graph   = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, ggml_mul_mat(ctx.get(), weights, vector));
    const ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    if (!buffer) {
        return 0;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    return fastest(ggml_nbytes(weights), seconds, [&] { ggml_backend_graph_compute(backend, graph); });
}

// Larger and larger products, up to one of `n_bytes`, which no cache holds, or as a slow device manages in the time.
double device_bandwidth(ggml_backend_t backend, size_t n_bytes, double seconds) {
    double rate = 0;
    for (size_t size = 4 << 20; size <= n_bytes; size *= 4) {
        rate = product_bandwidth(backend, size, seconds / 4);
        if (4 * size > rate * seconds) {
            break;
        }
    }
    return rate;
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
    return fastest(n_bytes, seconds, [&] {
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
    // larger than any cache; a network gets what it can carry
    const size_t room = found.at("free").get<size_t>() / 4;
    const size_t size = std::min<size_t>(is_rpc(dev) ? 8 << 20 : 256 << 20, room) & ~size_t(0xFFFF);
    if (size == 0) {
        return;
    }
    const auto set = [&found](const char * key, double rate) {
        if (rate > 0) {
            found[key] = rate;
        }
    };
    ggml_backend_buffer_type_t host = ggml_backend_dev_host_buffer_type(dev);
    if (!is_rpc(dev)) { // a product there is a message and its answer, whatever the memory
        set("bandwidth", device_bandwidth(backend.get(), size, seconds));
    }
    const double pageable = link_bandwidth(backend.get(), nullptr, size, seconds);
    set("link",          host ? link_bandwidth(backend.get(), host, size, seconds) : pageable);
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
            // what everything in RAM is predicted from
            found["bandwidth"] = ram_bandwidth(strtoull(argv[2], nullptr, 10), 3 * seconds, params.cpuparams.n_threads);
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
