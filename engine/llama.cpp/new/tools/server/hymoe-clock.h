// The time that a chat template prints, which stays what it was when the conversation began.
//
// HunYuan's tool prompt prints the time to the second near its head. With a clock that goes on, no two turns would have
// a prefix in common, and every turn would evaluate its whole prompt again.

#pragma once

#include "server-common.h"

#include <chrono>

// The time at which the conversation with this head (tools, and the messages up to the first of the user) began. The
// last 1024 conversations are remembered. An opening that is asked again is a new conversation after an hour: before,
// it is a retry, which must not lose its cached prompt.
std::chrono::system_clock::time_point hymoe_clock(const json & messages, const json & tools);
