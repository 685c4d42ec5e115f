"""Several adapters beside one base: switched without a second copy of it, with the bits of a fresh load (issue 6, "two
adapters on one base")."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import smedjan
from smedjan.errors import SmedjanError

IDS = np.array([[5, 17, 88, 3, 9], [7, 7, 60, 66, 2]])
KINDS = {
    "a": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "wide": {"r": 8, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj", "up_proj"], "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, adapter directories by name), all of peft's"""
    base = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**settings, **heads, initializer_range=0.2)).save_pretrained(base)
    found = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**kind, task_type="CAUSAL_LM"))
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.data *= 1.5
            elif "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return base, found


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_switching_gives_the_bits_of_a_fresh_load(made, backend):
    base, adapters = made
    fresh = {
        name: smedjan.load(base, adapter=path, backend=backend).logits(IDS)
        for name, path in [(None, None), *adapters.items()]
    }
    assert len({logits.tobytes() for logits in fresh.values()}) == 5
    model = smedjan.load(base, adapter={name: adapters[name] for name in ("a", "wide")}, backend=backend)
    assert model.adapter == "a"
    kept = {name: array for name, array in model.session.parameters.items() if ".lora_" not in name}
    model.add_adapter("b", adapters["b"])
    model.add_adapter("dora", adapters["dora"])
    for name in ("a", "b", "wide", None, "dora", "b", "a", None):
        model.use(name)
        assert model.adapter == name
        np.testing.assert_array_equal(model.logits(IDS), fresh[name], err_msg=str(name))
    model.use("dora")
    now = model.session.parameters
    assert all(now[name] is array for name, array in kept.items()), "the base was never copied"
    assert sum(".lora_" in name for name in now) == 3 * 2, "one adapter at a time"
    programs = [key for key in model.session.programs if key[0] == "logits"]
    assert len(programs) == 4, "a and b, of the same settings, share one"


def test_planned_programs_follow_the_switch(made):
    """Triton's launches are bound to where parameters lie."""
    base, adapters = made
    model = smedjan.load(base, adapter={name: adapters[name] for name in ("a", "b")}, backend="cuda_triton")
    exact = smedjan.load(base, adapter=adapters["a"], backend="torch_reference")
    ids = IDS[:1, :3]
    seen = []
    for name in ("a", "b", "a"):
        model.use(name)
        seen.append(model.logits(ids))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert np.abs(seen[0] - seen[1]).max() > 1e-2
    np.testing.assert_allclose(seen[0], exact.logits(ids), rtol=0, atol=1e-4)


def test_texts_and_gradients_are_of_the_one_in_use(made):
    base, adapters = made
    model = smedjan.load(base, adapter=adapters, backend="torch_reference")
    for name in ("dora", "b"):
        model.use(name)
        fresh = smedjan.load(base, adapter=adapters[name], backend="torch_reference")
        texts = [list(m.generate(IDS[0], max_new_tokens=6, stop=())) for m in (model, fresh)]
        assert texts[0] == texts[1]
        names = [key for key in fresh.session.parameters if ".lora_" in key]
        batch = {"input_ids": IDS, "labels": IDS}
        (loss, grads), (other, theirs) = (m.loss_and_grads(batch, names) for m in (model, fresh))
        assert loss == other
        for key in names:
            np.testing.assert_array_equal(grads[key], theirs[key])


def test_a_text_that_was_begun_with_another_is_refused(made):
    base, adapters = made
    model = smedjan.load(base, adapter=adapters, backend="torch_reference")
    text = model.generate(IDS[0], max_new_tokens=6, stop=())
    next(text)
    model.use("b")
    with pytest.raises(SmedjanError, match="another one is in use than when this text was begun"):
        list(text)


def test_names(made):
    base, adapters = made
    model = smedjan.load(base, adapter=adapters["a"], backend="torch_reference")
    assert (list(model.adapters), model.adapter) == (["default"], "default")
    with pytest.raises(SmedjanError, match="adapter: 'b' is not loaded; loaded: default; see add_adapter"):
        model.use("b")
    with pytest.raises(SmedjanError, match="'default' is there already"):
        model.add_adapter("default", adapters["b"])
    with pytest.raises(SmedjanError, match="adapter"):
        model.save(base / "never")
    model.use(None)
    assert smedjan.load(base, backend="torch_reference").adapters == {}
