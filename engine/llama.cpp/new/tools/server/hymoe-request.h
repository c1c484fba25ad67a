// What a request must not hold, and two spellings of clients that are accepted beside the stock ones.

#pragma once

#include "server-common.h"
#include "server-task.h"

#include <string>
#include <vector>

// Throw std::invalid_argument, which becomes HTTP 400 with the text as its message.
void hymoe_check_types(const json & body);  // of the fields whose wrong values llama.cpp takes for absent ones
void hymoe_check_messages(const json & messages);
void hymoe_check_tokens(const json & tokens, int32_t n_vocab);
void hymoe_check_task(const task_params & params, const llama_model * model);

// Why moved keys are refused for this model, in one line; empty where they are right.
std::string hymoe_moved_keys(const llama_model * model);

// A list of strings, or a string that holds one in JSON, with or without its brackets.
std::vector<std::string> hymoe_string_list(const json & value);

// A window of -1 is the whole context, as files and other servers mean it; the samplers would take it for none.
void hymoe_whole_context(common_params_sampling & sampling, int32_t n_ctx);

// Whether a completion's text begins with its prompt.
bool hymoe_echo(const task_params & params);
