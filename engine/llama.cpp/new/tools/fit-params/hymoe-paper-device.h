#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <string>

// A graphics card that is not there: it takes the operations that a CUDA device takes, asks for the memory that one
// asks for, and never allocates or computes. With it the engine says what a model would take of a machine that nobody
// has yet. Its memory is `n_bytes`, all of it free. The device lives until the process ends.
ggml_backend_dev_t hymoe_paper_device(const std::string & name, size_t n_bytes);
