"""The source the engine is built from: one sdist, pinned by version and content."""

from __future__ import annotations

from typing import Final

PACKAGE: Final = "llama-cpp-python"
VERSION: Final = "0.3.36"
SHA256: Final = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST: Final = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_BYTES: Final = 76_589_250

# What the sdist carries under `vendor/llama.cpp`.
LLAMA_CPP_VERSION: Final = "0.5.0-dev"
LLAMA_CPP_COMMIT: Final = "0c1e570"
VENDORED: Final = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
