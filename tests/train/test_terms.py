"""What training alone adds to the loss and the embeddings: z-loss, label smoothing, NEFTune. Against torch and
transformers; evaluation is untouched; a resumed run makes the same bits."""

from __future__ import annotations

import pytest
import torch

import smedjan
from smedjan.backends.torch_reference.random import uniform
from smedjan.hf.load import open_model, open_session
from smedjan.ops.random import NOISE_SITE
from smedjan.runtime.select import backend as select_backend
from smedjan.train.parts import Finetune
from tests.conftest import assert_bits
from tests.tolerances import assert_near
from tests.train.test_accumulation import SPLITS, host

FAST = ["cpu_native", "mlx_metal", "cuda_triton"]
TERMS = {"z_loss": 0.03, "label_smoothing": 0.1}
RUN = {"train__steps": 4, "optim__schedule": "constant", "optim__warmup": 0, "optim__clip": 0.5}
ALL = {"train__z_loss": 0.03, "train__label_smoothing": 0.1, "train__neftune": 5}


@pytest.fixture
def peer_terms(monkeypatch):
    """The terms in what transformers' loss calls, from now on."""
    plain = torch.nn.functional.cross_entropy

    def set_terms(z_loss=0.0, label_smoothing=0.0):
        def cross_entropy(logits, labels, **how):
            loss = plain(logits, labels, **{**how, "label_smoothing": label_smoothing})
            if z_loss:
                loss = loss + z_loss * logits[labels != -100].logsumexp(-1).square().sum()
            return loss

        monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)

    return set_terms


def gradients(session, micro):
    totals, items = None, sum(batch.trained_tokens for batch in micro)
    for number, batch in enumerate(micro):
        key = (7, 0, 3, number)
        loss, totals = session.micro(batch, list(session.parameters), num_items=items, totals=totals, dropout_key=key)
    return {name: host(session, array) for name, array in totals.items()}, loss


def open_on(name, directory, **terms):
    session = open_session(open_model(directory), select_backend(name), dtype="float32")
    for term, value in terms.items():
        setattr(session, term, value)
    return session


def test_label_smoothing_is_transformers_with_torchs(configure, peer_trainer, peer_terms, tiny):
    """To the bit, over whole steps: losses and the weights that are saved."""
    config, losses = configure(**RUN, train__label_smoothing=0.1), []
    run = smedjan.finetune(config, on_step=lambda event: losses.extend([event["loss"]] if "loss" in event else []))
    peer_terms(label_smoothing=0.1)
    peer, steps = peer_trainer(tiny, torch.float32, lr=1e-2, clip=0.5), Finetune(config).steps
    assert losses == [peer.step(steps.batches_for_step(step)) for step in range(4)]
    ours = smedjan.load(run.run_dir, backend="torch_reference").session.parameters
    for name, parameter in peer.model.named_parameters():
        assert_bits(ours[name], parameter.detach(), name)


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
@pytest.mark.parametrize("terms", [{"z_loss": 0.03}, TERMS], ids=" ".join)
def test_gradients(tiny, peer_trainer, peer_terms, backend, terms):
    """Of a step, against float64; the bound's plain error is torch's in float32."""
    micro = SPLITS["4 x 1, padded"]
    peer_terms(**terms)
    reference, plain = (peer_trainer(tiny, dtype, lr=1.0, clip=0.0) for dtype in (torch.float64, torch.float32))
    true, rounded = reference.backward(micro), plain.backward(micro)
    truth, theirs = reference.gradients(), plain.gradients()
    session = open_on(backend, tiny, **terms)
    ours, loss = gradients(session, micro)
    assert abs(float(host(session, loss)) - true) <= 2 * abs(rounded - true) + 2**-22 * true
    for name, gradient in ours.items():
        assert_near(name, gradient, truth[name], theirs[name])


def test_the_terms_matter(tiny):
    """The test above can fail: each term changes the gradient by far more than rounding."""
    name, micro = "model.layers.0.mlp.down_proj.weight", SPLITS["4 x 1, padded"]
    plain = gradients(open_on("torch_reference", tiny), micro)[0][name]
    for term, value in {**TERMS, "neftune": 5.0}.items():
        made = gradients(open_on("torch_reference", tiny, **{term: value}), micro)[0][name]
        assert (made - plain).norm() > 1e-2 * plain.norm(), term


