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
    hunyuan_mode        mode;
    hunyuan_reader      reader = hunyuan_reader(mode);

    int32_t remaining = budget;
    size_t  n_forced  = 0;  // tokens of `forced` that have come
    common_reasoning_budget_state state = REASONING_BUDGET_IDLE;

    void accept(llama_token token);
    void force();
};

hunyuan_budget * get(const llama_sampler * smpl) {
    return static_cast<hunyuan_budget *>(smpl->ctx);
}

void hunyuan_budget::accept(llama_token token) {
    const bool was_open = reader.in_thought();
    reader.append(common_token_to_piece(vocab, token, false));
    // tokens of the prompt are accepted too, and those nobody forces
    if (state == REASONING_BUDGET_FORCING && n_forced < forced.size() && token == forced[n_forced]) {
        n_forced++;
        if (n_forced < forced.size()) {
            return;
        }
        state = REASONING_BUDGET_DONE;
    }
    n_forced = 0;
    if (!reader.in_thought()) {
        state = was_open ? REASONING_BUDGET_DONE : state;
        return;
    }
    // the token that opens the thought is none of its own
    remaining = std::max(remaining - was_open, 0);
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
    ctx = hunyuan_budget{ ctx.vocab, ctx.forced, ctx.budget, ctx.mode };
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

// Of all formats only HunYuan's has thoughts that </answer> may end. <tool_calls> ends one where calls are read.
llama_sampler * hunyuan_budget_init(const llama_vocab * vocab, const common_params_sampling & params) {
    const auto & ends  = params.reasoning_budget_end;
    const auto   is_in = [&](const std::string & text) {
        return std::any_of(ends.begin(), ends.end(), [&](const llama_tokens & tag) {
            return common_detokenize(vocab, tag, false) == text;
        });
    };
    if (!is_in(hunyuan_tag::ANSWER_END)) {
        return nullptr;
    }
    const auto    mode   = is_in(hunyuan_tag::CALLS) ? hunyuan_mode::tools : hunyuan_mode::plain;
    const int32_t budget = params.reasoning_budget_tokens < 0 ? INT32_MAX : params.reasoning_budget_tokens;
    return llama_sampler_init(&budget_iface, new hunyuan_budget{ vocab, params.reasoning_budget_forced, budget, mode });
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
