// Collecting an importance matrix counts what every chosen expert sees.
#pragma once

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

// Overrides the router's mode with "topk", whatever the file or the command line says: no pair may be dropped.
inline void hymoe_route_all(std::vector<llama_model_kv_override> & overrides) {
    const char * keys[] = { "hunyuan-moe.router.mode", "hunyuan-large.router.mode" };

    if (overrides.empty()) {
        overrides.emplace_back(); // the list ends with an entry whose key is empty
        overrides.back().key[0] = 0;
    }
    for (const char * key : keys) {
        llama_model_kv_override topk = {};
        topk.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
        snprintf(topk.key,     sizeof(topk.key),     "%s", key);
        snprintf(topk.val_str, sizeof(topk.val_str), "topk");

        overrides.erase(std::remove_if(overrides.begin(), overrides.end(), [&](const llama_model_kv_override & other) {
            return strcmp(other.key, key) == 0;
        }), overrides.end());
        overrides.insert(overrides.begin(), topk);
    }
}
