"""Adapters exchanged with mlx-lm, both ways, in one process: its logits and ours within the derived bound of those of
peft in float64, to which peft in float32 is the plain computation."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import smedjan
from smedjan.cli import app
from smedjan.errors import SmedjanError
from smedjan.hf.export_mlx_lm import export_adapter
from smedjan.hf.import_model import import_model
from smedjan.train.config import FinetuneConfig
from tests.conftest import VOCAB
from tests.families import CASES, make_model
from tests.hf.mlx_peer import adapted_logits
from tests.hf.mlx_peer import mlx_adapter as make_adapter
from tests.tolerances import assert_near

IDS = torch.randint(4, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
RANK, SCALE = 4, 1.7
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHERE = {
    "last two blocks": (KEYS, 2),
    "all blocks": (None, 4),
    "by whole names": (["model.layers.1.self_attn.k_proj", "model.layers.3.mlp.up_proj", "lm_head"], 4),
}


@pytest.fixture(params=["llama", "qwen3"])
def base(request, tmp_path):
    """As our import writes it: mlx-lm wants keys that transformers 5 leaves out."""
    make_model(request.param, CASES[request.param]["plain"], calm=True).save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "base")
    return tmp_path / "base"


def mlx_adapter(base, folder, *, dora=False, where="last two blocks"):
    keys, count = WHERE[where]
    given = {"rank": RANK, "scale": SCALE, "dropout": 0.1, **({"keys": keys} if keys else {})}
    return make_adapter(base, folder, given, count, dora=dora)


def peft_of(base, adapter):
    """peft's model with the numbers of mlx-lm's files, put there by hand."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapters.safetensors")
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    settings = LoraConfig(
        r=RANK,
        lora_alpha=config["lora_parameters"]["scale"] * RANK,
        target_modules=modules,
        use_dora=config["fine_tune_type"] == "dora",
    )
    model = get_peft_model(plain_model(base), settings)
    state = model.state_dict()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        suffix = {"lora_a": "A.default", "lora_b": "B.default", "m": "magnitude_vector.default"}[part]
        held = state[f"base_model.model.{module}.lora_{suffix}.weight"]
        held.copy_(tensor if part == "m" else tensor.T)
    return model.eval()


def plain_model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa").eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def ours(path, backend="torch_reference", **options):
    return torch.from_numpy(smedjan.load(path, backend=backend, **options).logits(IDS.numpy()))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("where", WHERE)
def test_theirs_here(base, tmp_path, where, dora):
    """On both backends, beside its base and merged; the directory alone leads to its base."""
    adapter, theirs = mlx_adapter(base, tmp_path / "adapter", dora=dora, where=where)
    peer = peft_of(base, adapter)
    plain = logits(peer)
    reference = logits(peer.double())
    assert float((reference - logits(plain_model(base))).norm()) > 1e-2 * float(reference.norm())
    assert_near("mlx-lm", theirs, reference, plain)
    for backend in ("torch_reference", "mlx_metal"):
        assert_near(backend, ours(base, backend, adapter=adapter), reference, plain)
    assert torch.equal(ours(adapter), ours(base, adapter=adapter))
    report = smedjan.merge(base, adapter, tmp_path / "merged", check=False)
    assert report.merged == len({name.rpartition(".")[0] for name in load_file(adapter / "adapters.safetensors")})
    assert_near("merged", ours(tmp_path / "merged"), reference, plain)


SAVED = {
    "some": ({"target_modules": ["q_proj", "down_proj"]}, 4, ["mlp.down_proj", "self_attn.q_proj"]),
    "dora": ({"target_modules": LINEAR, "use_dora": True}, 4, None),
    "rslora": ({"target_modules": LINEAR, "use_rslora": True}, 4, None),
    "last blocks": ({"target_modules": ["k_proj"], "layers_to_transform": [2, 3]}, 2, ["self_attn.k_proj"]),
    "other blocks": (
        {"target_modules": ["k_proj"], "layers_to_transform": [0, 2]},
        4,
        ["model.layers.0.self_attn.k_proj", "model.layers.2.self_attn.k_proj"],
    ),
    "patterns that say one thing": ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, 4, None),
}


