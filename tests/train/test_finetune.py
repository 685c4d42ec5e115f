"""A run's inputs, its log and what it trains: every kind of row, and one line for every bad input (issue 3, "Bad
input": a row longer than the context, an all-masked data set; and a run that diverges)."""

from __future__ import annotations

import json
import shutil

import pytest

import smedjan
from smedjan.checkpoint.run_dir import load_checkpoint
from smedjan.errors import SmedjanError

CHATS = [
    [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"world {i % 2}"}] for i in range(8)
]
ROWS = {
    "text": [{"text": f"hello world {i % 2}"} for i in range(8)],
    "messages": [{"messages": chat} for chat in CHATS],
    "prompt and completion": [{"prompt": f"hello {i} ", "completion": f"world {i % 2}"} for i in range(8)],
}


def refused(config, field):
    """The error of a run: one line that names the field."""
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(config)
    assert "\n" not in str(raised.value)
    assert raised.value.field == field
    assert raised.value.remedy
    return str(raised.value)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row_trains(configure, write_rows, read_log, kind, method):
    config = configure(data=str(write_rows(ROWS[kind])), method=method, train__steps=12, train__batch_size=8)
    run = smedjan.finetune(config)
    losses = [event["loss"] for event in read_log(run.run_dir).steps]
    assert losses[-1] < 0.8 * losses[0], losses
    assert run.rows == {"kept": 8, "truncated": 0, "dropped": 0, "broken": 0}
    assert 0.2 < run.trained_share < 1, "a first token is never trained"


def test_the_log(configure, write_rows, read_log):
    """Each step is in log.jsonl as `on_step` saw it; the evaluation loss comes at its steps and after the last one."""
    valid = write_rows([{"prompt": "hello 3 ", "completion": "world 0"}], "valid.jsonl")
    seen = []
    config = configure(eval_data=str(valid), train__steps=5, train__eval_every=2, optim__lr=1e-3)
    run = smedjan.finetune(config, on_step=seen.append)
    log = read_log(run.run_dir)
    assert [event["step"] for event in log.steps] == [1, 2, 3, 4, 5]
    assert [event["step"] for event in log.evals] == [2, 4, 5]
    keys = {"step", "total_steps", "loss", "grad_norm", "lr", "tokens", "trained_tokens", "tokens_per_s", "peak_bytes"}
    keys |= {"mfu", "eta_s", "skipped", "at"}
    assert all(set(event) == keys for event in log.steps)
    assert [event for event in seen if "loss" in event] == log.steps
    assert [event for event in seen if "eval_loss" in event] == log.evals
    assert run.eval_loss == log.evals[-1]["eval_loss"]


def test_the_evaluation_loss_is_the_saved_models(configure, write_rows, peer_trainer):
    """transformers, with the model that the run saved, finds the loss that the run reported."""
    import torch

    rows = [{"prompt": "hello 3 ", "completion": "world 0"}, {"prompt": "hello ", "completion": "world 1 2 3"}]
    config = configure(eval_data=str(write_rows(rows, "valid.jsonl")), train__steps=3, train__eval_every=0)
    run = smedjan.finetune(config)
    from smedjan.train.parts import Finetune

    batches = Finetune(config).eval_dataset.batches(batch_size=4, max_length=64, pad_to=16)
    theirs = peer_trainer(run.run_dir, torch.float32, lr=1.0, clip=0.0).backward(list(batches))
    assert run.eval_loss == pytest.approx(theirs, rel=1e-6)


def test_all_masked_data(configure, write_rows):
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(configure(data=str(write_rows(rows))))
    assert "\n" not in str(raised.value)
    assert "train" in str(raised.value)


def test_a_row_longer_than_the_context(configure, write_rows):
    rows = [{"text": "hello"}, {"text": "hello world " * 50}]
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(configure(data=str(write_rows(rows))))
    assert "\n" not in str(raised.value)
    assert "2" in str(raised.value), "the row is named"
    run = smedjan.finetune(configure(data=str(write_rows(rows)), train__too_long="drop", train__steps=1))
    assert run.rows == {"kept": 1, "truncated": 0, "dropped": 1, "broken": 0}


