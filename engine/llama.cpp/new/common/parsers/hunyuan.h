// HunYuan's output format, read from text.
//
// The model writes <think>..</think>, <answer>..</answer> and <tool_calls>[{"name":.., "arguments":{..}}, ..]</tool_calls>
// as ordinary text: none of the tags is one token, and the tokens that make one up differ with what stands beside it.
// So the state is kept by text. The reader never fails: whatever a model writes comes out as something.
//
// What is a tag. The six strings above, outside a call's JSON, anywhere. None of them reaches thought or answer,
// save in code of the answer (a fenced block, or after an odd number of backticks in its line) and directly between two
// backticks in a thought: there they are text. A </answer> after which only whitespace comes is a tag even in code.
//
// What a tag does. In a thought </think> and </answer> end it; <answer> and <tool_calls> do so where they stand at the
// start of a line or before a line end (elsewhere a thought merely speaks of them). In the answer <think> opens a
// thought where it stands at the start of a line or of the output. <tool_calls> opens calls if a call follows, with
// a name that is complete; else the text after it is answer. All others change nothing. In tool mode the answer's
// first "助手：" is a tag too.
//
// Whitespace (space, \t, \r, \n) before a tag and at the end of the output belongs to the tag; after a tag it does too
// as long as the part (thought or answer) is empty. All other bytes come out once, in order.

#pragma once

#include <cstddef>
#include <string>
#include <vector>

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

// Cuts generated text into spans that cover every byte, in order and without gaps. What is not held in partial text keeps
// its kind whatever follows. generation_prompt is what the template has put in the model's mouth ("<think>\n\n</think>\n"
// of fast mode, or an opened thought); offsets count in text alone. tool_mode: calls are read and "助手：" is a tag;
// without it the JSON between <tool_calls> tags is answer.
std::vector<hunyuan_span> hunyuan_spans(const std::string & text, bool is_partial,
                                        const std::string & generation_prompt = "", bool tool_mode = true);
