#include "hunyuan-budget.h"

#include "hunyuan.h"
#include "unicode.h"

#include <algorithm>
#include <climits>
#include <cmath>

namespace {

struct hunyuan_budget {
    const llama_vocab * vocab;
    llama_tokens        forced;
    int32_t             budget;
    hunyuan_reader      reader = hunyuan_reader(hunyuan_mode::plain);

    int32_t remaining = budget;
    size_t  n_forced  = 0;  // tokens of `forced` that have come
    common_reasoning_budget_state state = REASONING_BUDGET_IDLE;

    void accept(llama_token token);
    void count(bool opened);
    void force();
};

hunyuan_budget * get(const llama_sampler * smpl) {
    return static_cast<hunyuan_budget *>(smpl->ctx);
}

void hunyuan_budget::accept(llama_token token) {
    const bool was_open = reader.in_thought();
    reader.append(common_token_to_piece(vocab, token, false));
    if (state == REASONING_BUDGET_FORCING) {
        n_forced++;
        if (n_forced < forced.size()) {
            return;
        }
        n_forced = 0;
        state    = REASONING_BUDGET_DONE;
    }
    if (reader.in_thought()) {
        count(!was_open || state == REASONING_BUDGET_DONE);
    } else if (was_open) {
        state = REASONING_BUDGET_DONE;
    }
}

// After a token that leaves the thought open, or has just opened it.
void hunyuan_budget::count(bool opened) {
    remaining = opened ? budget : std::max(remaining - 1, 0);
    if (remaining > 0) {
        state = REASONING_BUDGET_COUNTING;
    } else {
        force();
    }
}

void hunyuan_budget::force() {
    const bool whole = common_utf8_is_complete(reader.text()) && !reader.in_tag();
    state = whole ? REASONING_BUDGET_FORCING : REASONING_BUDGET_WAITING_UTF8;
}

const char * budget_name(const llama_sampler *) {
    return "hunyuan-budget";
}

void budget_accept(llama_sampler * smpl, llama_token token) {
    get(smpl)->accept(token);
}

void budget_apply(llama_sampler * smpl, llama_token_data_array * cur_p) {
    const auto & ctx = *get(smpl);
    if (ctx.state != REASONING_BUDGET_FORCING || ctx.forced.empty()) {
        return;
    }
    for (size_t i = 0; i < cur_p->size; i++) {
        if (cur_p->data[i].id != ctx.forced[ctx.n_forced]) {
            cur_p->data[i].logit = -INFINITY;
        }
    }
}

void budget_reset(llama_sampler * smpl) {
    auto & ctx = *get(smpl);
    ctx = hunyuan_budget{ ctx.vocab, ctx.forced, ctx.budget };
}

llama_sampler * budget_clone(const llama_sampler * smpl) {
    return llama_sampler_init(smpl->iface, new hunyuan_budget(*get(smpl)));
}

void budget_free(llama_sampler * smpl) {
    delete get(smpl);
}

llama_sampler_i budget_iface = {
    /* .name              = */ budget_name,
    /* .accept            = */ budget_accept,
    /* .apply             = */ budget_apply,
    /* .reset             = */ budget_reset,
    /* .clone             = */ budget_clone,
    /* .free              = */ budget_free,
    /* .backend_init      = */ nullptr,
    /* .backend_accept    = */ nullptr,
    /* .backend_apply     = */ nullptr,
    /* .backend_set_input = */ nullptr,
    /* .backend_reset     = */ nullptr,
    /* .copy_state        = */ nullptr,
};

}  // namespace

// Of all formats only HunYuan's has thoughts that </answer> may end.
llama_sampler * hunyuan_budget_init(const llama_vocab * vocab, const common_params_sampling & params) {
    const auto & ends = params.reasoning_budget_end;
    const bool   ours = std::any_of(ends.begin(), ends.end(), [&](const llama_tokens & tag) {
        return common_detokenize(vocab, tag, false) == "</answer>";
    });
    if (!ours) {
        return nullptr;
    }
    const int32_t budget = params.reasoning_budget_tokens < 0 ? INT32_MAX : params.reasoning_budget_tokens;
    return llama_sampler_init(&budget_iface, new hunyuan_budget{ vocab, params.reasoning_budget_forced, budget });
}

bool hunyuan_budget_is(const llama_sampler * smpl) {
    return smpl != nullptr && smpl->iface == &budget_iface;
}

common_reasoning_budget_state hunyuan_budget_state(const llama_sampler * smpl) {
    return get(smpl)->state;
}

bool hunyuan_budget_force(llama_sampler * smpl) {
    auto & ctx = *get(smpl);
    if (ctx.state != REASONING_BUDGET_COUNTING) {
        return false;
    }
    ctx.remaining = 0;
    ctx.force();
    return true;
}