def test_rows_that_train_no_stop_token_are_counted(configure, write_rows, tmp_path):
    """A template that closes only the user's turn: what the model learns from such a row has no end."""
    config = configure(data=str(write_rows([{"messages": chat} for chat in CHATS])), train__steps=1)
    assert smedjan.finetune(config).unstopped == 0
    model = shutil.copytree(config.model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'user' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = smedjan.finetune(configure("open", model=str(model), data=str(config.data), train__steps=1))
    assert run.unstopped == run.rows["kept"] == 8


def test_max_length_beyond_the_context(configure):
    assert "64" in refused(configure(train__max_length=65), "train.max_length")


def test_an_unknown_target(configure):
    message = refused(configure(method="lora", lora__targets="q_proj,z_proj"), "lora.targets")
    assert "z_proj" in message


def test_a_rate_of_an_unknown_parameter(configure):
    assert "'lora_B'" in refused(configure(method="full", optim__lr_pattern="lora_B=16"), "optim.lr_pattern")


def test_a_rank_of_an_unknown_target(configure):
    config = configure(method="lora", lora__targets="q_proj", lora__rank_pattern="v_proj=2")
    assert "v_proj" in refused(config, "lora.rank_pattern")


@pytest.mark.parametrize("bad", ["all masked", "unknown target"])
def test_a_refused_run_writes_nothing(configure, write_rows, tmp_path, bad):
    rows = write_rows([{"messages": [{"role": "user", "content": "hello"}]}], "bad.jsonl")
    flags = {"data": str(rows)} if bad == "all masked" else {"method": "lora", "lora__targets": "z_proj"}
    with pytest.raises(SmedjanError):
        smedjan.finetune(configure(**flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_a_run_that_diverges(configure, backend):
    """A rate of 1e30 makes the weights overflow: the run ends with one line, not with NaN weights saved."""
    config = configure(backend=backend, train__steps=10, optim__lr=1e30, optim__warmup=0, optim__schedule="constant")
    message = refused(config, "optim.lr")
    assert "step" in message
    assert not (config.out / "model.safetensors").exists()


def test_more_layers_than_the_model_has(configure):
    assert "2 layers" in refused(configure(method="lora", lora__last_layers=3), "lora.last_layers")


def test_adapters_in_the_last_layer_alone(configure):
    """The run's adapter names the layers as PEFT does, and loads with them."""
    run = smedjan.finetune(configure(method="lora", lora__last_layers=1, train__steps=2))
    session = smedjan.load(run.run_dir).session
    adapters = [name for name in session.parameters if "lora_" in name]
    assert adapters
    assert all(".layers.1." in name for name in adapters)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_beside_the_head_or_the_embedding_is_refused(configure, target):
    """They are no linear layers of a block; the error names the flag, not a parameter that nobody declared."""
    assert target in refused(configure(method="lora", lora__targets=f"q_proj,{target}"), "lora.targets")


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_small_steps_are_not_lost_in_bfloat16(configure, backend):
    """Steps of a thousandth of a weight's rounding move the float32 masters, and in the end the weights; without
    masters nothing moves at all."""
    flags = {"method": "full", "backend": backend, "dtype": "bfloat16", "train__steps": 12, "optim__lr": 2e-5}
    flags |= {"optim__schedule": "constant", "optim__warmup": 0}
    runs = {master: configure(f"run-{master}", optim__master=master, **flags) for master in (True, False)}
    moved = {}
    for master, config in runs.items():
        smedjan.finetune(config)
        before, after = smedjan.load(config.model, dtype="bfloat16"), smedjan.load(config.out)
        name = "model.layers.0.mlp.down_proj.weight"
        moved[master] = float((before.session.parameters[name] != after.session.parameters[name]).float().mean())
    assert moved[True] > 2 * moved[False]
    state = load_checkpoint(runs[True].out).optimizer
    assert state["master.model.norm.weight"].dtype == "float32"
    assert state["exp_avg.model.norm.weight"].dtype == "float32"
