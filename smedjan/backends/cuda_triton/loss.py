"""cross_entropy, and the language-model head fused with it, on Triton and cuBLAS. Formulas in `kernels/loss.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from smedjan.backends.cuda_triton.kernels import common
from smedjan.backends.cuda_triton.kernels import loss as kernels
from smedjan.backends.cuda_triton.norm import as_rows

IGNORE_INDEX = -100
"""Label of a row that is not trained, as in torch and transformers."""


def _run(
    logits: Tensor,
    labels: Tensor,
    *,
    loss: Tensor | None,
    lse: Tensor | None,
    scale: Tensor | float | None,
    ignore_index: int,
    gain: float = 1.0,
    cap: float = 0.0,
) -> None:
    """One launch: forward where there is a `loss` to write, backward in place where there is a `scale`."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 or vocab == 1, f"rows are not contiguous: strides {logits.stride()}"
    assert labels.shape == (rows,), f"labels {list(labels.shape)} for {rows} rows"
    assert labels.dtype == torch.int64
    assert labels.is_contiguous()
    if rows == 0:
        return
    tile = common.vocab_tile(vocab)
    kernels.cross_entropy[(rows,)](
        logits,
        labels,
        loss,
        lse,
        scale if isinstance(scale, Tensor) else None,
        scale if isinstance(scale, float) else 1.0,
        gain,
        cap,
        logits.stride(0),
        vocab,
        ignore_index,
        COLS=tile.cols,
        CAPPED=cap != 0.0,
        FORWARD=loss is not None,
        BACKWARD=scale is not None,
        **tile.options,
    )


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """logits [R, V], labels [R] int64 -> loss [R], lse [R], float32; both 0 where the label is `ignore_index`."""
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(loss)
    _run(logits, labels, loss=loss, lse=lse, scale=None, ignore_index=ignore_index)
    return loss, lse


def cross_entropy_bwd(
    logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor | float, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """(softmax(logits) - onehot(labels)) * scale, written over `logits` (donated), which is returned.

    `scale` is a float or a float32 tensor of one element: the loss's cotangent over the number of items.
    """
    assert not isinstance(scale, Tensor) or (scale.numel() == 1 and scale.dtype == torch.float32)
    assert lse.shape == labels.shape
    assert lse.is_contiguous()
    _run(
        logits,
        labels,
        loss=None,
        lse=lse,
        scale=scale if isinstance(scale, Tensor) else float(scale),
        ignore_index=ignore_index,
    )
    return logits


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float,
    *,
    needs: tuple[bool, bool],
    chunk_rows: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    gain: float = 1.0,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss = sum of cross_entropy(z, labels) / num_items, z = cap tanh(gain x @ weight^T / cap), and its gradients, a
    chunk of rows at a time. Without a cap (0), z = gain x @ weight^T.

    x [..., D] of R rows, weight [V, D], labels [R] int64, num_items (a float, or a tensor of one element that stays on
    the device) -> loss [] float32, dx [..., D] in x's dtype, dweight [V, D] float32; None where `needs` (dx, dweight)
    does not ask. The VJP multiplies both by the loss's cotangent.

    There are never more logits than [chunk_rows, V] (None: what fits `common.LOGITS_BYTES`). A chunk's buffer takes
    cuBLAS's logits, in x's dtype as in transformers, then their gradient, then the next chunk's. Liger Kernel (Hsu et
    al., 2024); "Cut Your Losses" (Wijmans et al., 2024) goes further and keeps no chunk in memory.
    """
    need_dx, need_dweight = needs
    x2 = as_rows(x)
    rows, vocab = x2.shape[0], weight.shape[0]
    assert x2.shape[1] == weight.shape[1], f"x {list(x.shape)}, weight {list(weight.shape)}"
    assert x.dtype == weight.dtype, f"x {x.dtype}, weight {weight.dtype}"
    if isinstance(num_items, Tensor):
        assert num_items.numel() == 1
        scale: Tensor | float = num_items.to(torch.float32).reshape(()).reciprocal()
    else:
        scale = 1.0 / num_items
    step = common.chunk_rows(rows, vocab, x.element_size()) if chunk_rows is None else chunk_rows
    assert step > 0 or rows == 0, f"chunk_rows {step}"

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dx2 = None if dx is None else as_rows(dx)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need_dweight else None
    if rows == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device), dx, dweight
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    buffer = torch.empty(min(step, rows), vocab, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        logits = buffer[: chunk.stop - start]
        torch.mm(x2[chunk], weight.t(), out=logits)
        _run(
            logits,
            labels[chunk],
            loss=losses[chunk],
            lse=None,
            scale=scale if need_dx or need_dweight else None,
            ignore_index=ignore_index,
            gain=gain,
            cap=cap,
        )
        if dx2 is not None:
            torch.mm(logits, weight, out=dx2[chunk])
        if dweight is not None:
            _accumulate(dweight, logits, x2[chunk])
    return losses.sum().mul_(scale), dx, dweight


def _accumulate(dweight: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """dweight [V, D] float32 += dlogits^T [V, R] @ x [R, D], without rounding the product to x's dtype."""
    if x.dtype == torch.float32:
        dweight.addmm_(dlogits.t(), x)
    elif x.device.type == "cuda":
        torch.addmm(dweight, dlogits.t(), x, out_dtype=torch.float32, out=dweight)
    else:
        # torch has no mixed product on the CPU, where Triton's interpreter runs.
        dweight.addmm_(dlogits.t().float(), x.float())
