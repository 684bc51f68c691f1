"""Settings of the programs: nested dataclasses, which check what they are given. `train.parsing` reads them."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hadamax.errors import ConfigError

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class UsageError(ConfigError):
    """A command line or configuration file that does not parse; programs exit with code 2."""


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model.

    Attributes:
        base: Hugging Face directory or hub id.
        dtype: type of the base weights and of the activations; null keeps the checkpoint's.
        remat: what the backward pass recomputes: none; full: each layer, for least memory and about a third more time;
            dots: all but the matrix products.
        quantize: hold the projections in 8 or 4 bits (needs qwix: pip install 'hadamax[quant]'); adapters train on what
            is left of them, and an export writes that.
    """

    base: str
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["none", "full", "dots"] = "none"
    quantize: Literal["int8", "nf4"] | None = None


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation records, and how they become token rows.

    Attributes:
        train: JSON array or JSONL file of records: instruction/input/output, question/answer or chat messages.
        eval: file of held-out records; null splits eval_fraction off the training file.
        eval_fraction: share of the training records held out where eval is null; 0 turns evaluation off.
        max_length: tokens of a row; longer records are cut, and counted.
        packing: fill rows with several records each; attention stays inside a record.
        template: name of a prompt template (plain, alpaca, none) or a text with {instruction} and {input}.
        response_only: learn from the response's tokens only, not from the prompt's.
        limit: use only the first records of the training file.
        seed: of the held-out split and the order of the rows; null takes run.seed.
    """

    train: str
    eval: str | None = None
    eval_fraction: float = 0.02
    max_length: int = 512
    packing: bool = False
    template: str = "plain"
    response_only: bool = True
    limit: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained.

    Attributes:
        method: abba, hira, boha, lora, ...: a name of hadamax.METHODS; null trains no adapter.
        rank: rank, for the methods that have one (32 where it is null).
        options: the method's other arguments, such as {alpha: 16} or {blocks: 4}.
        targets: path patterns of the adapted kernels.
        exclude: path patterns to leave out.
        rules: full rules {pattern: {method: hira, rank: 8}} in place of method, rank, options and targets.
        train_base: path patterns of base parameters that train as well, such as scale or bias.
    """

    method: str | None = "abba"
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: list(LINEAR))
    exclude: list[str] = field(default_factory=list)
    rules: dict[str, dict[str, Any]] | None = None
    train_base: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule.

    Attributes:
        lr: peak learning rate of the adapters; null takes each method's default (train/optim.py). A list trains
            adapters with each of them at once, over one base.
        base_lr: peak learning rate of the trained base parameters; null takes the default.
        lr_ratio: multiplies the learning rate of the second factors, as LoRA+ does.
        optimizer: adamw, lion or sgd (with momentum); the default learning rates are AdamW's.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay of the trained base parameters; factors are never decayed, since some rest
            at 1 and all make an update that should not fade.
        schedule: shape of the learning rate after the warm-up; wsd (warm-up, stable, decay) is constant until the last
            steps, in which it falls linearly.
        warmup: share of the steps over which the learning rate rises to its peak.
        decay: share of the steps over which wsd falls.
        min_lr_ratio: share of the peak at which linear, cosine and wsd end.
        clip: largest global norm of the gradient; 0 turns clipping off.
        spike: a step is bad where its loss or its gradient norm (before clipping) is above so many times the running
            mean, as it is where a value is not finite; 0 turns this off. Try 3 to 10.
        max_skips: bad steps in a row that are left out, and counted, with parameters and optimiser as they were (the
            schedule too) and the data passed over; the next one ends the run. 0 stops at the first.
    """

    lr: float | list[float] | None = None
    base_lr: float | None = None
    lr_ratio: float = 1.0
    optimizer: Literal["adamw", "lion", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.03
    decay: float = 0.2
    min_lr_ratio: float = 0.0
    clip: float = 1.0
    spike: float = 0.0
    max_skips: int = 0


@dataclass(frozen=True)
class RunConfig:
    """Length, logging and checkpoints of a run.

    Attributes:
        out: the run's directory.
        steps: optimiser steps; null takes epochs.
        epochs: passes over the training rows where steps is null.
        batch_size: rows of an optimiser step.
        grad_accum: micro-batches a step is computed in; divides batch_size.
        eval_every: steps between evaluations; 0 evaluates only before the first step and after the last.
        eval_rows: evaluate on at most so many rows; null takes all.
        save_every: steps between checkpoints; 0 saves only after the last.
        keep: checkpoints kept, the newest; the best is kept as well: of those saved at an evaluation, the one of the
            lowest held-out loss.
        log_every: steps between fetches of the loss from the device.
        seed: seeds the adapters and, where data.seed is null, the held-out split and the order of the rows.
        seeds: train adapters of so many seeds at once, from seed on, over one base and on the same rows in the same
            order; each is what a run by itself is with its run.seed and this data.seed.
        resume: continue from the newest checkpoint in out; false refuses a directory that has one.
        patience: stop after so many evaluations without a lower loss; null runs all steps.
        profile: first and last step that jax.profiler traces into out/profile; null traces none.
        compilation_cache: directory that keeps compiled programs for later runs; null leaves it to JAX's environment
            variables.
    """

    out: str = "runs/finetune"
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    grad_accum: int = 1
    eval_every: int = 100
    eval_rows: int | None = 512
    save_every: int = 200
    keep: int = 2
    log_every: int = 10
    seed: int = 0
    seeds: int = 1
    resume: bool = True
    patience: int | None = None
    profile: tuple[int, int] | None = None
    compilation_cache: str | None = None


@dataclass(frozen=True)
class MeshConfig:
    """The devices, and what is split over them.

    Attributes:
        data: groups of devices that hold whole copies of what fsdp and tensor split; they share out a batch's rows.
        fsdp: devices that split the parameters and the rows. One of the three may be -1: for the rest of the devices.
        tensor: devices that split the widths of layers and compute the same rows; keep them in one machine.
        devices: use only the first so many devices; null takes all, those of other processes too.
        distributed: auto joins other processes where the environment tells of any (train/LAUNCHING.md); never does not.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    devices: int | None = None
    distributed: Literal["auto", "never"] = "auto"


