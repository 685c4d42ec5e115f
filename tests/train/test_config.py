"""FinetuneConfig: the flag set is frozen, flags win over the file, every mistake is one line that names its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smedjan.errors import ConfigError
from smedjan.train.config import (
    FinetuneConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
    flags,
)

NEEDED: dict[str, object] = {"model": "m", "data": "d.jsonl", "out": "o"}

FLAGS = """model data eval-data out method resume dry-run seed backend dtype
train.steps train.epochs train.batch-size train.grad-accum train.max-length train.packing train.loss-on train.too-long
train.broken
train.save-every train.keep train.eval-every train.sample-every train.sample-prompts train.track
train.attention train.fp8 train.int8-forward train.memory train.freeze train.only
train.z-loss train.label-smoothing train.neftune train.new-tokens
optim.name optim.lr optim.lr-pattern optim.weight-decay optim.master optim.clip optim.schedule optim.warmup
optim.max-skipped optim.momentum optim.muon-adjust optim.adamw-lr optim.rho optim.hessian-every
train.ema train.patience train.min-delta optim.state optim.rounding optim.cycles optim.beta1 optim.beta2 optim.eps
lora.rank lora.alpha lora.dropout lora.targets lora.last-layers
lora.modules-to-save
lora.rslora lora.rank-pattern lora.alpha-pattern lora.init lora.dora lora.bits"""


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**({"model": "m", "data": Path("d.jsonl"), "out": Path("o")} | changes))


def from_flags(**dotted: object) -> FinetuneConfig:
    return FinetuneConfig.from_toml(None, NEEDED | {key.replace("__", "."): value for key, value in dotted.items()})


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\ndata = "d.jsonl"\nout = "o"\n' + text, encoding="utf-8")
    return path


def test_the_flag_set_is_frozen() -> None:
    """INTERFACE.md: names are fixed; add freely, change only with a deprecation."""
    assert set(flags()) == set(FLAGS.split())
    assert all(flag.help for flag in flags().values())
    assert [name for name, flag in flags().items() if flag.required] == ["model", "data"]


def test_defaults() -> None:
    made = from_flags()
    assert made == config()
    assert (made.method, made.train.epochs, made.train.steps, made.seed) == ("lora", 1.0, None, 0)
    assert (made.optim.lr, made.learning_rate) == (5e-4, 5e-4)
    assert from_flags(method="full").learning_rate == 5e-5
    assert made.lora.targets is None


def test_every_key_in_a_file_in_both_spellings(tmp_path: Path) -> None:
    text = """
        eval-data = "e.jsonl"
        method = "full"
        dry_run = true
        seed = 3
        backend = "torch_reference"
        dtype = "bfloat16"
        train.steps = 7
        train.batch-size = 2
        [optim]
        lr = "1e-5"
        weight_decay = 1
        warmup = 10
        [lora]
        rank = 4
        targets = ["q_proj", "v_proj"]
    """
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\ndata = "d.jsonl"\n' + text)
    assert FinetuneConfig.from_toml(path) == FinetuneConfig(
        model="m",
        data=Path("d.jsonl"),
        eval_data=Path("e.jsonl"),
        method="full",
        dry_run=True,
        seed=3,
        backend="torch_reference",
        dtype="bfloat16",
        train=TrainConfig(steps=7, batch_size=2),
        optim=OptimConfig(lr=1e-5, weight_decay=1.0, warmup=10.0),
        lora=LoraConfig(rank=4, targets=("q_proj", "v_proj")),
    )


def test_flags_win_and_absent_ones_do_not(tmp_path: Path) -> None:
    path = toml(tmp_path, "seed = 1\n[optim]\nlr = 1e-3\nclip = 2\n")
    made = FinetuneConfig.from_toml(
        path, {"optim.lr": "2e-4", "optim.clip": None, "lora.dropout": ".1", "out": Path("x")}
    )
    assert (made.seed, made.learning_rate, made.optim.clip, made.lora.dropout) == (1, 2e-4, 2.0, 0.1)
    assert made.out == Path("x")


def test_a_flag_replaces_its_alternative_in_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "[train]\nepochs = 2\n")
    assert FinetuneConfig.from_toml(path, {"train.steps": "5"}).train == TrainConfig(steps=5)
    path = toml(tmp_path, "[train]\nsteps = 5\n")
    assert FinetuneConfig.from_toml(path, {"train.epochs": 2}).train == TrainConfig(epochs=2)


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("optim.lr", "1e-5", 1e-5),
        ("optim.lr", 1, 1.0),
        ("train.steps", "1e3", 1000),
        ("train.steps", 10.0, 10),
        ("seed", "9007199254740993", 9007199254740993),
        ("train.packing", "true", True),
        ("train.packing", "False", False),
        ("lora.targets", "q_proj, v_proj", ("q_proj", "v_proj")),
        ("lora.targets", ["q_proj"], ("q_proj",)),
        ("optim.warmup", "0.1", 0.1),
        ("eval_data", "e.csv", Path("e.csv")),
        ("model", Path("a/b"), "a/b"),
    ],
)
def test_values_as_typed(key: str, typed: object, value: object) -> None:
    made = FinetuneConfig.from_toml(None, NEEDED | {key: typed})
    section, _, name = key.rpartition(".")
    got = getattr(getattr(made, section) if section else made, name)
    assert (got, type(got)) == (value, type(value))


BAD = [
    ("lora.rank", 0, "0 is out of range", "give a value >= 1"),
    ("lora.rank", 1.5, "1.5 is not a whole number", "give a whole number"),
    ("lora.rank", "many", "'many' is not a number", "give a number"),
    ("lora.rank", True, "True is not a number", "give a number"),
    ("lora.alpha", 0, "0.0 is out of range", "give a value > 0"),
    ("lora.dropout", 1, "1.0 is out of range", "give a value >= 0 and < 1"),
    ("lora.dropout", "-0.1", "-0.1 is out of range", "give a value >= 0 and < 1"),
    ("lora.targets", "", "'' is not a list of names", "give a list of names"),
    ("lora.targets", [], "[] is not a list of names", "give a list of names"),
    ("lora.targets", ["q_proj", 3], "is not a list of names", "give a list of names"),
    ("lora.targets", "q_proj,q_proj", "a name is there twice", "keep one"),
    ("optim.lr", 0, "0.0 is out of range", "give a value > 0"),
    ("optim.lr", "nan", "'nan' is not a finite number", "give a finite number"),
    ("optim.lr", "1e999", "is not a finite number", "give a finite number"),
    ("optim.lr", 10**400, "is not a number", "give a number"),
    ("optim.lr", [1], "[1] is not a number", "give a number"),
    ("optim.beta2", 1.0, "1.0 is out of range", "give a value >= 0 and < 1"),
    ("optim.clip", -1, "-1.0 is out of range", "give a value >= 0"),
    ("optim.warmup", 2.5, "2.5 is neither a share below 1 nor a whole number", "give --optim.warmup 2"),
    (
        "optim.schedule",
        "cosin",
        "'cosin' is not one of constant, linear, cosine, cosine_with_restarts, inverse_sqrt, wsd",
        "did you mean cosine?",
    ),
    ("optim.lr_pattern", "lora_B=0", "0.0 is out of range", "give a value > 0"),
    ("optim.cycles", 2, "2 cycles of the schedule cosine", "give --optim.schedule cosine_with_restarts"),
    ("lora.rank_pattern", "q_proj", "'q_proj' is not NAME=NUMBER", "give such as q_proj=8"),
    ("lora.rank_pattern", "q_proj=0", "0 is out of range", "give a value >= 1"),
    ("lora.rank_pattern", "q_proj=2.5", "'2.5' is not a whole number", "give a whole number"),
    ("lora.rank_pattern", "q_proj=2,q_proj=3", "q_proj is there twice", "keep one"),
    ("lora.alpha_pattern", ["q_proj=x"], "'x' is not a number", "give a number"),
    ("lora.bits", 3, "3 is neither 4 nor 8", "give 4 or 8"),
    ("lora.bits", 8, "8 bits with the method lora", "give --method qlora, or leave it out"),
    ("lora.init", "pisa", "'pisa' is no start", "give random, pissa or pissa_niter_4"),
    ("lora.init", "pissa_niter_", "'pissa_niter_' is no start", "give random, pissa or pissa_niter_4"),
    ("optim.name", "sgd", "'sgd' is not one of adamw", "give one of them"),
    ("train.steps", 0, "0 is out of range", "give a value >= 1"),
    ("train.steps", "9" * 5000, "is not a finite number", "give a finite number"),
    ("train.epochs", 0, "0.0 is out of range", "give a value > 0"),
    ("train.max_length", 1, "1 is out of range", "give a value >= 2"),
    ("train.packing", "yes", "'yes' is not true or false", "give true or false"),
    ("train.packing", 1, "1 is not true or false", "give true or false"),
    ("train.loss_on", "all tokens", "is not one of completion, last, all", "give one of them"),
    ("train.too_long", "trunc", "'trunc' is not one of", "did you mean truncate?"),
    ("method", "dora", "'dora' is not one of full, lora, qlora", "did you mean lora?"),
    ("dtype", "float16", "'float16' is not one of float32, bfloat16", "did you mean bfloat16?"),
    ("backend", "cuda", "'cuda' is not one of auto", "give one of them"),
    ("seed", -1, "-1 is out of range", "give a value >= 0 and < 9.22337e+18"),
    ("model", "", "'' is not a string that is not empty", "give a string"),
    ("data", 3, "3 is not a string", "give a string"),
]


@pytest.mark.parametrize(("key", "value", "message", "remedy"), BAD)
def test_a_bad_flag_is_named(key: str, value: object, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_toml(None, NEEDED | {key: value})
    error = caught.value
    assert (error.file, error.field) == (None, key)
    assert message in error.message
    assert remedy in str(error.remedy)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("key", "value", "message", "remedy"), [case for case in BAD if case[0] not in NEEDED])
def test_a_bad_value_in_a_file_names_the_file(
    tmp_path: Path, key: str, value: object, message: str, remedy: str
) -> None:
    path = toml(tmp_path, f"{key} = {json.dumps(value)}\n")
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig.from_toml(path)
    error = caught.value
    assert (error.file, error.field) == (str(path), key)
    assert message in error.message


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train.lr", "did you mean optim.lr?"),
        ("lr", "did you mean optim.lr?"),
        ("batch-size", "did you mean train.batch-size?"),
        ("train.batch_sise", "did you mean train.batch-size?"),
        ("optim.shedule", "did you mean optim.schedule?"),
        ("sed", "did you mean seed?"),
        ("lora.r.x", "did you mean"),
        ("zzz", "see smedjan finetune --help"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, remedy: str) -> None:
    for path, overrides in ((None, NEEDED | {key: 1}), (toml(tmp_path, f"{key} = 1\n"), {})):
        with pytest.raises(ConfigError, match="is no key of a run") as caught:
            FinetuneConfig.from_toml(path, overrides)
        assert caught.value.file == (None if path is None else str(path))
        assert remedy in str(caught.value.remedy)


def test_keys_that_are_missing_or_contradict(tmp_path: Path) -> None:
    def refused(text: str, message: str, field: str | None) -> None:
        path = tmp_path / "run.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            FinetuneConfig.from_toml(path)
        assert caught.value.field == field
        assert caught.value.remedy

    needed = 'model = "m"\ndata = "d"\nout = "o"\n'
    refused('data = "d"\nout = "o"', "is missing", "model")
    refused('model = "m"\nout = "o"', "is missing", "data")
    refused('model = "m"\ndata = "d"', "is missing", "out")
    refused(needed + "train.steps = 1\ntrain.epochs = 1", r"both steps \(1\) and epochs \(1\)", "train.steps")
    refused(needed + "train.batch-size = 1\ntrain.batch_size = 1", "is there twice", "train.batch_size")
    refused(needed + "train = 1", "is a table, not a value", "train")
    refused(needed + "seed = ", "is not TOML", None)
    refused(needed + "[optim.lr]\nx = 1", "is not a number", "optim.lr")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        FinetuneConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="is not TOML"):
        FinetuneConfig.from_toml(tmp_path / "latin.toml")


def test_python_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"lora.rank: 0 is out of range"):
        LoraConfig(rank=0)
    assert LoraConfig(alpha=16) == LoraConfig(alpha=16.0)
    assert type(LoraConfig(alpha=16).alpha) is float


def test_max_length_for_a_model() -> None:
    assert [TrainConfig().max_length_for(context) for context in (64, 8192)] == [64, 1024]
    assert TrainConfig(max_length=64).max_length_for(64) == 64
    with pytest.raises(ConfigError, match=r"train.max_length: 65 is more than the model's context of 64"):
        TrainConfig(max_length=65).max_length_for(64)


def test_warmup_steps() -> None:
    assert [OptimConfig(warmup=share).warmup_steps(150) for share in (0, 0.01, 0.03, 0.5, 1, 150)] == [
        0,
        2,
        5,
        75,
        1,
        150,
    ]
    with pytest.raises(ConfigError, match=r"optim.warmup: 151 steps of warm-up in a run of 150"):
        OptimConfig(warmup=151).warmup_steps(150)


def test_to_dict_is_json_and_reads_back(tmp_path: Path) -> None:
    made = config(train=TrainConfig(steps=3, packing=True), dtype="bfloat16", eval_data=Path("e"), seed=5)
    written = json.loads(json.dumps(made.to_dict()))
    assert written["optim"]["lr"] == 5e-4
    assert FinetuneConfig.from_toml(None, written) == made
    path = toml(tmp_path, "train.epochs = 2\n")
    assert FinetuneConfig.from_toml(path, {"train": {"steps": None}}).train.epochs == 2.0


def test_the_hash_holds_what_decides_the_numbers() -> None:
    base = config()
    same = [
        replace(base, model="other", data=Path("x"), eval_data=Path("y"), out=Path("z"), resume=True, dry_run=True),
        replace(base, backend="mlx_metal"),
        replace(base, train=replace(base.train, save_every=7, keep=7, eval_every=7)),
        replace(base, train=replace(base.train, sample_every=7, sample_prompts="x", track=("tensorboard",))),
        replace(base, optim=replace(base.optim, lr=0.0005, max_skipped=7)),
        from_flags(optim__lr="5e-4", train__epochs="1"),
    ]
    assert {made.config_hash() for made in same} == {base.config_hash()}
    other = [
        replace(base, seed=1),
        replace(base, method="full"),
        replace(base, dtype="float32"),
        replace(base, train=replace(base.train, grad_accum=2)),
        replace(base, train=replace(base.train, loss_on="all")),
        replace(base, optim=replace(base.optim, eps=1e-6)),
        replace(base, lora=replace(base.lora, rank=8)),
        replace(base, train=replace(base.train, ema=0.9)),
        watched := replace(base, eval_data=Path("e"), train=replace(base.train, patience=2)),
        replace(watched, train=replace(watched.train, eval_every=7)),
        replace(watched, train=replace(watched.train, min_delta=0.1)),
    ]
    assert len({base.config_hash(), *(made.config_hash() for made in other)}) == len(other) + 1
    full = replace(base, method="full")
    assert full.config_hash() == replace(full, lora=LoraConfig(rank=1)).config_hash()
