// What a HunYuan template asks of sampling and parsing: the prompt, what stands in the model's mouth, the grammar.

#include "hunyuan-template.h"

#include "hunyuan.h"
#include "parsers.h"

#include <stdexcept>

namespace {

using peg        = common_peg_parser;
using params_in  = autoparser::generation_params;

using namespace hunyuan_tag;

// The model's own way from a thought to the answer; a budget forces it.
const std::string TO_ANSWER = "\n" + THINK_END + "\n" + ANSWER + "\n";

// A call's opening as far as it goes at the end of the text, so that the grammar starts only on what it accepts: after the
// brace, since an empty array is no call. Spaces are those of the grammar's `space`. Each part is bounded: std::regex calls
// itself once for every character that it repeats over.
const std::string SPACE   = "(?: |\\n{1,2}[ \\t]{0,20})?";
const std::string TRIGGER = "(?:^|\\n|>|：|:)[ \\t]{0,20}(" + CALLS + SPACE + "\\[" + SPACE + "\\{" +
                            SPACE + "(?:\"(?:n(?:a(?:m(?:e(?:\"(?:" + SPACE + "(?::" + SPACE + "\"?)?)?)?)?)?)?)?)?)$";

// The template's text after the last special token: what it has written for the model.
std::string begun_answer(const std::string & prompt) {
    const size_t end = prompt.rfind("|>");
    const auto   tail = end == std::string::npos ? std::string() : prompt.substr(end + 2);
    return string_starts_with(tail, THINK) ? tail : std::string();
}

// What a template cannot render is the request's affair (400), in the words that other formats have for it.
std::string rendered(const common_chat_template & tmpl, const params_in & inputs) {
    try {
        return common_chat_template_direct_apply_impl(tmpl, inputs);
    } catch (const std::exception & e) {
        throw std::invalid_argument(std::string("Unable to generate parser for this template. It does not render: ") + e.what());
    }
}

// What stands in the model's mouth: the template's text and, of a message to be continued, its own.
struct begun_text {
    std::string head;     // up to where the answer's content begins, if it does
    std::string content;  // that the client has given
};

begun_text continued(const params_in & inputs, const std::string & begun) {
    const auto & msg        = inputs.continue_msg;
    const bool   in_content = inputs.continue_final_message == COMMON_CHAT_CONTINUATION_CONTENT;
    if (!begun.empty()) {
        return { begun + ANSWER + "\n", in_content ? msg.render_content() : "" };
    }
    const std::string thought = THINK + "\n" + msg.reasoning_content;
    return in_content ? begun_text{ thought + TO_ANSWER, msg.render_content() } : begun_text{ thought, "" };
}

// One call of one of the functions that may be called.
peg call_rule(common_chat_peg_builder & p, const params_in & inputs) {
    auto any = p.choice();
    foreach_function(inputs.tools, [&](const json & tool) {
        const auto &      function = tool.at("function");
        const std::string name     = function.at("name");
        if (inputs.tool_choice_function.empty() || inputs.tool_choice_function == name) {
            const auto arguments = p.schema(p.json(), "tool-" + name + "-arguments", common_chat_tool_parameters(function));
            any |= p.rule("tool-" + name, p.literal(json(name).dump() + ",") + p.space() +
                                              "\"arguments\":" + p.space() + arguments);
        }
    });
    return p.rule("call", "{" + p.space() + "\"name\":" + p.space() + any + p.space() + "}");
}

peg calls_rule(common_chat_peg_builder & p, const params_in & inputs) {
    const auto call = call_rule(p, inputs);
    const auto more = inputs.parallel_tool_calls ? p.zero_or_more("," + p.space() + call + p.space()) : p.eps();
    return p.trigger_rule("calls", CALLS + p.space() + "[" + p.space() + call + p.space() + more + "]" + p.space() +
                                       CALLS_END + p.space() + p.optional(p.literal(ANSWER_END) + p.space()));
}

// From the output's start to where the answer's own grammar begins. The thought is free but for what would end it.
peg head_rule(common_chat_peg_builder & p, const std::string & begun) {
    hunyuan_reader reader(hunyuan_mode::plain);
    reader.append(begun);
    const auto thought = p.until_one_of({ THINK_END, ANSWER_END, ANSWER, CALLS }) + THINK_END + p.space();
    const auto open    = p.optional(p.literal(ANSWER) + p.space());
    if (begun.empty()) {
        return p.optional(THINK + thought) + open;
    }
    if (reader.in_thought()) {
        return begun + thought + open;
    }
    return string_ends_with(begun, ANSWER + "\n") ? begun + p.space() : begun + open;
}

// Content that was begun is part of what the grammar reads: it has begun the JSON, or the calls, or stands before them.
common_peg_arena answer_grammar(const params_in & inputs, const begun_text & begun, bool has_calls) {
    return build_chat_peg_parser([&](common_chat_peg_builder & p) {
        auto body = p.choice();
        if (has_calls) {
            const bool begins = string_starts_with(begun.content, CALLS) || string_starts_with(CALLS, begun.content);
            body |= begins ? calls_rule(p, inputs) : begun.content + p.space() + calls_rule(p, inputs);
        }
        if (!inputs.json_schema.is_null() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_REQUIRED) {
            body |= p.rule("answer", p.schema(p.json(), "response-format", inputs.json_schema) + p.space() +
                                         p.optional(p.literal(ANSWER_END) + p.space()));
        }
        return head_rule(p, begun.head) + body;
    });
}

void constrain(common_chat_params & data, const params_in & inputs, const begun_text & begun, bool has_calls) {
    const bool has_schema = !inputs.json_schema.is_null();
    if (!has_calls && !has_schema) {
        return;
    }
    const auto arena  = answer_grammar(inputs, begun, has_calls);
    data.grammar_lazy = !has_schema && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_AUTO;
    data.grammar      = build_grammar([&](const common_grammar_builder & builder) {
        arena.build_grammar(builder, data.grammar_lazy);
    });
    if (data.grammar_lazy) {
        data.grammar_triggers = { { COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN, TRIGGER } };
    }
}

void check_choice(const params_in & inputs, bool has_tools) {
    if (inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED && !has_tools) {
        throw std::invalid_argument("tool_choice requires a call, and the request has no tools");
    }
    bool known = inputs.tool_choice_function.empty();
    foreach_function(inputs.tools, [&](const json & tool) {
        known = known || tool.at("function").at("name") == inputs.tool_choice_function;
    });
    if (!known) {
        throw std::invalid_argument("tool_choice names \"" + inputs.tool_choice_function + "\", which is not among the tools");
    }
}

}  // namespace

