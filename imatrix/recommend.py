"""A recipe for a budget: errors and sensitivities, measured or remembered, then the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Final, NamedTuple

from gguf import GGMLQuantizationType

from hymoe import console
from hymoe.errors import BudgetError, ModelFileError, UnsupportedError
from hymoe.imatrix import budget as budgets
from hymoe.imatrix import distortion, files, heldout, sensitivity
from hymoe.imatrix.allocate import Choice, Item, Option, least_bytes, solve_one, solve_two
from hymoe.imatrix.budget import Budget
from hymoe.imatrix.files import Imatrix
from hymoe.imatrix.model import require_family
from hymoe.imatrix.state import State
from hymoe.imatrix.weights import SOURCES, GgufWeights, Weights, layer_of_experts, matrices
from hymoe.sizes import padded, tensor_bytes

# What a recipe chooses from unless told otherwise. Below two bits an error is too large for its cost to be in
# proportion; of the types with blocks of 32, those that rows of other widths need.
MENU: Final = (
    *("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    *("Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"),
)
# A checkpoint folder as Weights; imported by name, since this room does not know checkpoints.
CHECKPOINTS: Final = "hymoe.convert.rows"
# Beyond this, a run for every tensor takes hours: the table of the miniature is taken instead.
MEASURED_BYTES: Final = 2 << 30
MEASURED_TOKENS: Final = 1536
N_CTX: Final = 512
# Prices of time to try, in units of the loss per second of the best choice without one.
PRICES: Final = (0.1, 0.25, 0.5, 1.0, 2.0)
AROUND: Final = (0.8, 0.9, 1.0, 1.1, 1.25)
STATE_VERSION: Final = 1
# A converted file carries its recipe's text and the names of what it was made with.
HEAD_ROOM: Final = 6 << 10


@dataclass(frozen=True)
class RecipeOptions:
    """What to make a recipe for: exactly one of size (bytes of the file), bits per weight, and fit (card, RAM bytes).

    measured: run the model for sensitivities (None: where it is small enough). weights_per_second: by type, what the
    CPU computes for experts in RAM (None: measured here; empty: does not count); min_speed: tokens per second of them.
    """

    model: Path
    imatrix: Path | None = None
    size: int | None = None
    bits: float | None = None
    fit: tuple[int, int] | None = None
    n_ctx: int = 32768
    kv_type: str | None = None
    menu: tuple[str, ...] = MENU
    text: tuple[Path, ...] = ()
    measured: bool | None = None
    n_threads: int = 1
    weights_per_second: Mapping[str, float] | None = field(default_factory=dict)
    min_speed: float | None = None


class Alternative(NamedTuple):
    """Another budget: bytes of the file, bits per weight, predicted loss."""

    n_bytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Recommendation:
    """A recipe: types by tensor, and what is predicted of it. budget: the memories', where two were asked for."""

    name: str
    types: Mapping[str, GGMLQuantizationType]
    loss: float
    n_bytes: int
    bits: float
    around: tuple[Alternative, ...]
    is_measured: bool
    imatrix: str | None
    budget: Budget | None = None
    n_card: int = 0
    n_layer: int = 0
    speed: float | None = None


@dataclass(frozen=True)
class _Problem:
    """Everything the optimizer needs, in bytes."""

    options: RecipeOptions
    weights: Weights
    items: tuple[Item, ...]
    fixed: int  # norms and routers

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.weights.tensors.values())

    def alternative(self, choice: Choice) -> Alternative:
        data = choice.n_bytes + self.fixed
        return Alternative(data + self.head_bytes, 8 * data / self.n_weights, choice.loss)

    @property
    def head_bytes(self) -> int:
        return self.weights.head_bytes + HEAD_ROOM


def recommend(options: RecipeOptions) -> Recommendation:
    """Make a recipe.

    Raises BudgetError where the budget cannot be met, saying the smallest that can; ModelFileError for a model or an
    imatrix that cannot be used; UnsupportedError for a menu that leaves a tensor without a type.
    """
    imatrix = files.read(options.imatrix) if options.imatrix else None
    with open_weights(options.model) as weights:
        distortion.importance_of(imatrix, weights.tensors)
        errors, costs, is_measured = evidence(options, weights, imatrix)
        problem = _problem(options, weights, errors, costs)
        choice, budget = _solved(problem)
        chosen = problem.alternative(choice)
        types = {item.name: option.qtype for item, option in zip(problem.items, choice.options, strict=True)}
        return Recommendation(
            name=options.model.name,
            types=types,
            loss=choice.loss,
            n_bytes=chosen.n_bytes,
            bits=chosen.bits,
            around=_around(problem, chosen, budget),
            is_measured=is_measured,
            imatrix=None if imatrix is None else imatrix.name,
            budget=budget,
            n_card=choice.n_card,
            n_layer=weights.hparams.get("block_count", 0),
            speed=_speed(problem, choice),
        )


