// C entry points to the format's reader, for callers without C++ (the tests read millions of texts through ctypes).
//
// A message comes as records in one buffer: a letter, the length in decimal, ':', the bytes. Letters: r reasoning, c content,
// and for each call n name and a arguments. Both functions return the bytes that the records take; where that is more
// than n_out, nothing is written. mode is a hunyuan_mode (any other number is `plain`), reasoning_format a
// common_reasoning_format.

#include "chat.h"
#include "hunyuan.h"

#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

namespace {

common_chat_parser_params make_params(const char * generation_prompt, int mode, int reasoning_format) {
    common_chat_parser_params params;
    params.format            = mode == static_cast<int>(hunyuan_mode::tools)    ? COMMON_CHAT_FORMAT_HUNYUAN_TOOLS :
                               mode == static_cast<int>(hunyuan_mode::no_calls) ? COMMON_CHAT_FORMAT_HUNYUAN_NO_CALLS :
                                                                                  COMMON_CHAT_FORMAT_HUNYUAN;
    params.reasoning_format  = static_cast<common_reasoning_format>(reasoning_format);
    params.generation_prompt = generation_prompt;
    return params;
}

size_t write_message(const common_chat_msg & msg, char * out, size_t n_out) {
    std::string records;
    const auto  record = [&](char letter, const std::string & value) {
        records += letter + std::to_string(value.size()) + ":" + value;
    };
    record('r', msg.reasoning_content);
    record('c', msg.content);
    for (const auto & call : msg.tool_calls) {
        record('n', call.name);
        record('a', call.arguments);
    }
    if (records.size() <= n_out) {
        std::memcpy(out, records.data(), records.size());
    }
    return records.size();
}

void apply(const common_chat_msg_diff & diff, common_chat_msg & msg) {
    msg.reasoning_content += diff.reasoning_content_delta;
    msg.content += diff.content_delta;
    if (diff.tool_call_index == std::string::npos) {
        return;
    }
    if (diff.tool_call_index == msg.tool_calls.size()) {
        msg.tool_calls.emplace_back();
    }
    auto & call = msg.tool_calls.at(diff.tool_call_index);
    call.name += diff.tool_call_delta.name;
    call.arguments += diff.tool_call_delta.arguments;
}

}  // namespace

extern "C" {

// The message in text[0, n_text).
size_t hymoe_hunyuan_parse(const char * text, size_t n_text, bool is_partial, const char * generation_prompt, int mode,
                           int reasoning_format, char * out, size_t n_out) {
    const auto params = make_params(generation_prompt, mode, reasoning_format);
    return write_message(hunyuan_parse(std::string(text, n_text), is_partial, params), out, n_out);
}

// The message that a client puts together from the server's deltas when text arrives in pieces that end at ends[0..n_ends).
// SIZE_MAX where the deltas would take something back.
size_t hymoe_hunyuan_stream(const char * text, size_t n_text, const size_t * ends, size_t n_ends,
                            const char * generation_prompt, int mode, int reasoning_format, char * out, size_t n_out) {
    const auto        params = make_params(generation_prompt, mode, reasoning_format);
    const std::string whole(text, n_text);
    common_chat_msg   before, client;
    try {
        for (size_t i = 0; i <= n_ends; i++) {
            const bool is_last = i == n_ends;
            const auto now     = hunyuan_parse(is_last ? whole : whole.substr(0, ends[i]), !is_last, params);
            for (const auto & diff : common_chat_msg_diff::compute_diffs(before, now)) {
                apply(diff, client);
            }
            before = now;
        }
    } catch (const std::exception &) {
        return SIZE_MAX;
    }
    return write_message(client, out, n_out);
}

// kinds[i] becomes the hunyuan_kind of text[i].
void hymoe_hunyuan_kinds(const char * text, size_t n_text, bool is_partial, const char * generation_prompt, int mode,
                         uint8_t * kinds) {
    const auto spans = hunyuan_spans(std::string(text, n_text), is_partial, generation_prompt, static_cast<hunyuan_mode>(mode));
    for (const auto & span : spans) {
        std::memset(kinds + span.begin, static_cast<int>(span.kind), span.end - span.begin);
    }
}

}