@dataclass(frozen=True)
class Config:
    """A fine-tuning run.

    Attributes:
        model: the frozen base model.
        data: records, and how they become token rows.
        adapter: what is trained.
        optim: optimiser and schedule.
        run: length, logging and checkpoints.
        mesh: the devices, and what is split over them.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name in ("data.max_length", "run.batch_size", "run.grad_accum", "run.log_every", "run.keep", "run.seeds"):
            _require(self, name, lambda v: v >= 1, "at least 1")
        for name in ("run.eval_every", "run.save_every", "optim.clip", "optim.weight_decay", "optim.max_skips"):
            _require(self, name, lambda v: v >= 0, "0 or more")
        for name in ("data.eval_fraction", "optim.warmup", "optim.min_lr_ratio"):
            _require(self, name, lambda v: 0 <= v < 1, "0 or more and below 1")
        for name in ("run.steps", "run.eval_rows", "data.limit", "run.patience"):
            _require(self, name, lambda v: v is None or v >= 1, "at least 1")
        _require(self, "optim.base_lr", lambda v: v is None or 0 <= v < math.inf, "0 or more")
        _require(self, "optim.lr_ratio", lambda v: 0 < v < math.inf, "above 0")
        _require(self, "optim.spike", lambda v: v == 0 or v > 1, "0 or above 1")
        if self.optim.schedule == "wsd":
            _require(
                self, "optim.decay", lambda v: 0 < v <= 1 - self.optim.warmup, "above 0 and within 1 - optim.warmup"
            )
        _require(self, "run.profile", lambda v: v is None or 1 <= v[0] <= v[1], "a first and a last step, from 1 on")
        if self.run.profile is not None and self.run.steps is not None and self.run.profile[0] > self.run.steps:
            raise UsageError(
                f"run.profile: begins at step {self.run.profile[0]}, the run ends at step {self.run.steps}"
            )
        if self.run.patience is not None and not (self.run.eval_every and (self.data.eval or self.data.eval_fraction)):
            raise UsageError("run.patience: nothing to wait for; give run.eval_every, and data.eval or .eval_fraction")
        if self.optim.schedule == "constant" and self.optim.min_lr_ratio:
            raise UsageError("optim.min_lr_ratio: a constant schedule does not fall; set optim.schedule")
        _require(self, "run.epochs", lambda v: v > 0, "above 0")
        if self.run.batch_size % self.run.grad_accum:
            sizes = f"{self.run.grad_accum} does not divide run.batch_size {self.run.batch_size}"
            raise UsageError(f"run.grad_accum {sizes}")
        if self.adapter.rules is not None and (self.adapter.rank is not None or self.adapter.options):
            raise UsageError(
                "adapter.rules: each rule has its own rank and options; leave out adapter.rank and .options"
            )
        if self.optim.optimizer != "adamw" and self.optim.lr is None:
            raise UsageError(f"optim.lr: give one for {self.optim.optimizer}; the defaults are AdamW's")
        rates = self.optim.lr if isinstance(self.optim.lr, list) else [self.optim.lr]
        if not rates or len(set(rates)) < len(rates):
            raise UsageError(f"optim.lr: {rates} should be learning rates, each of them once")
        if wrong := [rate for rate in rates if rate is not None and not 0 < rate < math.inf]:
            raise UsageError(f"optim.lr: {wrong[0]} is not above 0")
        if len(rates) > 1 and self.adapter.method is None and self.adapter.rules is None:
            raise UsageError("optim.lr: it is for adapters, and adapter.method is null; give one, and optim.base_lr")
        if len(rates) * self.run.seeds > 1 and self.run.patience is not None:
            raise UsageError(
                "run.patience: adapters that train at once (run.seeds, optim.lr) end together; leave it out, and choose"
                " by the held-out losses of each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form; `from_dict` reads it back."""
        return dataclasses.asdict(self)


