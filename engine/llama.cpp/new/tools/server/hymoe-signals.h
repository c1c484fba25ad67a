// SIGINT and SIGTERM. What ends the server takes mutexes, which a handler must not: it may have interrupted the very thread
// that holds one. The handler writes one byte to a pipe, and a thread of ours does the rest.

#pragma once

#include <cstdlib>
#include <functional>

#if defined(_WIN32)

// The system calls console handlers on a thread of their own.
class hymoe_signals {
  public:
    bool start(std::function<void(int)> & end) {
        handler() = &end;
        return true;
    }

    static void tell(int signal) { (*handler())(signal); }

    [[noreturn]] static void exit_now() { std::_Exit(1); }

  private:
    static std::function<void(int)> *& handler() {
        static std::function<void(int)> * end = nullptr;
        return end;
    }
};

#else

#include <cerrno>
#include <fcntl.h>
#include <thread>
#include <unistd.h>

class hymoe_signals {
  public:
    hymoe_signals()                                  = default;
    hymoe_signals(const hymoe_signals &)             = delete;
    hymoe_signals & operator=(const hymoe_signals &) = delete;

    // Joins the thread, so that nothing `end` refers to is used afterwards.
    ~hymoe_signals() {
        if (waiting.joinable()) {
            tell(0);
            waiting.join();
        }
    }

    // Call `end` on a thread of ours for every signal that is told. False where the system gives no pipe.
    bool start(std::function<void(int)> end) {
        int * const ends = pipe_ends();
        if (pipe(ends) != 0) {
            return false;
        }
        fcntl(ends[0], F_SETFD, FD_CLOEXEC);
        fcntl(ends[1], F_SETFD, FD_CLOEXEC);
        waiting = std::thread([end = std::move(end), from = ends[0]] {
            unsigned char signal = 0;
            for (;;) {
                const ssize_t n = read(from, &signal, 1);
                if (n == 1 && signal != 0) {
                    end(signal);
                } else if (n >= 0 || errno != EINTR) {
                    return;
                }
            }
        });
        return true;
    }

    // Async-signal-safe.
    static void tell(int signal) {
        const int           before = errno;
        const unsigned char byte   = static_cast<unsigned char>(signal);
        (void) !write(pipe_ends()[1], &byte, 1);
        errno = before;
    }

    // Async-signal-safe: no destructors, no flushing.
    [[noreturn]] static void exit_now() {
        static const char text[] = "Received second interrupt, terminating immediately.\n";
        (void) !write(STDERR_FILENO, text, sizeof(text) - 1);
        _exit(1);
    }

  private:
    // Stay open until the process ends: a signal may come at any time.
    static int * pipe_ends() {
        static int ends[2] = { -1, -1 };
        return ends;
    }

    std::thread waiting;
};

#endif