@pytest.mark.parametrize("backend", FAST)
def test_every_fast_backend_has_them(configure, backend):
    """The head keeps its lowering, and with it no more than a chunk of logits: the plan asks for no byte more. Noise
    has a lowering (which Triton's draws of the same bits as torch's is tests/backends/cuda_triton/test_random.py's)."""
    plain = smedjan.plan(configure(backend=backend))
    with_all = smedjan.plan(configure(backend=backend, train__z_loss=1e-4, train__label_smoothing=0.1))
    assert [row["op"] for row in with_all.ops] == [row["op"] for row in plain.ops]
    assert "linear_cross_entropy" in {row["op"] for row in with_all.ops}
    assert with_all.planned_bytes == plain.planned_bytes
    assert with_all.plan_hash != plain.plan_hash
    noisy = smedjan.plan(configure(backend=backend, train__neftune=5))
    assert "uniform" in {row["op"] for row in noisy.ops}


@pytest.mark.parametrize("backend", ["torch_reference", "cpu_native", "mlx_metal"])
def test_evaluation_is_untouched(configure, write_rows, peer_trainer, backend):
    """The evaluation loss of a run with all of them is transformers' plain one, on the weights that were saved."""
    rows = [{"prompt": "hello 3 ", "completion": "world 0"}, {"prompt": "hello ", "completion": "world 1 2 3"}]
    config = configure(backend=backend, eval_data=str(write_rows(rows, "valid.jsonl")), **RUN, **ALL)
    run = smedjan.finetune(config)
    batches = list(Finetune(config).eval_dataset.batches(batch_size=4, max_length=64, pad_to=16))
    assert run.eval_loss == pytest.approx(
        peer_trainer(run.run_dir, torch.float32, lr=1, clip=0).backward(batches), rel=1e-6
    )
    with_all = open_on(backend, config.model, **TERMS, neftune=5.0)
    plain = open_on(backend, config.model)
    for batch in batches:
        losses = [host(session, session.micro(batch, (), num_items=1.0)[0]) for session in (with_all, plain)]
        assert_bits(*losses, "loss")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_makes_the_same_bits(configure, method):
    flags = {**RUN, **ALL, "method": method, "train__save_every": 1, "train__grad_accum": 2, "lora__dropout": 0.1}
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
    other = smedjan.finetune(configure("other", **{**flags, "train__neftune": 0}))
    assert other.weights_sha256 != whole.weights_sha256


def test_neftune_is_transformers_with_our_noise(configure, peer_trainer, tiny):
    """To the bit: their hook adds alpha / sqrt(T D) u to what the embedding module gives, T the padded row's."""
    config, losses = configure(**RUN, train__neftune=5, train__grad_accum=2, seed=11), []
    run = smedjan.finetune(config, on_step=lambda event: losses.extend([event["loss"]] if "loss" in event else []))
    peer, steps = peer_trainer(tiny, torch.float32, lr=1e-2, clip=0.5), Finetune(config).steps
    place = [0, 0]

    def hook(module, inputs, output):
        bound = 5 / (output.shape[1] * output.shape[2]) ** 0.5
        noise = uniform(torch.tensor([11, 0, *place]), shape=tuple(output.shape), bound=bound, site=NOISE_SITE)
        place[1] += 1
        return output + noise.to(output.dtype)

    peer.model.get_input_embeddings().register_forward_hook(hook)
    for step in range(4):
        place[:] = [step + 1, 0]
        assert peer.step(steps.batches_for_step(step)) == losses[step]
    ours = smedjan.load(run.run_dir, backend="torch_reference").session.parameters
    for name, parameter in peer.model.named_parameters():
        assert_bits(ours[name], parameter.detach(), name)


@pytest.mark.parametrize("backend", ["cpu_native", "mlx_metal"])
def test_the_noise_is_the_same_everywhere(tiny, backend):
    """A step's gradients with noise of size 5 are the exact backend's but for rounding: the noise is no other draw."""
    micro = SPLITS["4 x 1, padded"]
    exact, _ = gradients(open_on("torch_reference", tiny, neftune=5.0), micro)
    ours, _ = gradients(open_on(backend, tiny, neftune=5.0), micro)
    for name, gradient in ours.items():
        assert (gradient - exact[name]).norm() < 1e-5 * exact[name].norm(), name