def _require(config: Config, name: str, holds: Any, wanted: str) -> None:
    section, key = name.split(".")
    value = getattr(getattr(config, section), key)
    if not holds(value):
        raise UsageError(f"{name}: {value} is not {wanted}")


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss and exact-match accuracy of a run or of a plain model.

    Attributes:
        data: JSON array or JSONL file of records.
        run: directory of a run; its base, adapters and prompt template are used.
        model: Hugging Face directory or hub id of a plain model, in place of run.
        step: checkpoint of the run: last, the newest; best, the one of the lowest held-out loss; or a step.
        member: which adapter, from 0 on, of a run that trained several at once; null takes the one of the lowest
            held-out loss.
        base: where the run's base is now, if it has moved.
        dtype: type of the base weights and of the activations; null keeps the run's or the checkpoint's.
        template: prompt template; null takes the run's, or plain.
        answer: what counts as the answer: exact, the whole text; last_number, its last number, within 0.001.
        max_length: tokens of a row for the loss; null takes the run's, or 512.
        max_new_tokens: tokens generated for an answer at most; 0 measures the loss only.
        batch_size: records of a batch.
        limit: use only the first records.
        merge: merge the adapters first, rather than applying them inside each layer.
        out: JSONL file for the answers; null writes none.
        mesh: the devices, and what is split over them.
    """

    data: str
    run: str | None = None
    model: str | None = None
    step: Literal["last", "best"] | int = "last"
    member: int | None = None
    base: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    template: str | None = None
    answer: Literal["exact", "last_number"] = "exact"
    max_length: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 32
    limit: int | None = None
    merge: bool = False
    out: str | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise UsageError("give either --run, a run's directory, or --model, a Hugging Face directory")
        if self.run is None and self.step != "last":
            raise UsageError("--step chooses a checkpoint of --run")
        if self.run is None and self.member is not None:
            raise UsageError("--member chooses an adapter of --run")
        if self.batch_size < 1 or self.max_new_tokens < 0 or (self.limit or 1) < 1 or (self.max_length or 1) < 1:
            raise UsageError("batch_size, limit and max_length should be at least 1, max_new_tokens at least 0")


@dataclass(frozen=True)
class ExportConfig:
    """A run's merged model, or its adapters alone, as a directory.

    Attributes:
        run: directory of the run.
        out: directory to write, which must not exist or be empty.
        merged: write the merged model, a Hugging Face directory; this is done where adapter is null, too.
        adapter: write the adapters alone: peft, for Hugging Face PEFT; native, hadamax's own format for every method.
        as_: method to convert the adapters to (--as on the command line, as_ in a file). ABBA to loha or lora, LoHa to
            lora, BoHA to hira are exact; any method that leaves biases alone goes to lora with rank or energy.
        rank: largest rank of --as lora; its error is printed.
        energy: share of each update's squared norm that --as lora keeps, in place of rank.
        dtype: type of the merged model's weights; null keeps the base's.
        verify: read the directory back and print the largest difference of logits from the run's.
        step: checkpoint of the run: last, the newest; best, the one of the lowest held-out loss; or a step.
        member: which adapter, from 0 on, of a run that trained several at once; null takes the one of the lowest
            held-out loss.
        base: where the run's base is now, if it has moved.
        mesh: the devices, and what is split over them.
    """

    run: str
    out: str
    merged: bool = False
    adapter: Literal["peft", "native"] | None = None
    as_: Literal["lora", "loha", "hira", "boha"] | None = None
    rank: int | None = None
    energy: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    verify: bool = False
    step: Literal["last", "best"] | int = "last"
    member: int | None = None
    base: str | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.merged and self.adapter is not None:
            raise UsageError("give either --merged or --adapter, one for each directory")
        if self.as_ is not None and self.adapter is None:
            raise UsageError("--as converts adapters: give --adapter peft or --adapter native with it")
        if (self.rank is not None or self.energy is not None) and self.as_ != "lora":
            raise UsageError("--rank and --energy are for --as lora")
        if self.rank is not None and self.energy is not None:
            raise UsageError("give --rank or --energy, not both")
        if self.dtype is not None and self.adapter is not None:
            raise UsageError("--dtype is for the merged model; adapters are written in float32")
