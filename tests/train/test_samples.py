"""Samples while training are the model's greedy words at that step, and change nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.errors import SmedjanError
from smedjan.train.parts import Finetune
from smedjan.train.samples import NEW_TOKENS, Samples, texts_of

CHAT = [{"role": "user", "content": "hello 1"}, {"role": "assistant", "content": "world 1"}]


def sampled(run_dir):
    log = (run_dir / "smedjan" / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, log) if "samples" in event]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native"])
def test_samples_change_no_bit(configure, method, backend):
    """With dropout, accumulation and an evaluation beside them."""
    flags = {"method": method, "backend": backend, "train__steps": 4, "train__grad_accum": 2, "lora__dropout": 0.1}
    plain = smedjan.finetune(configure("plain", **flags))
    run = smedjan.finetune(configure("sampled", **flags, train__sample_every=1))
    assert run.weights_sha256 == plain.weights_sha256
    assert [event["step"] for event in sampled(run.run_dir)] == [1, 2, 3, 4]
    assert sampled(plain.run_dir) == []


def test_they_are_the_greedy_words_of_transformers(configure, write_rows):
    """Of the model as it is at the end, which the run saved; the prompts are those of the evaluation rows."""
    rows = [{"prompt": f"hello {i} ", "completion": "world"} for i in range(5)]
    config = configure(eval_data=str(write_rows(rows, "valid.jsonl")), train__steps=12, train__sample_every=5)
    run = smedjan.finetune(config)
    found = sampled(run.run_dir)
    assert [event["step"] for event in found] == [5, 10, 12]
    assert [each["prompt"] for each in found[-1]["samples"]] == ["hello 0 ", "hello 1 ", "hello 2 "]
    peer, parts = AutoModelForCausalLM.from_pretrained(run.run_dir), Finetune(config)
    for each in found[-1]["samples"]:
        ids = torch.tensor([parts.tokenizer.encode(each["prompt"])])
        room = min(NEW_TOKENS, 64 - 1)
        made = peer.generate(ids, do_sample=False, max_new_tokens=room, eos_token_id=0, pad_token_id=0)
        assert each["text"] == parts.tokenizer.decode(made[0, ids.shape[1] :].tolist())
    assert len({each["text"] for event in found for each in event["samples"]}) > 1


def test_a_prompt_as_text_is_a_turn_where_rows_are_conversations(configure, write_rows):
    parts = Finetune(configure(train__sample_prompts="hi", train__sample_every=1))
    assert [parts.tokenizer.decode(ids, False) for ids in Samples(parts).prompts] == ["hi"]
    chats = write_rows([{"messages": CHAT}], "chats.jsonl")
    parts = Finetune(configure(data=str(chats), train__sample_prompts="hi", train__sample_every=1))
    assert [parts.tokenizer.decode(ids, False) for ids in Samples(parts).prompts] == ["<user>hi<eos>"]
    parts = Finetune(configure(data=str(chats), train__sample_every=1))
    [own] = Samples(parts).prompts
    assert own == parts.tokenized.examples[0].input_ids.tolist()[: len(own)]
    assert parts.tokenizer.decode(own, False).endswith("hello 1<eos>")


def test_rows_of_text_go_on_from_a_quarter(configure, write_rows):
    rows = write_rows([{"text": "hello world this is a tiny text"}], "texts.jsonl")
    parts = Finetune(configure(data=str(rows), train__sample_every=1))
    [ids] = Samples(parts).prompts
    [example] = parts.tokenized.examples
    assert ids == example.input_ids.tolist()[: len(example) // 4]


def test_a_prompt_longer_than_the_context_loses_its_beginning(configure):
    parts = Finetune(configure(train__sample_prompts="hello " * 200, train__sample_every=1))
    [made] = Samples(parts)(parts.trainer().session)
    assert 0 < len(made["prompt"]) < len("hello " * 200)


def test_files_of_prompts(write_rows, tmp_path):
    assert texts_of(str(write_rows([{"prompt": "a", "completion": "b"}]))) == ["a"]
    assert texts_of(str(write_rows([{"text": "a"}, {"text": "b"}]))) == ["a", "b"]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert texts_of(str(tmp_path / "prompts.txt")) == ["one", "two"]
    assert texts_of("What is it?") == ["What is it?"]
    assert texts_of("long " * 2000) == ["long " * 2000]
    (tmp_path / "none.txt").write_text("\n")
    for bad, said in (
        (tmp_path / "absent.txt", "no such file"),
        (tmp_path / "none.txt", "holds no line"),
        (write_rows([{"messages": CHAT}]), "holds conversations"),
    ):
        with pytest.raises(SmedjanError, match=said) as raised:
            texts_of(str(bad))
        assert raised.value.field == "train.sample_prompts"
        assert "\n" not in str(raised.value)
