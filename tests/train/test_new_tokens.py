"""New tokens, tied and untied heads, full and LoRA: what is trained, what is saved, and that transformers and peft load
it with the same logits (issue 6's disaster "tied embeddings with new tokens")."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import smedjan
from smedjan.errors import SmedjanError
from smedjan.evaluate.run import evaluate
from smedjan.train.parts import Finetune
from tests.conftest import assert_bits
from tests.tolerances import assert_close

TOKENS = ("<|tool|>", "<|end|>")
ROWS = [{"prompt": f"hello {i}<|tool|>", "completion": f" world {i % 3}<|end|>"} for i in range(12)]
RUN = {
    "train__steps": 3,
    "train__new_tokens": ",".join(TOKENS),
    "lora__rank": 4,
    "lora__targets": "q_proj,down_proj",
    "optim__schedule": "constant",
    "optim__warmup": 0,
    "optim__clip": 0.5,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(tiny, tmp_path, request):
    """The tiny model, or the same with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    if not request.param:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.1)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((tiny / name).read_bytes())
    return tmp_path / "base"


@pytest.fixture
def trained(configure, write_rows, base):
    """(config, run directory) of three steps of a method."""

    def make(method, **flags):
        data = str(write_rows(ROWS))
        config = configure(method, model=str(base), data=data, method=method, **{**RUN, **flags})
        return config, smedjan.finetune(config).run_dir

    return make


def is_tied(base):
    return json.loads((base / "config.json").read_text())["tie_word_embeddings"]


def ids_of(directory):
    """Rows that hold the new tokens, as transformers' tokenizer of that directory cuts them."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [tokenizer(f"hello {i}<|tool|> world<|end|>", add_special_tokens=False)["input_ids"] for i in (1, 2)]
    assert {len(tokenizer) - 2, len(tokenizer) - 1} <= {*rows[0]}
    return np.array(rows)


def their_logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(ids)).logits


def test_a_full_run_loads_in_transformers(trained, base):
    """The vocabulary has grown by two, a tied head stays the embedding, one matrix in the file; same logits."""
    _, run = trained("full")
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) == (not is_tied(base))
    vocab = len(before["model.embed_tokens.weight"])
    assert len(after["model.embed_tokens.weight"]) == vocab + 2
    theirs, ids = AutoModelForCausalLM.from_pretrained(run), ids_of(run)
    assert len(AutoTokenizer.from_pretrained(run)) == theirs.config.vocab_size == vocab + 2
    assert (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight) == is_tied(base)
    ours = smedjan.load(run, backend="torch_reference")
    np.testing.assert_array_equal(ours.logits(ids), their_logits(theirs, ids).numpy())
    assert ours.tokenizer.encode("hello 1<|tool|> world<|end|>") == ids[0].tolist()
    assert ours.tokenizer.decode(ids[0].tolist()) == "hello 1<|tool|> world<|end|>"


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_loads_in_peft(trained, base, method):
    """By itself (AutoPeftModel resizes by the tokenizer beside it) and over a base that was resized by hand."""
    _, run = trained(method)
    ids, ours = ids_of(run), smedjan.load(run, backend="torch_reference")
    alone = AutoPeftModelForCausalLM.from_pretrained(run)
    resized = AutoModelForCausalLM.from_pretrained(base)
    resized.resize_token_embeddings(len(AutoTokenizer.from_pretrained(run)), mean_resizing=False)
    for theirs in (alone, PeftModel.from_pretrained(resized, run)):
        np.testing.assert_array_equal(ours.logits(ids), their_logits(theirs, ids).numpy())
    prompt = ids[:1, :4]
    made = alone.generate(input_ids=torch.from_numpy(prompt), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert list(ours.generate(prompt, max_new_tokens=6, stop=[0])) == made[0, 4:].tolist()
    held = load_file(run / "adapter_model.safetensors")
    whole = {name for name in held if "lora_" not in name}
    assert whole == {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    pair = [held[name] for name in sorted(whole)]
    assert torch.equal(*pair) == is_tied(base), "one matrix under two names, as peft wants it"


def test_merged_it_is_a_model_of_transformers(trained, base, tmp_path):
    """What peft computes with the adapter beside, in one model that is tied where its base was, tokenizer and all."""
    _, run = trained("lora")
    smedjan.merge(base, run, tmp_path / "merged")
    ids = ids_of(tmp_path / "merged")
    merged, beside = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        AutoPeftModelForCausalLM.from_pretrained(run),
    )
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == is_tied(base)
    theirs, reference = their_logits(beside, ids), their_logits(beside.double(), ids)
    assert_close("merged", their_logits(merged, ids), reference, theirs)
    ours = smedjan.load(tmp_path / "merged", backend="torch_reference").logits(ids)
    np.testing.assert_array_equal(ours, their_logits(merged, ids).numpy())


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_fast_backends_train_and_evaluate_it(trained, write_rows, base, backend):
    """Every new row has moved from where it began, every trained one; eval reads the adapter's own tokenizer."""
    config, run = trained("lora", backend=backend)
    began = Finetune(config).files.tensors["model.embed_tokens.weight"]
    held = load_file(run / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    moved = (held - torch.frombuffer(bytearray(began.data), dtype=torch.float32).reshape(began.shape)).abs().amax(-1)
    assert bool((moved[-2:] > 1e-3).all())
    report = evaluate(str(run), write_rows(ROWS[:4], "valid.jsonl"), backend=backend)
    assert np.isfinite(report.nll)


def test_the_steps_are_pefts(configure, write_rows, base):
    """To the bit: adapters, the embedding (and the untied head) after three clipped steps of peft's own model."""
    config = configure("run", model=str(base), data=str(write_rows(ROWS)), method="lora", **RUN)
    parts = Finetune(config)
    start = parts.trainer()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(parts.files.config.vocab_size, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start.session.parameters[name])
    modules = ["embed_tokens"] if is_tied(base) else ["embed_tokens", "lm_head"]
    settings = LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=modules,
        ensure_weight_tying=is_tied(base),
    )
    peft = get_peft_model(model, settings).train()
    named = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    ours = {name if name.startswith("base_model") else f"base_model.model.{name}": name for name in start.names}
    assert list(named) == list(ours)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(start.session.parameters[ours[name]])
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, weight_decay=0.0, foreach=False)
    for step in range(3):
        optimizer.zero_grad()
        batches = parts.steps.batches_for_step(step)
        for batch in batches:
            labels = torch.full(batch.labels.shape, -100)
            labels[:, 1:] = torch.from_numpy(batch.labels)[:, :-1]
            peft(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                labels=labels,
                num_items_in_batch=torch.tensor(batch.trained_tokens),
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 0.5)
        optimizer.step()
    held = load_file(smedjan.finetune(config).run_dir / "adapter_model.safetensors")
    assert set(held) == {*named, "base_model.model.lm_head.weight"}
    for name, parameter in named.items():
        assert_bits(held[name], parameter.detach(), name)