@contextmanager
def open_weights(model: Path) -> Iterator[Weights]:
    """Open a GGUF in full precision or as Q8_0, or a checkpoint folder.

    Raises ModelFileError for a coarser GGUF, and for one of another architecture.
    """
    if model.is_dir():
        with import_module(CHECKPOINTS).open_rows(model) as rows:
            yield rows
        return
    with GgufWeights(model) as weights:
        require_family(model, weights.keys)
        for name in matrices(weights):
            if (found := weights.tensors[name].qtype.name) not in SOURCES:
                raise ModelFileError(
                    f"{model}: {name}: a model to measure", got=found, expected=f"one of {', '.join(SOURCES)}"
                )
        yield weights


# -- evidence ---------------------------------------------------------------------------------------------------------


def evidence(
    options: RecipeOptions, weights: Weights, imatrix: Imatrix | None
) -> tuple[distortion.Errors, sensitivity.Sensitivities, bool]:
    """Give errors and sensitivities by tensor, from the cache where they were measured before.

    And whether the sensitivities are measured, and not the table's.
    """
    names = matrices(weights)
    n_layer = weights.hparams["block_count"]
    measured = _is_measured(options, weights)
    if weights.has_values:
        digest = imatrix.sha256 if imatrix else None
        state = State(["errors", STATE_VERSION, weights.identity, digest, distortion.N_SAMPLE])
        errors = state.get(lambda: _measured_errors(options, weights, names, imatrix))
    else:
        errors = sensitivity.assumed_errors(names, weights.tensors, has_importance=imatrix is not None)
    if measured and isinstance(weights, GgufWeights):
        texts = heldout.calibration(options.text, weights.chat_template)
        # What an error costs is the model's own, whatever it was weighted with when it was measured.
        state = State(
            ["sensitivity by tokens", STATE_VERSION, weights.identity, sensitivity.PROBES, MEASURED_TOKENS, texts]
        )
        return errors, state.get(lambda: _measured_costs(options, weights, names, imatrix, texts)), True
    return errors, sensitivity.assumed(names, n_layer, sensitivity.shipped()["sensitivity"]), False


def _is_measured(options: RecipeOptions, weights: Weights) -> bool:
    can = isinstance(weights, GgufWeights)
    if options.measured and not can:
        raise UnsupportedError(
            "sensitivities", got="a checkpoint folder", fix="convert it to BF16 or Q8_0 and give that"
        )
    small = isinstance(weights, GgufWeights) and weights.n_bytes <= MEASURED_BYTES
    return small if options.measured is None else options.measured


def _measured_errors(
    options: RecipeOptions, weights: Weights, names: Sequence[str], imatrix: Imatrix | None
) -> distortion.Errors:
    types = [GGMLQuantizationType[name] for name in MENU]
    with console.progress("errors by type", len(names), unit="%") as tick:
        return distortion.measure(weights, names, types, imatrix, tick, n_threads=options.n_threads)


def _measured_costs(
    options: RecipeOptions, weights: GgufWeights, names: Sequence[str], imatrix: Imatrix | None, texts: Sequence[str]
) -> sensitivity.Sensitivities:
    from hymoe.engine.evaluator import Evaluator
    from hymoe.imatrix.divergence import Reference

    assert weights.gguf is not None
    with Evaluator(weights.gguf, n_ctx=N_CTX, n_threads=options.n_threads, repack=False) as model:
        ids = heldout.tokens(model, texts, MEASURED_TOKENS)
        with Reference(ids, model.n_vocab) as reference:
            total = reference.n_tokens * (1 + len(names))
            with console.progress("sensitivities", total, unit="%") as tick:
                for n in reference.record(model):
                    tick(n)
                return sensitivity.measure(model, weights, names, reference, imatrix=imatrix, tick=tick)


# -- the problem ------------------------------------------------------------------------------------------------------


def _problem(
    options: RecipeOptions, weights: Weights, errors: distortion.Errors, costs: sensitivity.Sensitivities
) -> _Problem:
    names = matrices(weights)
    about = (options, weights, _speeds(options, weights))
    items = tuple(_item(about, name, errors[name], costs[name]) for name in names)
    free = set(names)
    fixed = sum(padded(tensor_bytes(*tensor)) for name, tensor in weights.tensors.items() if name not in free)
    return _Problem(options, weights, items, fixed)


