#include "hunyuan.h"

#include "chat.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace {

enum tag_name { THINK, THINK_END, ANSWER, ANSWER_END, CALLS, CALLS_END };

const std::string TAGS[] = { hunyuan_tag::THINK,      hunyuan_tag::THINK_END, hunyuan_tag::ANSWER,
                             hunyuan_tag::ANSWER_END, hunyuan_tag::CALLS,     hunyuan_tag::CALLS_END };

// The vendor's tool prompt asks for it in front of every reply that is no call.
const std::string ASSISTANT_WORDS[] = { "助手：", "助手:" };

// The end of the whole characters in text.
size_t utf8_whole(const std::string & text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); back++) {
        const unsigned char c = text[text.size() - back];
        if ((c & 0xC0) == 0x80) {
            continue;
        }
        const size_t length = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
        return length > back ? text.size() - back : text.size();
    }
    return text.size();
}

}  // namespace

void hunyuan_reader::code_state::feed(char c) {
    if (c == '`') {
        run++;
        lead += !other;
        return;
    }
    open = settled();
    run  = 0;
    if (c == '\n') {
        if (fence == 0 && lead >= 3 && open == lead) {
            fence = lead;
        } else if (fence != 0 && lead >= fence && !other) {
            fence = 0;
        }
        lead = open = 0;
        other = false;
    } else if (!hunyuan_is_space(c)) {
        other = true;
    }
}

size_t hunyuan_reader::code_state::settled() const {
    return run == 0 ? open : open == 0 ? run : run == open ? 0 : open;
}

bool hunyuan_reader::code_state::inside() const {
    return fence != 0 ? lead < fence || other : settled() != 0;
}

void hunyuan_reader::append(const std::string & piece) {
    bytes += piece;
    limit = utf8_whole(bytes);
    while (step()) {
    }
}

void hunyuan_reader::keep_space() {
    if (at < limit && skip_space(at) == limit && has_text[state == hunyuan_kind::answer]) {
        take_text(limit);
    }
}

void hunyuan_reader::finish() {
    final = true;
    limit = bytes.size();
    while (step()) {
    }
}

bool hunyuan_reader::in_tag() const {
    const size_t begin = skip_space(at);
    return begin < limit && bytes[begin] == '<' && limit - begin < TAGS[CALLS_END].size();
}

// Decides what stands at `at`, if the text so far allows it.
bool hunyuan_reader::step() {
    if (state == hunyuan_kind::tool) {
        return step_calls();
    }
    if (at == limit) {
        return false;
    }
    if (hunyuan_is_space(bytes[at])) {
        return step_space();
    }
    const match tag = tag_at(at, code);
    if (tag.verdict == match::yes) {
        take_tag(tag);
    } else if (tag.verdict == match::no) {
        size_t end = at + 1;
        while (end < limit && bytes[end] != '<' && !hunyuan_is_space(bytes[end])) {
            end++;
        }
        take_text(end);
    }
    return tag.verdict != match::wait;
}

bool hunyuan_reader::step_space() {
    const size_t end  = skip_space(at);
    code_state   then = code;
    std::for_each(bytes.begin() + at, bytes.begin() + end, [&](char c) { then.feed(c); });
    const match tag = end < limit ? tag_at(end, then) : match{ final ? match::yes : match::wait, end, state };
    if (tag.verdict == match::wait) {
        return false;
    }
    if (tag.verdict == match::yes || !has_text[state == hunyuan_kind::answer]) {
        add(end, hunyuan_kind::tag);
    } else {
        take_text(end);
    }
    return true;
}

// Reads the open section from its start each time: its calls are few, and their state would be long.
bool hunyuan_reader::step_calls() {
    const hunyuan_section now = hunyuan_read_section(bytes, section, limit, final);
    found.resize(n_before);
    found.insert(found.end(), now.calls.begin(), now.calls.end());
    if (now.consumed > at) {
        add(now.consumed, hunyuan_kind::tool);
    }
    if (!now.is_open) {
        n_before = found.size();
        state    = hunyuan_kind::answer;
        tag_end  = at;
        part++;
    }
    return !now.is_open;
}

