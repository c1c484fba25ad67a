// A thinking budget that watches text: what llama.cpp's own one looks for are token sequences, and HunYuan's tags have many.

#pragma once

#include "common.h"
#include "reasoning-budget.h"

// A sampler that ends a thought after params.reasoning_budget_tokens tokens: it then forces params.reasoning_budget_forced,
// at the end of a character and never inside a tag that the model has begun. A thought may end in other ways; a second
// thought has a budget of its own. Null where params describe another format than HunYuan's.
llama_sampler * hunyuan_budget_init(const llama_vocab * vocab, const common_params_sampling & params);

bool                          hunyuan_budget_is(const llama_sampler * smpl);
common_reasoning_budget_state hunyuan_budget_state(const llama_sampler * smpl);

// Ends the thought now. False where none is open.
bool hunyuan_budget_force(llama_sampler * smpl);