def peft_adapter(base, folder, **settings):
    model = get_peft_model(plain_model(base), LoraConfig(r=RANK, lora_alpha=6.0, **settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", SAVED)
def test_ours_there(base, tmp_path, case):
    settings, count, keys = SAVED[case]
    adapter = peft_adapter(base, tmp_path / "adapter", **settings)
    report = export_adapter(base, tmp_path / "out", adapter=adapter)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_layers"] == count
    assert keys is None or config["lora_parameters"]["keys"] == keys
    assert report.modules == len(load_file(tmp_path / "out" / "adapters.safetensors")) // (3 if case == "dora" else 2)
    peer = PeftModel.from_pretrained(plain_model(base), adapter).eval()
    plain = logits(peer)
    reference = logits(peer.double())
    assert_near("mlx-lm", adapted_logits(base, tmp_path / "out"), reference, plain)
    assert_near("ours", ours(base, "mlx_metal", adapter=adapter), reference, plain)
    again = ours(base, adapter=tmp_path / "out")
    assert_near("ours, of what was written", again, reference, plain)


def test_there_and_back_to_the_bit(base, tmp_path):
    adapter, _ = mlx_adapter(base, tmp_path / "adapter", dora=True)
    export_adapter(adapter, tmp_path / "out")
    before, after = (load_file(folder / "adapters.safetensors") for folder in (adapter, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "out"))
    assert sorted(new["lora_parameters"].pop("keys")) == sorted(old["lora_parameters"].pop("keys"))
    assert new["lora_parameters"] == pytest.approx(old.pop("lora_parameters"), rel=1e-15)
    assert (new["model"], new["fine_tune_type"], new["num_layers"]) == (str(base), "dora", 2)


def test_adapters_of_bfloat16(base, tmp_path):
    adapter, _ = mlx_adapter(base, tmp_path / "adapter")
    file = adapter / "adapters.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(narrow, file)
    found = ours(base, adapter=adapter)
    save_file({name: tensor.float() for name, tensor in narrow.items()}, file)
    assert torch.equal(found, ours(base, adapter=adapter))


def test_a_run_and_the_commands(model_directory, tmp_path, capsys):
    """A run of LoRA to mlx_lm.load; then that adapter, as mlx-lm has it, in each command that takes one."""
    import_model(model_directory(), tmp_path / "base")
    base, run, out = str(tmp_path / "base"), str(tmp_path / "run"), str(tmp_path / "out")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"the {i} ", "completion": "dog"}) + "\n" for i in range(8)))
    flags = {"model": base, "data": str(rows), "out": run, "method": "lora", "backend": "torch_reference"}
    flags |= {"lora.rank": RANK, "lora.last_layers": 1, "train.steps": 3, "optim.lr": 5e-2}
    smedjan.finetune(FinetuneConfig.from_toml(None, flags))
    assert app.run(["export", run, out, "--to", "mlx-adapter", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"out", "model_type", "base", "modules", "rank", "scale", "files", "notes"} <= set(found)
    assert (found["ok"], found["modules"], found["rank"], found["base"]) == (True, 7, RANK, base)
    theirs = mlx_lm.load(base, adapter_path=out)[0](mx.array(IDS.numpy()))
    peer = PeftModel.from_pretrained(plain_model(base), run).eval()
    plain = logits(peer)
    assert_near("mlx-lm", torch.from_numpy(np.array(theirs)), logits(peer.double()), plain)
    assert app.run(["info", out]) == 0
    assert f"adapter      rank {RANK}, alpha 32, on {base}" in capsys.readouterr().out
    said = []
    for adapter in (run, out):
        assert app.run(["generate", base, "the 3 ", "--adapter", adapter, "--max-new-tokens", "4", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["token_ids"])
        assert app.run(["eval", adapter, "--data", str(rows), "--task", "perplexity", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["nll"])
        assert app.run(["merge", base, adapter, f"{adapter}-merged", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["weights_sha256"])
    assert said[:3] == said[3:]


def config_with(**changes):
    def change(adapter):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def tensors_with(edit):
    def change(adapter):
        tensors = load_file(adapter / "adapters.safetensors")
        save_file(edit(tensors), adapter / "adapters.safetensors")

    return change


FIRST = "model.layers.2.self_attn.q_proj"
REFUSED = {
    "full": (config_with(fine_tune_type="full"), "adapter_config.json: fine_tune_type: is 'full'"),
    "alpha": (config_with(lora_parameters={"rank": 4, "alpha": 8}), "lora_parameters.scale: is missing; give a number"),
    "rank": (config_with(lora_parameters={"rank": 2.5, "scale": 1.0}), "lora_parameters.rank: is 2.5"),
    "another rank": (
        config_with(lora_parameters={"rank": 8, "scale": 1.0}),
        "], and lora_parameters.rank is 8",
    ),
    "no parameters": (config_with(lora_parameters=None), "lora_parameters: must be an object"),
    "weights": (
        tensors_with(lambda held: {**held, "lm_head.weight": torch.ones(2, 2)}),
        "lm_head.weight: is no part of a lora adapter",
    ),
    "magnitudes": (
        tensors_with(lambda held: {**held, f"{FIRST}.m": torch.ones(48)}),
        "is no part of a lora adapter",
    ),
    "an embedding": (
        tensors_with(lambda held: {**held, "model.embed_tokens.lora_a": torch.ones(97, 4)}),
        "model.embed_tokens.lora_a: [97, 4] adapts no linear layer",
    ),
    "experts": (
        tensors_with(lambda held: {**held, f"{FIRST}.lora_a": torch.ones(3, 4, 48)}),
        "[3, 4, 48] adapts no linear layer",
    ),
    "a part missing": (
        tensors_with(lambda held: {name: held[name] for name in held if name != f"{FIRST}.lora_b"}),
        f"{FIRST}.lora_B.weight: is missing",
    ),
    "another model": (
        tensors_with(lambda held: {**held, "model.layers.9.mlp.up_proj.lora_a": torch.ones(48, 4)}),
        "model.layers.9.mlp.up_proj: adapts a module that the model does not have",
    ),
    "nothing": (tensors_with(lambda held: {}), "adapters.safetensors: holds no adapter"),
    "no weights": (lambda adapter: (adapter / "adapters.safetensors").unlink(), "adapters.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_is_not_taken(base, tmp_path, case):
    change, message = REFUSED[case]
    adapter, _ = mlx_adapter(base, tmp_path / "adapter")
    change(adapter)
    for act in (
        lambda: smedjan.load(base, adapter=adapter, backend="torch_reference"),
        lambda: smedjan.merge(base, adapter, tmp_path / "merged", check=False),
    ):
        with pytest.raises(SmedjanError) as raised:
            act()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
        assert raised.value.remedy
    assert not (tmp_path / "merged").exists()


MERGE = "merge it into a model, which mlx-lm loads: smedjan merge"
UNSAID = {
    "ranks": ({"rank_pattern": {"v_proj": 2}}, "adapter_config.json: rank_pattern: mlx-lm has one rank for all"),
    "alphas": ({"alpha_pattern": {"v_proj": 2}}, "alpha_pattern: mlx-lm has one scale for all"),
    "a head": ({"modules_to_save": ["lm_head"]}, "modules_to_save: mlx-lm's adapters hold no module whole"),
}


@pytest.mark.parametrize("case", UNSAID)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_mlx_lm_cannot_say(base, tmp_path, case, capsys):
    settings, message = UNSAID[case]
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], **settings)
    capsys.readouterr()
    assert app.run(["export", str(base), str(tmp_path / "out"), "--adapter", str(adapter), "--to", "mlx-adapter"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert MERGE in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_modules_that_mlx_lm_calls_otherwise(tmp_path):
    make_model("gpt2", CASES["gpt2"]["by-layer"]).save_pretrained(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(SmedjanError, match="model_type: mlx-lm calls the modules of gpt2 otherwise"):
        export_adapter(tmp_path / "base", tmp_path / "out", adapter=adapter)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "mlx-adapter"], "to: holds a model, which mlx-lm loads as it is; give an adapter"),
        (["--to", "mlx-adapter", "--type", "F32"], "type: is F32, with --to mlx-adapter"),
        (["--adapter", "a"], "adapter: is a, with --to gguf; merge it first"),
    ],
)
def test_flags_that_do_not_go_together(model_directory, tmp_path, words, message, capsys):
    assert app.run(["export", str(model_directory()), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