bool is_hunyuan_template(const std::string & src) {
    return src.find("<|extra_0|>") != std::string::npos && src.find("<|startoftext|>") != std::string::npos &&
           src.find(THINK) != std::string::npos;
}

common_chat_params common_chat_params_init_hunyuan(const common_chat_template & tmpl, const params_in & given) {
    auto       inputs    = given;
    const bool has_tools = inputs.tools.is_array() && !inputs.tools.empty();
    const bool has_calls = has_tools && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
    check_choice(inputs, has_tools);
    // a grammar of the request's own says what the whole output is: no thought can come before it
    inputs.enable_thinking = inputs.enable_thinking && inputs.grammar.empty();
    // the server has read the template's argument of that name already; it must not outdo what came after
    if (!inputs.extra_context.is_object()) {
        inputs.extra_context = json::object();
    }
    inputs.extra_context["enable_thinking"] = inputs.enable_thinking;

    common_chat_params data;
    data.prompt            = rendered(tmpl, inputs);
    data.generation_prompt = begun_answer(data.prompt);
    data.format            = !has_tools ? COMMON_CHAT_FORMAT_HUNYUAN :
                             has_calls  ? COMMON_CHAT_FORMAT_HUNYUAN_TOOLS : COMMON_CHAT_FORMAT_HUNYUAN_NO_CALLS;
    data.supports_thinking  = true;
    data.thinking_start_tag = THINK;
    data.thinking_end_tags  = { TO_ANSWER, THINK_END, ANSWER_END };
    if (has_calls) {
        data.thinking_end_tags.push_back(CALLS);
    }

    begun_text begun = { data.generation_prompt, "" };
    if (inputs.has_continuation()) {
        begun = continued(inputs, data.generation_prompt);
    } else if (!inputs.grammar.empty()) {
        begun.head += ANSWER + "\n";
    }
    data.prompt.resize(data.prompt.size() - data.generation_prompt.size());
    data.generation_prompt = begun.head + begun.content;
    data.prompt += data.generation_prompt;

    // the request's own grammar goes to the sampler as it is: one of ours would have to accept the generation prompt first
    if (inputs.grammar.empty()) {
        constrain(data, inputs, begun, has_calls);
    }
    return data;
}
