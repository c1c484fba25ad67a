// The orderly end: requests that run are answered, new ones are refused.

#pragma once

#include <atomic>
#include <chrono>
#include <thread>

// Part of every response, which lives until its last byte is handed to the connection: how many of them there are.
class hymoe_running {
  public:
    hymoe_running() { ++count(); }

    ~hymoe_running() { --count(); }

    hymoe_running(const hymoe_running &)             = delete;
    hymoe_running & operator=(const hymoe_running &) = delete;

    static std::atomic<int> & count() {
        static std::atomic<int> n{ 0 };
        return n;
    }
};

inline std::atomic<bool> & hymoe_draining() {
    static std::atomic<bool> value{ false };
    return value;
}

// Returns when the last response is out. How long that may take is for whoever sent the signal: a second one ends the process.
inline void hymoe_drain() {
    hymoe_draining().store(true);
    while (hymoe_running::count().load() > 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
}