def _item(
    about: tuple[RecipeOptions, Weights, Mapping[str, float]], name: str, errors: Mapping[str, float], cost: float
) -> Item:
    options, weights, speeds = about
    tensor, layer = weights.tensors[name], layer_of_experts(name)
    share = 1.0
    if layer is not None:
        share = weights.hparams["expert_used_count"] / weights.hparams["expert_count"]
    found = []
    for type_name, error in errors.items():
        # Of a type that the speed table lacks nobody knows what it would cost in RAM.
        if type_name not in options.menu or (layer is not None and speeds and type_name not in speeds):
            continue
        qtype = GGMLQuantizationType[type_name]
        speed = speeds.get(type_name, inf)
        seconds = share * tensor.n_weights / speed if layer is not None else 0.0
        found.append(Option(qtype, padded(tensor_bytes(tensor.shape, qtype)), cost * error, seconds))
    if not found:
        raise UnsupportedError(
            f"{name}: rows of {tensor.shape[-1]}", got=f"no type of {', '.join(options.menu)} that they can have",
            fix="add Q8_0 to --menu",
        )  # fmt: skip
    return Item(name, _undominated(found), layer)


def _speeds(options: RecipeOptions, weights: Weights) -> Mapping[str, float]:
    """Give weights per second by type for experts in RAM; measured once per processor."""
    if options.fit is None or options.weights_per_second is not None:
        return options.weights_per_second or {}
    from hymoe.engine import type_speed
    from hymoe.engine.installed import host

    stacks = (tensor.shape for name, tensor in weights.tensors.items() if layer_of_experts(name) is not None)
    _, n_ff, n_embd = next(stacks)
    state = State(["speed", STATE_VERSION, host(), options.n_threads, n_ff, n_embd])
    found: dict[str, float] = state.get(lambda: type_speed.measure(MENU, n_embd, n_ff, options.n_threads))
    return found


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Leave out what is beaten in every respect."""

    def beats(a: Option, b: Option) -> bool:
        return a.n_bytes <= b.n_bytes and a.loss <= b.loss and a.seconds <= b.seconds and a[1:] != b[1:]

    return tuple(b for b in options if not any(beats(a, b) for a in options))


def _solved(problem: _Problem) -> tuple[Choice, Budget | None]:
    options = problem.options
    if options.fit is None:
        return _within(problem, _data_bytes(problem)), None
    wanted = (options.kv_type,) if options.kv_type else budgets.kv_types(problem.weights.hparams)
    for kv_type in wanted:
        budget = budgets.budget(options.fit, options.n_ctx, kv_type, problem.weights.hparams)
        if choice := _fitting(problem, budget):
            return choice, budget
    raise _shortage(problem, wanted[-1])


def _data_bytes(problem: _Problem) -> int:
    """Bytes for the weights that are chosen, of a file of the size asked for."""
    options = problem.options
    if options.size is not None:
        return options.size - problem.head_bytes - problem.fixed
    assert options.bits is not None
    return int(options.bits * problem.n_weights / 8) - problem.fixed


def _within(problem: _Problem, n_bytes: int) -> Choice:
    choice = solve_one(problem.items, n_bytes) if n_bytes > 0 else None
    if choice is None:
        least = least_bytes(problem.items) + problem.fixed
        if problem.options.size is not None:
            size = least + problem.head_bytes
            raise BudgetError(
                "--size", got=console.format_bytes(problem.options.size), expected=f"at least {size} bytes"
            )
        bits = 8 * least / problem.n_weights
        raise BudgetError("--bpw", got=problem.options.bits, expected=f"at least {bits + 0.0005:.3f}")
    return choice


def _fitting(problem: _Problem, budget: Budget) -> Choice | None:
    """Choose for two memories: the least loss × time of the experts in RAM; with a wanted speed the least loss.

    The product is the same bargain at every size: twice the time must at least halve the loss.
    """
    card, ram = budget.card - problem.fixed, budget.ram - _embedding(problem)
    if card <= 0 or ram <= 0:
        return None
    choice = solve_two(problem.items, card, ram)
    seconds = _seconds(problem, choice) if choice else 0.0
    if choice is None or not seconds:
        return choice
    if wanted := problem.options.min_speed:
        return choice if seconds <= 1 / wanted else _faster(problem, card, ram, 1 / wanted)
    rate = choice.loss / seconds
    dearer = (solve_two(problem.items, card, ram, price=rate * factor) for factor in PRICES)
    return min([choice, *filter(None, dearer)], key=lambda each: each.loss * _seconds(problem, each))


def _faster(problem: _Problem, card: int, ram: int, seconds: float) -> Choice:
    """Raise the price of time until it is met, then lower it as far as it stays so."""
    low, high, best, least = 0.0, 1.0, None, inf
    for _ in range(24):
        choice = solve_two(problem.items, card, ram, price=high if best is None else (low + high) / 2)
        needed = _seconds(problem, choice) if choice else inf
        met, least = needed <= seconds, min(least, needed)
        if best is None and not met:
            low, high = high, 10 * high
        elif met:
            high, best = (high if best is None else (low + high) / 2), choice
        else:
            low = (low + high) / 2
    if best is None:
        most = f"at most {1 / least:.3g} tokens per second, what the processor's fastest types give"
        raise BudgetError("--min-speed", got=problem.options.min_speed, expected=most)
    return best


def _embedding(problem: _Problem) -> int:
    """Bytes of RAM that the embeddings may take: they are read there, and tied ones lie on the card as well."""
    item = next(item for item in problem.items if item.name == "token_embd.weight")
    return max(option.n_bytes for option in item.options)


def _shortage(problem: _Problem, kv_type: str) -> BudgetError:
    """Say how much memory would do, and which context would."""
    options, hparams = problem.options, problem.weights.hparams
    assert options.fit is not None
    card, ram = options.fit
    step = 1_000_000_000
    needed = next((n for n in range(card, card + 512 * step, step) if _fits(problem, (n, ram), kv_type)), None)
    more = next((n for n in range(ram, ram + 2048 * step, step) if _fits(problem, (card, n), kv_type)), None)
    contexts = (n for n in (131072, 65536, 32768, 16384, 8192, 4096) if n < options.n_ctx)
    shorter = next((n for n in contexts if _fits(problem, options.fit, kv_type, n)), None)
    would = [
        *([f"--fit {needed / step:.0f}G+{ram / step:.0f}G"] if needed else []),
        *([f"--fit {card / step:.0f}G+{more / step:.0f}G"] if more else []),
        *([f"--ctx {shorter}"] if shorter else []),
    ]
    kv = console.format_bytes(budgets.kv_bytes(hparams, options.n_ctx, kv_type))
    return BudgetError(
        f"--fit {card / step:g}G+{ram / step:g}G --ctx {options.n_ctx}",
        got=f"too little memory, with {kv} of {kv_type} keys and values",
        expected=" or ".join(would) or "a larger machine",
    )


def _fits(problem: _Problem, fit: tuple[int, int], kv_type: str, n_ctx: int | None = None) -> bool:
    """Whether the smallest types fit: dense tensors on the card, and whole layers where there is room."""
    budget = budgets.budget(fit, n_ctx or problem.options.n_ctx, kv_type, problem.weights.hparams)
    card = budget.card - problem.fixed - least_bytes([item for item in problem.items if item.layer is None])
    ram = budget.ram - _embedding(problem)
    experts = sorted((item for item in problem.items if item.layer is not None), key=lambda item: item.layer or 0)
    sizes = [least_bytes(list(group)) for _, group in groupby(experts, key=lambda item: item.layer)]
    while sizes and sizes[0] <= card:
        card -= sizes.pop(0)
    return card >= 0 and sum(sizes) <= ram


def _seconds(problem: _Problem, choice: Choice) -> float:
    """Seconds per token of the experts in RAM."""
    layers = sorted({item.layer for item in problem.items if item.layer is not None})
    in_ram = set(layers[choice.n_card :])
    return sum(
        option.seconds for item, option in zip(problem.items, choice.options, strict=True) if item.layer in in_ram
    )


def _speed(problem: _Problem, choice: Choice) -> float | None:
    seconds = _seconds(problem, choice)
    return 1 / seconds if seconds else None


def _around(problem: _Problem, chosen: Alternative, budget: Budget | None) -> tuple[Alternative, ...]:
    """Solve for sizes around the chosen one."""
    found = []
    for factor in AROUND:
        if budget is not None:
            choice = _fitting(problem, budget._replace(ram=int(factor * budget.ram)))
        else:
            left = int(factor * (chosen.n_bytes - problem.head_bytes)) - problem.fixed
            choice = solve_one(problem.items, left) if left > 0 else None
        if choice is not None and problem.alternative(choice) not in found:
            found.append(problem.alternative(choice))
    return tuple(found)
