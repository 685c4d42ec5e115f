"""Shapes of heads, and what holds of each: losses and gradients against float64 torch and torch.autograd."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from smedjan.backends.cuda_triton.apply import apply
from tests.backends.cuda_triton.conftest import DEVICE
from tests.tolerances import UNIT_ROUNDOFF, assert_close

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
STEP = 16384
"""Logits of one step over a row: longer vocabularies take several."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A head's shape. Of `skip` rows one is not trained (0: none, 1: all); `chunk` rows of logits are held at once."""

    rows: int
    vocab: int
    dim: int
    dtype: torch.dtype = F32
    skip: int = 0
    chunk: int = 128
    gain: float = 1.0
    cap: float = 0.0
    z_loss: float = 0.0
    smoothing: float = 0.0
    temperature: float = 1.0
    direction: str = "forward"
    teacher_dim: int = 5
    teacher_cap: float = 0.0
    size: float = 1.0

    def __str__(self) -> str:
        names = {"gain": 1.0, "cap": 0.0, "z_loss": 0.0, "smoothing": 0.0, "temperature": 1.0}
        names |= {"direction": "forward", "teacher_cap": 0.0}
        said = [f"{name} {getattr(self, name)}" for name, usual in names.items() if getattr(self, name) != usual]
        shape = f"{self.rows}x{self.dim}x{self.vocab} by {self.chunk}"
        return ", ".join([str(self.dtype).removeprefix("torch."), shape, f"skip {self.skip}", *said])

    def labels(self) -> Tensor:
        """The first and the last word included."""
        labels = torch.randint(0, self.vocab, (self.rows,), generator=torch.Generator().manual_seed(self.rows))
        labels[0] = self.vocab - 1
        labels[self.rows // 2] = 0
        if self.skip:
            labels[self.skip - 1 :: self.skip] = -100
        return labels.to(DEVICE)

    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, teacher_x, teacher_weight: logits of standard deviation `size`, and of twice that."""
        generator = torch.Generator().manual_seed(self.vocab + self.dim)
        shapes = [(self.rows, self.dim), (self.vocab, self.dim), (self.rows, self.teacher_dim)]
        sizes = [self.size * self.dim**-0.5, 1.0, 2 * self.size * self.teacher_dim**-0.5, 1.0]
        made = [*shapes, (self.vocab, self.teacher_dim)]
        return tuple(  # type: ignore[return-value]
            (torch.randn(shape, generator=generator) * size).to(self.dtype).to(DEVICE)
            for shape, size in zip(made, sizes, strict=True)
        )

    def shape(self, logits: Tensor, cap: float | None = None) -> Tensor:
        cap = self.cap if cap is None else cap
        shaped = torch.tanh(logits * self.gain / cap) * cap if cap else logits * self.gain
        return shaped if shaped.dtype == torch.float64 else shaped.float()


ROWS, VOCABS, DIMS = (1, 2, 3, 5, 11), (1, 2, 7, 15, 16, 17, 33, 96, 127, 130, 1000, 2049, 5003), (1, 3, 8, 33, 64)
LONG = [
    Case(rows=2, vocab=STEP, dim=9),
    Case(rows=3, vocab=STEP + 1, dim=9, chunk=2, cap=5.0, z_loss=1e-3, smoothing=0.1),
    Case(rows=2, vocab=50257, dim=5, dtype=BF16),
    Case(rows=3, vocab=49152, dim=4, skip=3, gain=0.5, temperature=2.0),
]
"""Rows of several steps; that of GPT-2, no row of which is aligned without padding."""


def generated(seed: int, dtypes: tuple[torch.dtype, ...], **choices: tuple) -> list[Case]:
    """40 shapes: every number of rows and every vocabulary several times, attributes drawn beside them; and `LONG`."""
    draw = random.Random(seed)
    made = []
    for index in range(40):
        drawn = {name: draw.choice(values) for name, values in choices.items()}
        made.append(
            Case(
                rows=ROWS[index % len(ROWS)],
                vocab=VOCABS[index % len(VOCABS)],
                dim=draw.choice(DIMS),
                dtype=dtypes[index % len(dtypes)],
                skip=draw.choice((0, 2, 3, 5, 1)),
                chunk=draw.choice((1, 3, 4, 128)),
                **drawn,
            )
        )
    return made + LONG


SHAPING = {"gain": (1.0, 1.0, 0.3, 2.0), "cap": (0.0, 0.0, 5.0, 0.5, 30.0)}
CROSS_ENTROPY = generated(1, (F32, BF16, F16), **SHAPING, z_loss=(0.0, 1e-4, 0.05), smoothing=(0.0, 0.0, 0.1, 0.4))
LOG_PROBS = generated(2, (F32, BF16), **SHAPING)
KL = generated(
    3,
    (F32, BF16),
    **SHAPING,
    temperature=(1.0, 2.0, 0.7),
    direction=("forward", "reverse"),
    teacher_dim=(1, 5, 32),
    teacher_cap=(0.0, 4.0),
)


def logits_of(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    """Logits in x's dtype, a leaf of autograd's. Products are the library's, for `chunk` rows at a time as in the op:
    its sums over a vocabulary have another order, and another error, for one row than for many."""
    return torch.cat([part @ weight.T for part in x.split(case.chunk)]).requires_grad_()


def products(case: Case, dlogits: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """dx = dlogits weight, dweight = dlogits^T x, chunks summed in float32 at least: the same products as the op's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = list(zip(dlogits.split(case.chunk), x.split(case.chunk), strict=True))
    dx = torch.cat([part @ weight for part, _ in pairs])
    return [dx, sum(part.to(wide).T @ rows.to(wide) for part, rows in pairs).to(x.dtype)]  # type: ignore[union-attr]


def check_all(
    names: str, got: tuple[Tensor, ...], reference: list[Tensor], plain: list[Tensor], scale: float | None
) -> None:
    """Each within its bound; the first is held to `scale`."""
    for index, (name, value, true, ours) in enumerate(zip(names.split(), got, reference, plain, strict=True)):
        assert value.dtype == ours.dtype, name
        assert_close(name, value, true, ours, scale=None if index else scale)


def inherited(case: Case, size: float) -> float:
    """A loss is of logits that are rounded to `dtype`, each by u |z|: it inherits at most twice the largest."""
    return size * UNIT_ROUNDOFF[case.dtype] / UNIT_ROUNDOFF[F32]


def plain_cross_entropy(case: Case, x: Tensor, weight: Tensor, items: float) -> list[Tensor]:
    """loss, dx, dweight of transformers' head: logits in x's dtype, the loss in float32."""
    logits, labels = logits_of(case, x, weight), case.labels()
    z = case.shape(logits)
    total = torch_cross_entropy(z, labels, reduction="sum", label_smoothing=case.smoothing)
    if case.z_loss:
        total = total + case.z_loss * z[labels != -100].logsumexp(-1).square().sum()
    total = total / items
    return [total.detach(), *products(case, *torch.autograd.grad(total, logits), x, weight)]


def check_cross_entropy(case: Case) -> None:
    x, weight, _, _ = case.arrays()
    items = float(case.rows) + 0.5
    shaping = {"scaling": case.gain, "cap": case.cap, "z_loss": case.z_loss, "smoothing": case.smoothing}
    got = apply("linear_cross_entropy", x, weight, case.labels(), items, grads="xw", **shaping)
    reference = plain_cross_entropy(case, x.double(), weight.double(), items)
    z = case.shape(x.double() @ weight.double().T)
    # d lse^2 = 2 lse d lse
    slope = 1.0 + 2.0 * case.z_loss * float(z.logsumexp(-1).abs().max())
    scale = max(float(reference[0]), inherited(case, float(z.abs().max()) * slope))
    check_all("loss dx dweight", got, reference, plain_cross_entropy(case, x, weight, items), scale)


def plain_kl(case: Case, arrays: list[Tensor], items: float) -> list[Tensor]:
    """loss, dx, dweight: logits in the arrays' dtype, both softmaxes in float32 (Hinton et al., 2015)."""
    logits = logits_of(case, *arrays[:2])
    z = case.shape(logits) / case.temperature
    teacher = case.shape(arrays[2] @ arrays[3].T, case.teacher_cap) / case.temperature
    of, beside = (teacher, z) if case.direction == "forward" else (z, teacher)
    terms = of.softmax(-1) * (of.log_softmax(-1) - beside.log_softmax(-1))
    total = terms[case.labels() != -100].sum() * case.temperature**2 / items
    return [total.detach(), *products(case, *torch.autograd.grad(total, logits), *arrays[:2])]


def check_kl(case: Case) -> None:
    arrays, items = list(case.arrays()), float(case.rows) + 0.5
    shaping = {"scaling": case.gain, "cap": case.cap, "teacher_scaling": case.gain, "teacher_cap": case.teacher_cap}
    how = {"direction": case.direction, "temperature": case.temperature}
    got = apply("linear_kl", *arrays, case.labels(), items, grads="xw", **shaping, **how)
    wide = [array.double() for array in arrays]
    reference = plain_kl(case, wide, items)
    z, teacher = case.shape(wide[0] @ wide[1].T), case.shape(wide[2] @ wide[3].T, case.teacher_cap)
    # d KL(a || b) = sum of a (w - KL) dz_a + (b - a) dz_b, and |w - KL| is at most twice the largest of each.
    size = float(z.abs().max() + teacher.abs().max())
    scale = max(float(reference[0]), inherited(case, size * case.temperature * (1.0 + 2.0 * size / case.temperature)))
    check_all("loss dx dweight", got, reference, plain_kl(case, arrays, items), scale)


def plain_log_probs(case: Case, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """log p of each label, dx, dweight."""
    logits = logits_of(case, x, weight)
    made = -torch_cross_entropy(case.shape(logits), case.labels(), reduction="none")
    return [made.detach(), *products(case, *torch.autograd.grad(made, logits, dy.to(made.dtype)), x, weight)]


def check_log_probs(case: Case) -> None:
    x, weight, _, _ = case.arrays()
    labels, dy = case.labels(), torch.linspace(-1.0, 2.0, case.rows, device=DEVICE)
    shaping = {"scaling": case.gain, "divisor": 1.0, "cap": case.cap}
    log_probs, lse = apply("linear_log_probs", x, weight, labels, **shaping)
    found = apply("linear_log_probs_bwd", dy, x, weight, labels, lse, needs=(True, True), **shaping)
    z = case.shape(x.double() @ weight.double().T)
    reference = plain_log_probs(case, x.double(), weight.double(), dy)
    plain = plain_log_probs(case, x, weight, dy)
    scale = max(float(reference[0].abs().max()), inherited(case, float(z.abs().max())))
    check_all("log_probs dx dweight", (log_probs, *found), reference, plain, scale)
    trained = labels != -100
    lse64, plain_lse = z.logsumexp(-1) * trained, case.shape(x @ weight.T).logsumexp(-1) * trained
    assert_close(
        "lse", lse.sum(-1), lse64, plain_lse, scale=max(float(lse64.abs().max()), inherited(case, float(z.abs().max())))
    )
    assert torch.equal(log_probs[~trained], torch.zeros_like(log_probs[~trained]))
