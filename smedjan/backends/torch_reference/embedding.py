"""Embedding rows and the rows of the last hidden states that are trained."""

from __future__ import annotations

import torch

from smedjan.backends.torch_reference.table import RULES


@RULES.rule("embedding")
def embedding(input_ids, weight, *, padding_idx):
    return torch.nn.functional.embedding(input_ids, weight)


@RULES.rule("embedding_bwd")
def embedding_bwd(dy, input_ids, *, vocab_size, padding_idx):
    return torch.ops.aten.embedding_dense_backward(
        dy, input_ids, vocab_size, -1 if padding_idx is None else padding_idx, False
    )


@RULES.rule("take_rows")
def take_rows(x, rows):
    return x.index_select(0, rows)


@RULES.rule("take_rows_bwd")
def take_rows_bwd(dy, rows, *, size):
    return dy.new_zeros(size, dy.shape[1]).index_copy_(0, rows, dy)
