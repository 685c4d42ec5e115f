"""DoRA on every backend against peft's (`tests/hf/test_exact_llama.py` holds the exact one to the bit): gradients,
cached decoding, what it starts as, dropout, 4-bit weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from smedjan.passes.lora import Lora, b_name, magnitude_name
from smedjan.runtime.adapters import magnitudes
from smedjan.runtime.select import backend
from smedjan.runtime.session import Cache, Session
from tests.conftest import assert_bits, make_batch, make_peer, make_session
from tests.passes.test_quantize import quantized
from tests.tolerances import assert_near

TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")
LORA = Lora(rank=3, alpha=6.0, dropout=0.0, targets=TARGETS, dora=True)
FAST = ["cpu_native", "cuda_triton"]


def adapted(
    on: str = "torch_reference", lora: Lora = LORA, **sizes
) -> tuple[Session, torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """A session with random adapters, peft's model with the same, and its parameters by our names. Triton's
    interpreter is slow: one layer."""
    if on == "cuda_triton":
        sizes["num_hidden_layers"] = 1
    peer = make_peer(num_key_value_heads=2, **sizes)
    session = make_session(peer, lora=lora)
    layers = None if lora.layers is None else list(lora.layers)
    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=list(lora.targets), use_dora=True, layers_to_transform=layers
    )
    model = get_peft_model(peer, settings)
    named = {n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in model.named_parameters()}
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    torch.manual_seed(5)
    for name, parameter in trained.items():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    chosen = backend(on)
    if on == "mlx_metal":
        arrays = {n: chosen.from_raw(session.backend.to_raw(array)) for n, array in session.parameters.items()}
        session.parameters = arrays
        session.parameters.update(
            {n: chosen.from_raw(backend("torch_reference").to_raw(p)) for n, p in trained.items()}
        )
    else:
        session.parameters.update({name: parameter.detach().clone() for name, parameter in trained.items()})
    session.backend = chosen
    return session, model, trained


def torch_of(session: Session, array) -> torch.Tensor:
    return backend("torch_reference").from_raw(session.backend.to_raw(array))


@pytest.mark.parametrize(
    ("on", "biases"), [("cpu_native", False), ("cpu_native", True), ("cuda_triton", True), ("mlx_metal", True)]
)
def test_gradients_are_near_pefts(on, biases):
    session, model, trained = adapted(on, attention_bias=biases, mlp_bias=biases)
    batch = make_batch("right")
    plain, reference = {}, {}
    for found, wide in ((plain, False), (reference, True)):
        out = (model.double() if wide else model)(**batch.peer)
        model.zero_grad()
        out.loss.backward()
        found.update({name: parameter.grad.clone() for name, parameter in trained.items()})
        found["logits"] = out.logits.detach()
    loss, grads = session.micro(batch, list(trained), num_items=batch.trained_tokens)
    assert float(torch_of(session, loss)) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    ours = {name: torch_of(session, array) for name, array in grads.items()}
    for name, value in {**ours, "logits": torch_of(session, session.logits(batch))}.items():
        assert_near(name, value, reference[name], plain[name])


@pytest.mark.parametrize("on", ["torch_reference", *FAST])
def test_cached_decoding(on):
    """The factors are made once a generation: the exact backend's bits are peft's, each fast one is near."""
    session, model, _ = adapted(on)
    ids = make_batch(batch=1).peer["input_ids"]
    cache, past, fed = Cache(session, batch=1, capacity=16), None, []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        with torch.no_grad():
            theirs = model(ids[:, start:end], past_key_values=past, use_cache=True)
        past = theirs.past_key_values
        ours = cache.feed(ids[:, start:end].numpy())
        fed.append((ours, theirs.logits))
        if on == "torch_reference":
            assert_bits(ours, theirs.logits, f"tokens {start} to {end}")
    with torch.no_grad():
        wide = model.double()(ids[:, :6]).logits
    # One token's error is a single draw: of all six, the last two decoded.
    ours, plain = (torch.cat(each, 1) for each in zip(*fed, strict=True))
    assert_near("six tokens", ours, wide, plain)
    decode = [program for key, program in session.programs.items() if key[0] == "logits"]
    assert decode
    assert not any(call.node.op.name == "dora_norm" for program in decode for call in program.calls)


def test_it_starts_as_the_base():
    """m is the very norm that it is divided by: with B = 0 the exact backend gives the base's bits."""
    peer = make_peer(num_key_value_heads=2)
    plain, session = make_session(peer), make_session(peer, lora=LORA)
    for name, shape in LORA.shapes(session.config.parameter_shapes()).items():
        session.parameters[name] = torch.randn(shape) if ".lora_A." in name else torch.zeros(shape)
    session.parameters.update(magnitudes(session))
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        rows = session.parameters[f"{module}.weight"].norm(dim=1)
        torch.testing.assert_close(session.parameters[magnitude_name(module)], rows)
    assert_bits(session.logits(make_batch()), plain.logits(make_batch()), "logits")
    session.parameters[b_name("model.layers.0.self_attn.q_proj")] += 0.1
    assert not torch.equal(session.logits(make_batch()), plain.logits(make_batch()))


class Masked(torch.nn.Module):
    """Dropout by a mask that is given."""

    def __init__(self, mask: torch.Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x):
        return x * self.mask / (1 - self.p)


@pytest.mark.parametrize("on", ["torch_reference", "cpu_native"])
def test_dropout_drops_what_pefts_does(on):
    """y + (f - 1) W drop(x) + f s B A drop(x): with our masks in peft's model, its gradients."""
    lora = replace(LORA, targets=("q_proj", "down_proj"), dropout=0.3)
    session, model, trained = adapted(on, lora)
    batch, masks = make_batch(), {}

    def observe(node, made):
        if node.op.name == "keep_mask":
            masks.setdefault(node.attrs["site"], made[0].clone())

    _, grads = session.micro(
        batch, list(trained), num_items=batch.trained_tokens, dropout_key=(1, 2, 3, 4), observe=observe
    )
    modules = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    assert len(modules) == len(masks) == 4
    for site, module in enumerate(modules):
        assert 0 < float(masks[site].mean()) < 1
        module.lora_dropout["default"] = Masked(masks[site], 0.3)
    plain, reference = {}, {}
    for found, wide in ((plain, False), (reference, True)):
        (model.double() if wide else model).train().zero_grad()
        model(**batch.peer).loss.backward()
        found.update({name: parameter.grad.clone() for name, parameter in trained.items()})
    for name, gradient in grads.items():
        assert_near(name, gradient, reference[name], plain[name])


def test_four_bit_weights_have_the_norms_of_what_they_widen_to():
    """The same bits as on the dequantised weights, magnitudes too."""
    lora = Lora(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"), dora=True)
    ours, plain = quantized(on="torch_reference", lora=lora)
    batch = make_batch("right")
    started = [magnitudes(session) for session in (ours, plain)]
    for session, made in zip((ours, plain), started, strict=True):
        session.parameters.update({name: array * 1.25 for name, array in made.items()})
    names = [name for name in ours.parameters if ".lora_" in name]
    results = [session.micro(batch, names, num_items=batch.trained_tokens) for session in (ours, plain)]
    for name, array in started[0].items():
        assert_bits(array, started[1][name], name)
    for name in names:
        assert float(results[0][1][name].abs().max()) > 0
        assert_bits(results[0][1][name], results[1][1][name], name)
