// Token probabilities in the shapes that clients read.

#pragma once

#include "server-common.h"

#include <deque>
#include <string>
#include <vector>

struct completion_token_output;

// Add OpenAI's legacy fields (tokens, token_logprobs, top_logprobs, text_offset) to the logprobs of /v1/completions,
// which hold a list `content`. text_offset: how many characters of text come before the first of them.
void hymoe_legacy_logprobs(json & logprobs, size_t text_offset);

// Each generated token with its own text, as far as the answer goes: its first n_bytes. A token that ends in the middle
// of a character has the text up to there; the one that completes it has the character.
std::vector<completion_token_output> hymoe_own_text(const std::vector<completion_token_output> & tokens, size_t n_bytes);

// Unicode characters in `text`.
size_t hymoe_characters(const std::string & text);

// The logprobs of a chat's answer. A token's text may be thought, answer or a tag, which is known only later: until then
// the token waits. Tokens of tags and of calls are left out, so that the tokens of `content` joined are what was generated
// of the message's content, and those of `reasoning_content` of its thought (what the client gave of a message to be
// continued has no tokens, nor has the newline that the parser puts between two ends that would make up a tag); with reasoning_format none the thought is among the content.
class hymoe_chat_logprobs {
public:
    // The next generated token.
    void add(const completion_token_output & token, bool post_sampling);

    // The logprobs, {"content": [..], "reasoning_content": [..]}, of the tokens whose place in `text`, all that was
    // generated so far, has become certain since the last call; null where there are none.
    json take(const std::string & text, bool is_partial, const common_chat_parser_params & params);

private:
    struct token {
        std::string piece;
        json        entry;
    };

    void give(json & list, std::string & open, json entry, const std::string & text, const char * kind);

    std::deque<token> waiting;
    size_t            n_past = 0;   // bytes of text before the first that waits
    std::string       open_thought; // the beginning of a character
    std::string       open_answer;
};