hunyuan_reader::match hunyuan_reader::tag_at(size_t pos, const code_state & code) const {
    if (bytes[pos] != '<') {
        return word_at(pos);
    }
    for (size_t tag = THINK; tag <= CALLS_END; tag++) {
        const size_t n = std::min(TAGS[tag].size(), limit - pos);
        if (bytes.compare(pos, n, TAGS[tag], 0, n) != 0) {
            continue;
        }
        if (n < TAGS[tag].size()) {
            return { final ? match::no : match::wait, 0, state };
        }
        return effect(pos, tag, code);
    }
    return {};
}

hunyuan_reader::match hunyuan_reader::word_at(size_t pos) const {
    if (mode == hunyuan_mode::plain || state != hunyuan_kind::answer || has_text[1] || has_word) {
        return {};
    }
    for (const auto & word : ASSISTANT_WORDS) {
        const size_t n = std::min(word.size(), limit - pos);
        if (bytes.compare(pos, n, word, 0, n) == 0) {
            return { n == word.size() ? match::yes : final ? match::no : match::wait, pos + n, state };
        }
    }
    return {};
}

// What a tag that stands at pos does; whether it is one where it is quoted.
hunyuan_reader::match hunyuan_reader::effect(size_t pos, size_t tag, const code_state & code) const {
    const size_t end  = pos + TAGS[tag].size();
    const match  none = { match::yes, end, state };
    const match  wait = { match::wait, end, state };
    if (state == hunyuan_kind::thought) {
        if (pos > 0 && bytes[pos - 1] == '`') {
            if (end == limit && !final) {
                return wait;
            }
            if (end < limit && bytes[end] == '`') {
                return {};
            }
        }
        switch (tag) {
            case THINK_END:
            case ANSWER_END: return { match::yes, end, hunyuan_kind::answer };
            case ANSWER:     return framed(pos, end, hunyuan_kind::answer);
            case CALLS:      return framed(pos, end, hunyuan_kind::tool);
            default:         return none;
        }
    }
    if (code.inside()) {
        if (tag != ANSWER_END || skip_space(end) < limit) {
            return {};
        }
        return final ? none : wait;
    }
    switch (tag) {
        case THINK: return { match::yes, end, starts_line(pos) ? hunyuan_kind::thought : state };
        case CALLS: return calls_at(end);
        default:    return none;
    }
}

// A tag that acts at the start of a line or before a line end only.
hunyuan_reader::match hunyuan_reader::framed(size_t pos, size_t end, hunyuan_kind after) const {
    bool acts = starts_line(pos);
    if (!acts) {
        if (end == limit && !final) {
            return { match::wait, end, state };
        }
        acts = end == limit || bytes[end] == '\n' || bytes[end] == '\r';
    }
    if (acts && after == hunyuan_kind::tool) {
        return calls_at(end);
    }
    return { match::yes, end, acts ? after : state };
}

hunyuan_reader::match hunyuan_reader::calls_at(size_t end) const {
    if (mode != hunyuan_mode::tools) {
        return { match::yes, end, state };
    }
    const hunyuan_section now = hunyuan_read_section(bytes, end, limit, final);
    if (now.calls.empty() && now.is_open) {
        return { match::wait, end, state };
    }
    return { match::yes, end, now.consumed > end ? hunyuan_kind::tool : state };
}

bool hunyuan_reader::starts_line(size_t pos) const {
    while (pos > tag_end && (bytes[pos - 1] == ' ' || bytes[pos - 1] == '\t')) {
        pos--;
    }
    return pos == tag_end || bytes[pos - 1] == '\n' || bytes[pos - 1] == '\r';
}

void hunyuan_reader::take_tag(const match & tag) {
    has_word = has_word || bytes[at] != '<';
    add(tag.end, hunyuan_kind::tag);
    tag_end = at;
    section = at;
    code    = {};
    part += tag.after != state;
    state = tag.after;
}

void hunyuan_reader::take_text(size_t end) {
    std::for_each(bytes.begin() + at, bytes.begin() + end, [&](char c) { code.feed(c); });
    has_text[state == hunyuan_kind::answer] = true;
    add(end, state);
}

