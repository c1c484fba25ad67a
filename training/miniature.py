"""Train the miniature: `python training/miniature.py train --out DIR`, then `… export --out DIR`.

Everything that a run needs to go on is in DIR: vocabulary, packed text, the state after the last save, and log.jsonl,
one line per report. The same command goes on where it stopped. README.md beside this file says what to expect.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from math import cos, pi
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# A thread that spins while it waits takes the core from the one it waits for, as soon as cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import text
import typer

from hymoe import console
from hymoe.errors import OutputError

if TYPE_CHECKING:
    import torch
    from model import Batch, Model, ModelConfig


@dataclass(frozen=True)
class Recipe:
    """How it is trained; with the seed and the text this decides the result. One step sees n_row · 512 tokens."""

    seed: int = 1
    n_step: int = 1700
    n_row: int = 4
    n_warmup: int = 150
    peak_rate: float = 2e-3
    last_rate: float = 1e-4
    weight_decay: float = 0.1
    balance: float = 0.01
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Give the learning rate of a step: up in a line, down on a cosine."""
        if step < self.n_warmup:
            return self.peak_rate * (step + 1) / self.n_warmup
        done = (step - self.n_warmup) / max(1, self.n_step - self.n_warmup)
        return self.last_rate + (self.peak_rate - self.last_rate) * (1 + cos(pi * done)) / 2


REPORT_EVERY, VALIDATE_EVERY = 10, 200  # steps
SAVE_EVERY = 300.0  # seconds


def batch(rows: text.Rows, first: int, count: int) -> tuple[Batch, torch.Tensor]:
    """Give rows [first, first + count) as input and the token that follows each position (PADDING where none does)."""
    import torch
    from model import Batch

    ids = torch.from_numpy(rows.ids[first : first + count].astype(np.int64))
    document = torch.from_numpy(rows.document[first : first + count].astype(np.int64))
    position = torch.from_numpy(text.positions(rows.document[first : first + count]))
    known = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] != text.PADDING)
    target = ids[:, 1:].masked_fill(~known, text.PADDING)
    return Batch(ids[:, :-1], document[:, :-1], position[:, :-1]), target


def loss_of(model: Model, inputs: Batch, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the mean loss in nats per token, the balance loss, and each expert's pairs [n_layer, E]."""
    import torch.nn.functional as F  # noqa: N812

    output = model(inputs)
    loss = F.cross_entropy(output.logits.flatten(0, 1), target.flatten(), ignore_index=text.PADDING)
    return loss, output.balance, output.usage


def validate(model: Model, rows: text.Rows, count: int = 4) -> dict[str, float]:
    """Give the loss on held-out rows, and the least and greatest share of an expert (1 is an equal share)."""
    import torch

    total, n_target, usage = 0.0, 0, torch.zeros(())
    with torch.no_grad():
        for first in range(0, len(rows.ids), count):
            inputs, target = batch(rows, first, count)
            loss, _, counts = loss_of(model, inputs, target)
            n = int((target != text.PADDING).sum())
            total, n_target, usage = total + float(loss) * n, n_target + n, usage + counts
    share = usage / usage.mean(dim=-1, keepdim=True)
    return {"validation": total / n_target, "least_used": float(share.min()), "most_used": float(share.max())}


def check_recipe(out: Path, recipe: Recipe) -> None:
    """Note in the folder what the run was begun as. Raises OutputError where it was begun as something else."""
    path, content = out / "recipe.json", {**asdict(recipe), "text": text.fingerprint(recipe.seed)}
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != content:
        differing = ", ".join(name for name in content if found.get(name) != content[name])
        raise OutputError(f"{out} holds a run with another {differing}", fix="choose another --out")
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Run:
    """A training run in a folder: it can be stopped at any step and goes on from the last save."""

    def __init__(self, out: Path, recipe: Recipe, config: ModelConfig, rows: text.Rows, held_out: text.Rows) -> None:
        import torch
        from model import Model

        self.out, self.recipe, self.rows, self.held_out = out, recipe, rows, held_out
        self.model = Model(config).start(recipe.seed)
        decayed = [weight for weight in self.model.parameters() if weight.dim() > 1]
        others = [weight for weight in self.model.parameters() if weight.dim() == 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.stopping = False
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def advance(self) -> dict[str, float]:
        """Take one step and say how it went."""
        import torch

        rate = self.recipe.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, target = batch(self.rows, self.step * self.recipe.n_row, self.recipe.n_row)
        loss, balance, _ = loss_of(self.model, inputs, target)
        (loss + self.recipe.balance * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {"loss": loss.item(), "balance": balance.item(), "gradient": norm.item(), "rate": rate}

    def save(self) -> None:
        """Keep the state; the file appears whole or not at all."""
        import torch

        part = self.out / "state.pt.part"
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}, part
        )
        part.replace(self.out / "state.pt")

    def log(self, **values: Any) -> None:
        """Add a line to log.jsonl and show it."""
        line = json.dumps({"step": self.step, **values})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        console.status(line)

    def train(self, until: int | None = None) -> None:
        """Go on to step `until` (None: the end), saving, validating and reporting on the way."""
        last = min(until or self.recipe.n_step, self.recipe.n_step)
        begun = saved = time.monotonic()
        first, losses = self.step, []
        while self.step < last and not self.stopping:
            values = self.advance()
            losses.append(values["loss"])
            if self.step % REPORT_EVERY == 0:
                seconds = (time.monotonic() - begun) / (self.step - first)
                values["loss"] = sum(losses) / len(losses)
                left = (self.recipe.n_step - self.step) * seconds / 3600
                self.log(**values, seconds_per_step=round(seconds, 3), hours_left=round(left, 2))
                losses = []
            if self.step % VALIDATE_EVERY == 0 or self.step == self.recipe.n_step:
                self.log(**validate(self.model, self.held_out))
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()

    def stop(self, *_: object) -> None:
        """End after the step in progress."""
        self.stopping = True


app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the run")]


@app.command()
def train(
    out: Out,
    steps: Annotated[int, typer.Option(help="steps in all")] = Recipe.n_step,
    seed: Annotated[int, typer.Option(help="of text, order and first weights")] = Recipe.seed,
    until: Annotated[
        int | None, typer.Option(metavar="STEP", help="stop there; the schedule stays that of --steps")
    ] = None,
    threads: Annotated[int, typer.Option(help="threads to compute with")] = 2,
) -> None:
    """Train, or go on from the last save in the folder."""
    import torch
    from model import ModelConfig

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=seed, n_step=steps)
    check_recipe(out, recipe)
    rows, held_out = text.prepare(out, out / "fetched", seed, recipe.n_step * recipe.n_row)
    run = Run(out, recipe, ModelConfig(text.N_VOCAB), rows, held_out)
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)
    run.train(until)


@app.command()
def export(out: Out) -> None:
    """Write out/Hunyuan-Miniature (BF16) and out/Hunyuan-Miniature-FP8 from the last save, and what FP8 costs."""
    import export as files

    for line in files.write(out):
        console.status(line)


if __name__ == "__main__":
    raise SystemExit(console.run(app, None, "miniature.py"))
