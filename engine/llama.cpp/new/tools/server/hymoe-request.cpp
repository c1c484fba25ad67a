#include "hymoe-request.h"

#include "hymoe-json.h"

#include <algorithm>
#include <array>
#include <stdexcept>

static bool is_stop(const json & value) {
    if (!value.is_array()) {
        return value.is_string();
    }
    for (const auto & word : value) {
        if (!word.is_string()) {
            return false;
        }
    }
    return true;
}

void hymoe_check_types(const json & body) {
    static const struct {
        const char * key;
        const char * expected;
        bool (*is_right)(const json &);
    } fields[] = {
        { "stop",                     "a string or a list of strings", is_stop },
        { "chat_template_kwargs",     "an object", [](const json & v) { return v.is_object(); } },
        { "reasoning_budget_tokens",  "a number",  [](const json & v) { return v.is_number(); } },
        { "thinking_budget_tokens",   "a number",  [](const json & v) { return v.is_number(); } },
        { "reasoning_budget_message", "a string",  [](const json & v) { return v.is_string(); } },
        { "reasoning_control",        "a boolean", [](const json & v) { return v.is_boolean(); } },
        { "add_generation_prompt",    "a boolean", [](const json & v) { return v.is_boolean(); } },
        { "parallel_tool_calls",      "a boolean", [](const json & v) { return v.is_boolean(); } },
        { "add_special",              "a boolean", [](const json & v) { return v.is_boolean(); } },
        { "parse_special",            "a boolean", [](const json & v) { return v.is_boolean(); } },
        { "with_pieces",              "a boolean", [](const json & v) { return v.is_boolean(); } },
    };
    for (const auto & field : fields) {
        if (!body.contains(field.key) || body.at(field.key).is_null()) {
            continue;
        }
        const json & value = body.at(field.key);
        if (!field.is_right(value)) {
            throw std::invalid_argument(std::string("'") + field.key + "' must be " + field.expected + ", got " + hymoe_shown(value));
        }
    }
}

void hymoe_check_messages(const json & messages) {
    // "function" is not among them: OpenAI has retired it, and no template of this family has a place for it
    static const std::array<std::string, 5> roles = { "system", "developer", "user", "assistant", "tool" };

    if (messages.empty()) {
        throw std::invalid_argument("'messages' must not be empty");
    }
    for (const auto & message : messages) {
        if (!message.is_object()) {
            throw std::invalid_argument("each of 'messages' must be an object");
        }
        if (!message.contains("role") || !message.at("role").is_string()) {
            throw std::invalid_argument("each of 'messages' must have a 'role', a string");
        }
        const std::string role = message.at("role");
        if (std::find(roles.begin(), roles.end(), role) == roles.end()) {
            throw std::invalid_argument("unknown role '" + hymoe_shown(role) + "': expected system, developer, user, assistant or tool");
        }
    }
}

void hymoe_check_tokens(const json & tokens, int32_t n_vocab) {
    if (!tokens.is_array()) {
        throw std::invalid_argument("'tokens' must be an array of token ids");
    }
    for (const auto & token : tokens) {
        if (!token.is_number_integer()) {
            throw std::invalid_argument("'tokens' must be integers, got " + hymoe_shown(token));
        }
        // an unsigned number beyond int64_t becomes a negative one here
        const int64_t id = token.get<int64_t>();
        if (id < 0 || id >= n_vocab) {
            throw std::invalid_argument("token id " + token.dump_safe() + " is out of range: the vocabulary has " +
                                        std::to_string(n_vocab) + " tokens");
        }
    }
}

std::string hymoe_moved_keys(const llama_model * model) {
    std::array<char, 64> arch = {};
    llama_model_meta_val_str(model, "general.architecture", arch.data(), arch.size());
    if (std::string(arch.data()).rfind("hunyuan", 0) != 0) {
        return "";
    }
    return std::string("moved keys give wrong answers with ") + arch.data() +
           ": q and k are normalised after RoPE, so attention depends on absolute positions";
}

void hymoe_check_task(const task_params & params, const llama_model * model) {
    const std::string why = hymoe_moved_keys(model);
    if (params.n_cache_reuse > 0 && !why.empty()) {
        throw std::invalid_argument("n_cache_reuse is refused: " + why);
    }
    if (hymoe_echo(params) && params.sampling.n_probs > 0) {
        throw std::invalid_argument("echo with logprobs is not supported: no logits are kept for the prompt");
    }
}

std::vector<std::string> hymoe_string_list(const json & value) {
    if (!value.is_string()) {
        return value.get<std::vector<std::string>>();
    }
    const std::string text = value;
    const size_t first = text.find_first_not_of(" \t\r\n");
    const bool bracketed = first != std::string::npos && text[first] == '[';
    return json::parse(bracketed ? text : "[" + text + "]").get<std::vector<std::string>>();
}

void hymoe_whole_context(common_params_sampling & sampling, int32_t n_ctx) {
    for (int32_t * window : { &sampling.penalty_last_n, &sampling.dry_penalty_last_n }) {
        if (*window == -1) {
            *window = n_ctx;
        }
    }
}

bool hymoe_echo(const task_params & params) {
    return params.res_type == TASK_RESPONSE_TYPE_OAI_CMPL && params.chat_parser_params.echo;
}
