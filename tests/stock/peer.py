"""llama.cpp's own converter, made ready to run: its source, a Python with torch, and a checkpoint that it can read.

`python tests/stock/peer.py CHECKPOINT FOLDER` makes FOLDER a view of CHECKPOINT for it and prints the command that
converts that, as JSON; the caller adds --outfile and --outtype, and runs it with ENVIRONMENT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from hymoe.engine import pin, source
from hymoe.engine.installed import engine_root

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).with_name("tokenization_hy.py")
PYTHON_VARIABLE = "HYMOE_STOCK_PYTHON"
CONVERTER = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def command(checkpoint: Path, folder: Path) -> list[str]:
    """Make `folder` a view of `checkpoint` and give the command that converts it, without its output options."""
    view(checkpoint, folder)
    return [str(python()), str(script()), str(folder)]


def convert(checkpoint: Path, folder: Path, out: Path, outtype: str) -> None:
    """Convert with llama.cpp's own converter; `folder` is a new folder for the view that it needs."""
    run = [*command(checkpoint, folder), "--outfile", str(out), "--outtype", outtype]
    environment = os.environ | ENVIRONMENT | {"HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]


def view(checkpoint: Path, folder: Path) -> None:
    """Link the checkpoint's files into `folder`, with a tokenizer class that the converter can load."""
    folder.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.name != "tokenizer_config.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / STANDIN.name).symlink_to(STANDIN)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "HYTokenizer", "auto_map": {"AutoTokenizer": [f"{STANDIN.stem}.HYTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def script() -> Path:
    """Unpack the converter from the pinned sdist where that has not been done, and give its main file."""
    home = engine_root().parent / "stock-converter" / pin.VERSION
    if not (home / "complete").is_file():
        with tarfile.open(source.fetch(engine_root() / "sdist"), "r:gz") as archive:
            for member in archive:
                inside = member.name.removeprefix(pin.VENDORED)
                if member.name.startswith(pin.VENDORED) and inside.startswith(CONVERTER):
                    archive.extract(member.replace(name=inside, deep=False), home, filter="data")
        (home / "complete").touch()
    return home / CONVERTER[0]


def python() -> Path:
    """Give a Python with torch and transformers: HYMOE_STOCK_PYTHON, else .venv-oracle, made where it is missing."""
    if given := os.environ.get(PYTHON_VARIABLE):
        return Path(given)
    venv = ROOT / ".venv-oracle"
    found = venv / "bin" / "python"
    if (
        not found.is_file()
        or subprocess.run([found, "-c", "import torch, transformers, tiktoken"], check=False).returncode
    ):
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip: list[str | Path] = [
            found,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--editable",
            ".[dev,oracle]",
        ]
        subprocess.run(pip, check=True, cwd=ROOT)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(command(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
