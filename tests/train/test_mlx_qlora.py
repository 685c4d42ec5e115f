"""Adapters beside a base that mlx-lm's format holds in few bits: gradients, runs, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import smedjan
from smedjan.backends.mlx_metal import quantized as rules
from smedjan.checkpoint.dtype import convert
from smedjan.cli import app
from smedjan.errors import SmedjanError
from smedjan.hf.export_mlx import export_mlx
from smedjan.hf.import_model import import_model
from smedjan.hf.load import open_model, open_session
from smedjan.passes.lora import Lora
from smedjan.runtime.select import backend
from smedjan.runtime.session import Session
from tests.backends.cpu_native.fused_cases import Float64
from tests.conftest import make_batch
from tests.tolerances import assert_near

QLORA = {"method": "qlora", "lora__rank": 4, "train__steps": 3, "train__batch_size": 2}
LORA = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
BACKENDS = ("torch_reference", "cpu_native", "mlx_metal", "mlx_metal, multiplying codes")


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama of 4 bits in groups of 32, with the tokenizer of `tiny`."""
    root = tmp_path_factory.mktemp("few-bits")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny, hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(root / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, root / "plain" / name)
    export_mlx(root / "plain", root / "base", bits=4, group_size=32)
    return root / "base"


def adapted(on: str, directory: Path, lora: Lora = LORA) -> Session:
    session = open_session(open_model(directory), backend(on))
    generator, torch_backend = torch.Generator().manual_seed(4), backend("torch_reference")
    arrays = {}
    for name, shape in lora.shapes(session.config.parameter_shapes()).items():
        raw = torch_backend.to_raw(torch.randn(shape, generator=generator) * 0.2)
        arrays[name] = session.backend.from_raw(raw)
    session.use(lora, arrays)
    return session


def wide_of(session: Session, directory: Path) -> Session:
    """The same model in float64: the weights that the codes stand for, the same adapters."""
    files, arrays = open_model(directory), backend("torch_reference")
    parameters = {name: arrays.from_raw(convert(files.tensors[name], "float64")) for name in files.tensors}
    parameters |= {name: array.double() for name, array in session.parameters.items() if ".lora_" in name}
    return Session(Float64(), session.config, parameters, "float32", lora=session.lora)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("named", BACKENDS)
def test_gradients_are_within_the_bound(named: str, dora: bool, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on, _, multiplies = named.partition(", ")
    if multiplies:
        monkeypatch.setattr(rules, "multiplies_codes", lambda node: True)
    lora, batch = replace(LORA, dora=dora), make_batch("right")
    plain = adapted("torch_reference", base, lora)
    wide, ours = wide_of(plain, base), adapted(on, base, lora)
    names = [name for name in ours.parameters if ".lora_" in name]
    made = [session.micro(batch, names, num_items=batch.trained_tokens)[1] for session in (ours, wide, plain)]
    arrays = backend("torch_reference")
    for name in names:
        found = arrays.from_raw(ours.backend.to_raw(made[0][name]))
        assert float(found.abs().max()) > 0
        assert_near(name, found, made[1][name].double(), made[2][name])


def test_the_plan_says_which_products_read_codes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> set[tuple[str, str]]:
        session = adapted("mlx_metal", base)
        batch = make_batch("right")
        names = [name for name in session.parameters if ".lora_" in name]
        program = session.micro_program(session.form(batch, rows=16), names)
        return {(row["op"], row["lowering"]) for row in program.lowerings() if row["op"].startswith("affine")}

    assert said() == {("affine_dequantize", "mx.dequantize"), ("affine_embedding", "mx.dequantize")}
    monkeypatch.setattr(rules, "multiplies_codes", lambda node: True)
    assert said() >= {("affine_linear", "mx.quantized_matmul"), ("affine_linear_dx", "mx.quantized_matmul")}


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native", "mlx_metal"])
def test_a_run_is_lora_on_the_widened_weights(on, base, configure, read_log, tmp_path):
    import_model(base, tmp_path / "widened")
    ours = smedjan.finetune(configure("ours", **QLORA, model=str(base), backend=on))
    lora = {**QLORA, "method": "lora"}
    theirs = smedjan.finetune(configure("theirs", **lora, model=str(tmp_path / "widened"), backend=on))
    losses = [[(step["loss"], step["grad_norm"]) for step in read_log(run.run_dir).steps] for run in (ours, theirs)]
    assert losses[0][0][1] > 0
    if on == "torch_reference":
        assert ours.weights_sha256 == theirs.weights_sha256
        assert losses[0] == losses[1]
    else:
        assert losses[0] == [pytest.approx(step, rel=1e-5) for step in losses[1]]


def test_the_adapter_is_peft_s_and_goes_with_its_base(base, configure, tmp_path):
    run = smedjan.finetune(configure("run", **QLORA, model=str(base)))
    ids = torch.arange(5, 15)[None]
    ours = torch.from_numpy(smedjan.load(run.run_dir, backend="torch_reference").logits(ids.numpy()))
    import_model(base, tmp_path / "widened")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "widened", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, run.run_dir).eval()
    with torch.no_grad():
        theirs = model(ids).logits
    assert torch.equal(ours, theirs)
    smedjan.merge(base, run.run_dir, tmp_path / "merged")
    assert "quantization" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = torch.from_numpy(smedjan.load(tmp_path / "merged", backend="torch_reference").logits(ids.numpy()))
    assert float((merged - ours).norm()) < 1e-5 * float(ours.norm())


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"method": "full"}, "method"),
        ({"method": "lora"}, "method"),
        ({"lora__bits": 8}, "lora.bits"),
        ({"lora__init": "pissa"}, "lora.init"),
        ({"lora__modules_to_save": "embed_tokens"}, "lora.modules_to_save"),
        ({"train__new_tokens": "<new>"}, "train.new_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_with_it_is_said_at_once(flags, field, base, configure, tmp_path):
    asked = {key: value for key, value in QLORA.items() if flags.get("method") is None or not key.startswith("lora")}
    with pytest.raises(SmedjanError) as raised:
        smedjan.finetune(configure("run", **{**asked, **flags}, model=str(base)))
    assert raised.value.field == field
    assert raised.value.remedy
    assert not (tmp_path / "run").exists()


def test_its_plans_are_of_the_codes(base, configure, capsys):
    """`graph`, of a step and of a new token, and `--dry-run`."""
    for words in (["--method", "qlora"], ["--decode"]):
        assert app.run(["graph", str(base), "--plan", "--json", "--backend", "torch_reference", *words]) == 0
        said = {row["op"] for row in json.loads(capsys.readouterr().out)["ops"]}
        assert {"affine_dequantize", "affine_embedding"} <= said
    assert app.run(["graph", str(base), "--json", "--backend", "torch_reference"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["field"] == "method"
    for on in ("torch_reference", "cpu_native", "mlx_metal"):
        plan = smedjan.plan(configure(**QLORA, model=str(base), backend=on, dry_run=True))
        assert "affine_dequantize" in {row["op"] for row in plan.ops}
        assert plan.planned_bytes > 0


def test_parity_asks_for_the_widened_weights(base):
    with pytest.raises(SmedjanError, match="import it first"):
        smedjan.parity(base)
