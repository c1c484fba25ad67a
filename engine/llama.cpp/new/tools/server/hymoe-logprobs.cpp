#include "hymoe-logprobs.h"

#include "parsers/hunyuan.h"
#include "server-task.h"

#include <algorithm>
#include <cmath>

size_t hymoe_characters(const std::string & text) {
    return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

// The log probability of an entry, which has a probability instead after sampling.
static double logprob(const json & entry) {
    return entry.contains("logprob") ? entry.at("logprob").get<double>()
                                     : completion_token_output::logarithm(entry.at("prob").get<float>());
}

void hymoe_legacy_logprobs(json & logprobs, size_t text_offset) {
    json tokens = json::array(), token_logprobs = json::array(), top_logprobs = json::array(), offsets = json::array();
    for (const auto & entry : logprobs.at("content")) {
        json top = json::object();
        for (const auto & other : entry.at(entry.contains("top_probs") ? "top_probs" : "top_logprobs")) {
            const std::string text = other.at("token");
            if (!top.contains(text)) { // the likeliest one, where several are part of a character
                top[text] = logprob(other);
            }
        }
        tokens.push_back(entry.at("token"));
        token_logprobs.push_back(logprob(entry));
        top_logprobs.push_back(top);
        offsets.push_back(text_offset);
        text_offset += hymoe_characters(entry.at("token"));
    }
    logprobs["tokens"]         = tokens;
    logprobs["token_logprobs"] = token_logprobs;
    logprobs["top_logprobs"]   = top_logprobs;
    logprobs["text_offset"]    = offsets;
}

// All tokens in order, those too that ended in the middle of a character.
static void flatten(const completion_token_output & token, std::vector<completion_token_output> & out) {
    out.insert(out.end(), token.before.begin(), token.before.end());
    out.push_back(token);
    out.back().before.clear();
}

// Take what is whole of the characters that begin in `open`.
static std::string whole_characters(std::string & open) {
    const size_t n_whole = validate_utf8(open);
    const std::string whole = open.substr(0, n_whole);
    open.erase(0, n_whole);
    return whole;
}

std::vector<completion_token_output> hymoe_own_text(const std::vector<completion_token_output> & tokens, size_t n_bytes) {
    std::vector<completion_token_output> all;
    for (const auto & token : tokens) {
        flatten(token, all);
    }
    std::vector<completion_token_output> out;
    std::string open; // the beginning of a character
    size_t n_past = 0;
    for (auto & token : all) {
        if (n_past > n_bytes || (n_past == n_bytes && !token.piece.empty())) {
            break;
        }
        open += token.piece.substr(0, n_bytes - n_past);
        n_past += token.piece.size();
        token.text_to_send = whole_characters(open);
        out.push_back(token);
    }
    return out;
}

void hymoe_chat_logprobs::add(const completion_token_output & token, bool post_sampling) {
    std::vector<completion_token_output> tokens;
    flatten(token, tokens);
    for (const auto & one : tokens) {
        waiting.push_back({ one.piece, completion_token_output::probs_vector_to_json({ one }, post_sampling).at(0) });
    }
}

// What is thought and what is answer in `text`; all is answer where another parser reads it.
static std::vector<hunyuan_span> spans_of(const std::string & text, bool is_partial, const common_chat_parser_params & params) {
    if (params.format < COMMON_CHAT_FORMAT_HUNYUAN || params.format > COMMON_CHAT_FORMAT_HUNYUAN_NO_CALLS) {
        return { { 0, text.size(), hunyuan_kind::answer } };
    }
    return hunyuan_spans(text, is_partial, params.generation_prompt, hunyuan_mode_of(params));
}

json hymoe_chat_logprobs::take(const std::string & text, bool is_partial, const common_chat_parser_params & params) {
    const auto spans = spans_of(text, is_partial, params);
    const bool is_held = !spans.empty() && spans.back().kind == hunyuan_kind::held;
    const size_t n_certain = is_held ? spans.back().begin : text.size();

    json content = json::array(), reasoning = json::array();
    json & thoughts = params.reasoning_format == COMMON_REASONING_FORMAT_NONE ? content : reasoning;
    auto span = spans.begin();
    for (; !waiting.empty(); waiting.pop_front()) {
        const auto & [piece, entry] = waiting.front();
        const size_t end = n_past + piece.size();
        if (is_partial && end > n_certain) {
            break;
        }
        while (span != spans.end() && span->end <= n_past) {
            ++span;
        }
        for (auto part = span; part != spans.end() && part->begin < end; ++part) {
            const size_t first = std::max(part->begin, n_past);
            const std::string own = piece.substr(first - n_past, std::min(part->end, end) - first);
            if (part->kind == hunyuan_kind::thought) {
                give(thoughts, open_thought, entry, own, "thought");
            } else if (part->kind == hunyuan_kind::answer) {
                give(content, open_answer, entry, own, "answer");
            }
        }
        n_past = end;
    }
    if (content.empty() && reasoning.empty()) {
        return nullptr;
    }
    return json {{"content", content}, {"reasoning_content", reasoning}};
}

void hymoe_chat_logprobs::give(json & list, std::string & open, json entry, const std::string & text, const char * kind) {
    open += text;
    entry["token"] = whole_characters(open);
    entry["bytes"] = completion_token_output::str_to_bytes(text);
    entry["kind"]  = kind;
    list.push_back(entry);
}
