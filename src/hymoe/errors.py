"""Every error a user can cause.

HyError                 one clear line: what, got, expected, what to do
├── CheckpointError     the model folder: missing files, tensors, keys, bad headers
├── UnsupportedError    a well-formed input that asks for something not implemented
├── SourceError         the input cannot be read just now: the disk or the network fails
│   └── HubError        the hub: unreachable, no access, not found, damaged on the way
├── OutputError         the output file: exists, disk too small, cannot be written
├── ModelFileError      a GGUF that is not one, or not of this family
├── PlacementError      the model does not fit this machine as asked
├── EngineError         the engine: download, patches, compiler, build
├── BudgetError         no choice of types fits the bytes that a recipe may have
└── ServerError         the server process: port taken, died, not answering

A command prints `error: <message>` and exits with 1; bad usage exits with 2; anything that is
not a HyError is a bug and keeps its traceback.
"""

from __future__ import annotations


class HyError(Exception):
    """Base of all errors that are the user's to mend.

    The message names the thing (`what`), the value found (`got`), what would do (`expected`) and
    the next step (`fix`); the parts given are joined into one line.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        line = ": ".join([parts[0], ", ".join(parts[1:])]) if len(parts) > 1 else what
        if fix:
            line = f"{line}; {fix}"
        super().__init__(" ".join(line.split()))


class CheckpointError(HyError):
    """The checkpoint folder is not what it should be."""


class UnsupportedError(HyError):
    """The input is well formed and asks for something that is not implemented."""


class SourceError(HyError):
    """The input cannot be read just now; what was done so far is worth keeping."""


class HubError(SourceError):
    """The hub cannot be reached, or does not give what was asked for."""


class OutputError(HyError):
    """The output cannot be written as asked."""


class ModelFileError(HyError):
    """A model file is not a GGUF, or not one of this family."""


class PlacementError(HyError):
    """The model does not fit the machine as asked, or something is asked that no plan can give."""


class EngineError(HyError):
    """The engine cannot be fetched, patched, built or loaded."""


class BudgetError(HyError):
    """No choice of types fits the bytes that a recipe may have."""


class ServerError(HyError):
    """The server process did not start, or went away."""
