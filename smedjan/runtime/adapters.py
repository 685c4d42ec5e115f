"""What a session computes of its adapters before it computes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smedjan.backends.base import Array
from smedjan.graph.node import Graph
from smedjan.ops.elementwise import div
from smedjan.ops.linear import transpose_last
from smedjan.ops.lora import dora_norm
from smedjan.passes.lora import DTYPE, a_name, b_name, factor_name, magnitude_name, module_of

if TYPE_CHECKING:
    from smedjan.runtime.session import Session


def magnitudes(session: Session) -> dict[str, Array]:
    """What DoRA starts with: |W + s B A| of each row, by the name of the magnitude, as the backend itself computes it.
    The model then starts as it was, to the bit where m / |W + s B A| is exactly 1."""
    return _of_norms(session, divided=False)


def factors(session: Session) -> dict[str, Array]:
    """DoRA's m / |W + s B A| by `factor_name`: what does not change from token to token."""
    return _of_norms(session, divided=True)


def _of_norms(session: Session, *, divided: bool) -> dict[str, Array]:
    lora = session.lora
    if lora is None or not lora.dora:
        return {}
    key = (lora, divided)
    if key not in session.norms:
        base = session.config.parameter_shapes()
        graph = Graph()
        for name in lora.shapes(base):
            module = module_of(name)
            if name != magnitude_name(module):
                continue
            weight = graph.input(f"{module}.weight", base[f"{module}.weight"], session.dtype)
            if lora.transposed:
                weight = transpose_last(weight)
            rank = lora.rank_of(module)
            a = graph.input(a_name(module), (rank, weight.shape[1]), DTYPE)
            b = graph.input(b_name(module), (weight.shape[0], rank), DTYPE)
            norm = dora_norm(weight, a, b, scaling=lora.scaling_of(module))
            if divided:
                magnitude = graph.input(name, (weight.shape[0],), DTYPE)
                graph.output(factor_name(module), div(magnitude, norm))
            else:
                graph.output(name, norm)
        session.norms[key] = session.finish(session.narrow(graph))
    return dict(session.norms[key](session.parameters))
