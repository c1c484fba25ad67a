// What a HunYuan template asks of sampling and parsing: the prompt, what stands in the model's mouth, the grammar.

#include "hunyuan-template.h"

#include "hunyuan.h"
#include "parsers.h"

#include <stdexcept>

namespace {

using peg        = common_peg_parser;
using params_in  = autoparser::generation_params;

const std::string THINK = "<think>", THINK_END = "</think>", CALLS = "<tool_calls>", CALLS_END = "</tool_calls>";

// The model's own way from a thought to the answer; a budget forces it.
const std::string TO_ANSWER = "\n</think>\n<answer>\n";

// A call's opening as far as it goes at the end of the text, so that the grammar starts only on what it accepts.
// Spaces are those of the grammar's `space`.
const std::string SPACE   = "(?: |\\n{1,2}[ \\t]{0,20})?";
const std::string TRIGGER = "(?:^|\\n|>|：|:)[ \\t]*(<tool_calls>" + SPACE + "\\[" + SPACE + "(?:\\{" + SPACE +
                            "(?:\"(?:n(?:a(?:m(?:e(?:\"(?:" + SPACE + "(?::" + SPACE + "\"?)?)?)?)?)?)?)?)?)?)$";

// The template's text after the last special token: what it has written for the model.
std::string begun_answer(const std::string & prompt) {
    const size_t end = prompt.rfind("|>");
    const auto   tail = end == std::string::npos ? std::string() : prompt.substr(end + 2);
    return string_starts_with(tail, THINK) ? tail : std::string();
}

// The message that the request wants continued, as the model would have written it.
std::string continued(const params_in & inputs, const std::string & begun) {
    const auto & msg = inputs.continue_msg;
    std::string  text = begun;
    if (begun.empty()) {
        text = THINK + "\n" + msg.reasoning_content;
        text += inputs.continue_final_message == COMMON_CHAT_CONTINUATION_CONTENT ? TO_ANSWER : "";
    } else {
        text += "<answer>\n";
    }
    return inputs.continue_final_message == COMMON_CHAT_CONTINUATION_CONTENT ? text + msg.render_content() : text;
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
                                       CALLS_END + p.space() + p.optional(p.literal("</answer>") + p.space()));
}

// From the output's start to where the answer's own grammar begins. The thought is free but for what would end it.
peg head_rule(common_chat_peg_builder & p, const std::string & begun) {
    hunyuan_reader reader(hunyuan_mode::plain);
    reader.append(begun);
    const auto thought = p.until_one_of({ THINK_END, "</answer>", "<answer>", CALLS }) + THINK_END + p.space();
    const auto open    = p.optional(p.literal("<answer>") + p.space());
    if (begun.empty()) {
        return p.optional(THINK + thought) + open;
    }
    return reader.in_thought() ? begun + thought + open : begun + open;
}

common_peg_arena answer_grammar(const params_in & inputs, const std::string & begun, bool has_calls) {
    return build_chat_peg_parser([&](common_chat_peg_builder & p) {
        auto body = p.choice();
        if (has_calls) {
            body |= calls_rule(p, inputs);
        }
        if (!inputs.json_schema.is_null() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_REQUIRED) {
            body |= p.rule("answer", p.schema(p.json(), "response-format", inputs.json_schema) + p.space() +
                                         p.optional(p.literal("</answer>") + p.space()));
        }
        return head_rule(p, begun) + body;
    });
}

void constrain(common_chat_params & data, const params_in & inputs, bool has_calls) {
    const bool has_schema = !inputs.json_schema.is_null();
    if (!has_calls && !has_schema) {
        return;
    }
    const auto arena  = answer_grammar(inputs, data.generation_prompt, has_calls);
    data.grammar_lazy = !has_schema && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_AUTO;
    data.grammar      = build_grammar([&](const common_grammar_builder & builder) {
        arena.build_grammar(builder, data.grammar_lazy);
    });
    if (data.grammar_lazy) {
        data.grammar_triggers = { { COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN, TRIGGER } };
    }
}

void require_function(const params_in & inputs) {
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
    require_function(inputs);
    // a grammar of the request's own says what the whole output is: no thought can come before it
    inputs.enable_thinking = inputs.enable_thinking && inputs.grammar.empty();

    common_chat_params data;
    data.prompt            = common_chat_template_direct_apply_impl(tmpl, inputs);
    data.generation_prompt = begun_answer(data.prompt);
    data.format            = !has_tools ? COMMON_CHAT_FORMAT_HUNYUAN :
                             has_calls  ? COMMON_CHAT_FORMAT_HUNYUAN_TOOLS : COMMON_CHAT_FORMAT_HUNYUAN_NO_CALLS;
    data.supports_thinking  = true;
    data.thinking_start_tag = THINK;
    data.thinking_end_tags  = { TO_ANSWER, THINK_END, "</answer>" };

    std::string added;
    if (inputs.has_continuation()) {
        added = continued(inputs, data.generation_prompt).substr(data.generation_prompt.size());
    } else if (!inputs.grammar.empty()) {
        added = "<answer>\n";
    }
    data.prompt += added;
    data.generation_prompt += added;

    if (inputs.grammar.empty()) {
        constrain(data, inputs, has_calls);
    } else {
        data.grammar = inputs.grammar;
    }
    return data;
}