void hunyuan_reader::add(size_t end, hunyuan_kind kind) {
    if (!done.empty() && done.back().kind == kind && done.back().part == part) {
        done.back().end = end;
    } else {
        done.push_back({ { at, end, kind }, part });
    }
    at = end;
}

size_t hunyuan_reader::skip_space(size_t pos) const {
    while (pos < limit && hunyuan_is_space(bytes[pos])) {
        pos++;
    }
    return pos;
}

std::vector<hunyuan_span> hunyuan_spans(const std::string & text, bool is_partial,
                                        const std::string & generation_prompt, hunyuan_mode mode) {
    hunyuan_reader reader(mode);
    reader.append(generation_prompt + text);
    if (!is_partial) {
        reader.finish();
    }
    const size_t              skipped = generation_prompt.size();
    std::vector<hunyuan_span> spans;
    for (const hunyuan_span & run : reader.runs()) {
        if (run.end > skipped) {
            spans.push_back({ std::max(run.begin, skipped) - skipped, run.end - skipped, run.kind });
        }
    }
    const size_t begin = std::max(reader.n_read(), skipped) - skipped;
    if (begin < text.size()) {
        spans.push_back({ begin, text.size(), hunyuan_kind::held });
    }
    return spans;
}

hunyuan_mode hunyuan_mode_of(const common_chat_parser_params & params) {
    switch (params.format) {
        case COMMON_CHAT_FORMAT_HUNYUAN_TOOLS:
            return params.parse_tool_calls ? hunyuan_mode::tools : hunyuan_mode::no_calls;
        case COMMON_CHAT_FORMAT_HUNYUAN_NO_CALLS:
            return hunyuan_mode::no_calls;
        default:
            return hunyuan_mode::plain;
    }
}

namespace {

// Appends a run to a part. Where a tag that was dropped between two runs would let their ends make up another,
// a newline keeps them apart.
void append_run(std::string & out, const std::string & run) {
    const bool joins = std::any_of(std::begin(TAGS), std::end(TAGS), [&](const std::string & tag) {
        for (size_t n = 1; n < tag.size() && n <= out.size(); n++) {
            if (tag[n] == run[0] && out.compare(out.size() - n, n, tag, 0, n) == 0) {
                return true;
            }
        }
        return false;
    });
    out += joins ? "\n" + run : run;
}

}  // namespace

common_chat_msg hunyuan_parse(const std::string & text, bool is_partial, const common_chat_parser_params & params) {
    hunyuan_reader reader(hunyuan_mode_of(params));
    reader.append(params.generation_prompt);
    if (params.is_continuation) {
        reader.keep_space();
    }
    reader.append(text);
    if (!is_partial) {
        reader.finish();
    }
    const bool in_content = params.reasoning_format == COMMON_REASONING_FORMAT_NONE ||
                            params.reasoning_format == COMMON_REASONING_FORMAT_DEEPSEEK_LEGACY;
    const bool separate   = params.reasoning_format != COMMON_REASONING_FORMAT_NONE;

    common_chat_msg msg;
    msg.role = "assistant";
    size_t     open  = 0;  // the thought's part, where content has one that is not closed
    const auto close = [&](size_t part) {
        if (open != 0 && open != part) {
            msg.content += "\n" + hunyuan_tag::THINK_END + "\n";
            open = 0;
        }
    };
    for (const auto & run : reader.runs()) {
        const std::string piece = reader.text().substr(run.begin, run.end - run.begin);
        close(run.part);
        if (run.kind == hunyuan_kind::answer) {
            append_run(msg.content, piece);
        }
        if (run.kind != hunyuan_kind::thought) {
            continue;
        }
        if (separate) {
            append_run(msg.reasoning_content, piece);
        }
        if (in_content) {
            if (open == 0) {
                msg.content += (msg.content.empty() ? "" : "\n") + hunyuan_tag::THINK + "\n";
            }
            append_run(msg.content, piece);
            open = run.part;
        }
    }
    close(reader.n_part());
    for (const auto & call : reader.calls()) {
        msg.tool_calls.push_back({ call.name, call.arguments, "" });
    }
    return msg;
}