def test_a_resumed_run_makes_the_same_bits(configure, write_rows, base):
    flags = {**RUN, "model": str(base), "data": str(write_rows(ROWS)), "method": "lora", "train__save_every": 1}
    whole = smedjan.finetune(configure("whole", **flags))

    class Stop(Exception):
        pass

    def on_step(event):
        if event["step"] == 2:
            raise Stop

    with pytest.raises(Stop):
        smedjan.finetune(configure("stopped", **flags), on_step=on_step)
    resumed = smedjan.finetune(configure("stopped", **flags, resume=True))
    assert resumed.weights_sha256 == whole.weights_sha256


def test_modules_to_save_without_new_tokens(configure, base):
    """The embedding is trained and saved whole; an untied head stays the base's."""
    flags = {key: value for key, value in RUN.items() if key != "train__new_tokens"}
    run = smedjan.finetune(
        configure(model=str(base), method="lora", lora__modules_to_save="embed_tokens", **flags)
    ).run_dir
    ids = np.array([[5, 17, 88, 3], [7, 120, 66, 2]])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
    ours = smedjan.load(run, backend="torch_reference")
    np.testing.assert_array_equal(ours.logits(ids), their_logits(theirs, ids).numpy())
    assert not (run / "tokenizer.json").exists()


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=" ".join)
def test_pefts_adapters_here(base, tmp_path, modules, tying):
    """However peft was asked to hold embeddings and heads: its logits, also merged. A tied base whose embeddings alone
    it trained has two matrices from then on, which its own merge forgets to say."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    settings = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=list(modules), ensure_weight_tying=tying, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    peft.save_pretrained(tmp_path / "adapter")
    ids = np.array([[5, 17, model.config.vocab_size - 1, 3], [7, 120, 66, 2]])
    theirs = their_logits(peft, ids)
    ours = smedjan.load(base, adapter=tmp_path / "adapter", backend="torch_reference")
    np.testing.assert_array_equal(ours.logits(ids), theirs.numpy())
    smedjan.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close("merged", their_logits(merged, ids), their_logits(peft.double(), ids), theirs)


BAD = [
    ({"train__new_tokens": "<eos>"}, "train.new_tokens", "'<eos>' is a token already; leave it out"),
    ({"train__new_tokens": "<a>,<a>"}, "train.new_tokens", "a name is there twice"),
    ({"train__new_tokens": "@nowhere"}, "train.new_tokens", "cannot be read"),
    ({"method": "full", "train__only": "layers.0"}, "train.new_tokens", "is frozen"),
    ({"lora__modules_to_save": "norm"}, "lora.modules_to_save", "'norm' is neither the embedding nor the head"),
]


@pytest.mark.parametrize(("flags", "field", "message"), BAD)
def test_mistakes_are_one_line(configure, tmp_path, flags, field, message):
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(configure(**{**RUN, "method": "lora", **flags}))
    assert raised.value.field == field
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_tokens_of_a_file(configure, tmp_path):
    """One a line; the config holds the tokens, so that its hash does."""
    (tmp_path / "tokens.txt").write_text("<|a|>\n\n<|b, c|>\n")
    made = configure(train__new_tokens=f"@{tmp_path / 'tokens.txt'}")
    assert made.train.new_tokens == ("<|a|>", "<|b, c|>")
    assert made.config_hash() == configure(train__new_tokens=["<|a|>", "<|b, c|>"]).config_hash()
