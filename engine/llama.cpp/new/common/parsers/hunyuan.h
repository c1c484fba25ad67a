// HunYuan's output format, read from text.
//
// The model writes <think>..</think>, <answer>..</answer> and <tool_calls>[{"name":.., "arguments":{..}}, ..]</tool_calls>
// as ordinary text: none of the tags is one token, and the tokens that make one up differ with what stands beside it.
// So the state is kept by text. The reader never fails: whatever a model writes comes out as something.
//
// What is a tag. The six strings above, outside a call's JSON, anywhere. None of them reaches thought or answer,
// save in code of the answer (a fenced block, or code in a line that the line has not closed) and directly between two
// backticks in a thought: there they are text. A </answer> after which only whitespace comes is a tag even in code.
//
// What a tag does. In a thought </think> and </answer> end it; <answer> and <tool_calls> do so where they stand at the
// start of a line or before a line end (elsewhere a thought merely speaks of them). In the answer <think> opens a
// thought where it stands at the start of a line or of the output. <tool_calls> opens calls if a call follows, with
// a name that is complete; else the text after it is answer. All others change nothing. Where the conversation has
// tools, "助手：" in front of the answer is a tag too.
//
// Whitespace (space, \t, \r, \n) before a tag and at the end of the output belongs to the tag; after a tag it does too
// as long as the part (thought or answer) is empty. All other bytes come out once, in order.

#pragma once

#include "hunyuan-calls.h"

#include <cstddef>
#include <string>
#include <vector>

struct common_chat_msg;
struct common_chat_parser_params;

namespace hunyuan_tag {

inline const std::string THINK = "<think>", THINK_END = "</think>";
inline const std::string ANSWER = "<answer>", ANSWER_END = "</answer>";
inline const std::string CALLS = "<tool_calls>", CALLS_END = "</tool_calls>";

}  // namespace hunyuan_tag

inline bool hunyuan_is_space(char c) {
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

enum class hunyuan_kind {
    thought,
    answer,
    tool,  // JSON of calls
    tag,   // tags, and the whitespace that belongs to them
    held,  // at the end of partial text only: what may still become a tag, or whitespace that may still belong to one
};

struct hunyuan_span {
    size_t       begin;
    size_t       end;
    hunyuan_kind kind;
};

enum class hunyuan_mode {
    plain,     // a conversation without tools: what stands between <tool_calls> tags is answer, and so is "助手："
    tools,     // calls are read, and "助手：" is a tag
    no_calls,  // tool_choice "none": "助手：" is a tag, calls are answer
};

hunyuan_mode hunyuan_mode_of(const common_chat_parser_params & params);

// Cuts generated text into spans that cover every byte, in order and without gaps. What is not held in partial text keeps
// its kind whatever follows. generation_prompt is what the template has put in the model's mouth ("<think>\n\n</think>\n"
// of fast mode, or an opened thought); offsets count in text alone.
std::vector<hunyuan_span> hunyuan_spans(const std::string & text, bool is_partial,
                                        const std::string & generation_prompt = "",
                                        hunyuan_mode        mode              = hunyuan_mode::tools);

// The message in generated text. Of a continued message (params.is_continuation) the generation prompt's own text is part.
// reasoning_format none: thoughts stay in content, between <think>\n and \n</think>\n; deepseek-legacy: there and in
// reasoning_content; otherwise in reasoning_content alone. Never throws; of text that grows each part only grows.
common_chat_msg hunyuan_parse(const std::string & text, bool is_partial, const common_chat_parser_params & params);

// The same by pieces: a piece costs its own length and that of what is undecided (whitespace that may belong to a tag, a
// call section that is open), both of which are read again; what is decided costs nothing more.
class hunyuan_reader {
  public:
    // A run of bytes of one kind; runs of one part have the same number, and a new part begins where the state changes.
    struct run : hunyuan_span {
        size_t part;
    };

    explicit hunyuan_reader(hunyuan_mode mode) : mode(mode) {}

    void append(const std::string & piece);
    void keep_space();  // whitespace at the end so far is text: the client gave it, in a message to be continued
    void finish();      // the output is complete: nothing is held any more

    bool                              in_thought() const { return state == hunyuan_kind::thought; }
    bool                              in_tag() const;  // the text ends in what may become a tag
    size_t                            n_part() const { return part; }
    size_t                            n_read() const { return at; }  // bytes that are decided
    const std::string &               text() const { return bytes; }
    const std::vector<run> &          runs() const { return done; }
    const std::vector<hunyuan_call> & calls() const { return found; }

  private:
    // Where the answer's Markdown is code, kept by line.
    struct code_state {
        size_t fence = 0;      // backticks that opened the block, 0 outside
        size_t lead  = 0;      // backticks at the start of this line
        size_t open  = 0;      // backticks that opened code in this line, 0 outside
        size_t run   = 0;      // backticks that this text ends in
        bool   other = false;  // something else in this line

        void   feed(char c);
        size_t settled() const;  // `open` once the run has ended
        bool   inside() const;
    };

    struct match {
        enum { no, yes, wait } verdict = no;
        size_t       end   = 0;
        hunyuan_kind after = hunyuan_kind::answer;  // the state that the tag leads to
    };

    bool   step();
    bool   step_space();
    bool   step_calls();
    match  tag_at(size_t pos, const code_state & code) const;
    match  word_at(size_t pos) const;
    match  effect(size_t pos, size_t tag, const code_state & code) const;
    match  framed(size_t pos, size_t end, hunyuan_kind after) const;
    match  calls_at(size_t end) const;
    bool   starts_line(size_t pos) const;
    void   take_tag(const match & tag);
    void   take_text(size_t end);
    void   add(size_t end, hunyuan_kind kind);
    size_t skip_space(size_t pos) const;

    hunyuan_mode              mode;
    std::string               bytes;
    std::vector<run>          done;
    std::vector<hunyuan_call> found;
    hunyuan_kind              state     = hunyuan_kind::answer;  // thought, answer or tool
    size_t                    at        = 0;                     // first byte that is not decided
    size_t                    limit     = 0;                     // end of the whole characters
    size_t                    part      = 0;
    size_t                    tag_end   = 0;                     // of the last tag
    size_t                    n_before  = 0;                     // calls of earlier sections
    size_t                    section   = 0;                     // where the open section's JSON begins
    bool                      final     = false;
    bool                      has_text[2] = { false, false };    // thought, answer
    bool                      has_word  = false;
    code_state                code;
};
