"""How many launches transformers + Liger Kernel (+ peft) make for one more layer of a Llama: run as a script, since
Liger patches transformers. Takes the model's settings as JSON; prints {"full": {"aten": {name: launches}, "triton":
...}, ...}.

On a GPU each aten call that computes is at least one kernel; those that only describe memory (views, allocations) are
none. Triton's kernels are counted where they are started, and not run: numbers do not matter here.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.runtime.interpreter
from liger_kernel.transformers import apply_liger_kernel_to_llama
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DESCRIBE = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
        "permute",
        "select",
        "split",
    ),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "as_strided"),
    *("split_with_sizes", "unbind", "narrow", "lift_fresh", "_local_scalar_dense", "is_same_size"),
}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in DESCRIBE:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


STARTED: Counter[str] = Counter()


def _start(self: Any, *args: Any, **kwargs: Any) -> None:
    STARTED[self.fn.__name__] += 1


def step_of(layers: int, lora: bool) -> tuple[Counter[str], Counter[str]]:
    """Of the second step: forward, backward, clip, AdamW."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]), num_hidden_layers=layers)).to(torch.bfloat16)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids = torch.randint(4, 90, (1, 32))
    for _ in range(2):
        STARTED.clear()
        with Calls() as calls:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return calls.seen, Counter(STARTED)


def a_layer(lora: bool) -> dict[str, dict[str, float]]:
    (one, one_started), (three, three_started) = step_of(1, lora), step_of(3, lora)
    made = {}
    for kind, few, many in (("aten", one, three), ("triton", one_started, three_started)):
        made[kind] = {name: (many[name] - few[name]) / 2 for name in many if many[name] != few[name]}
    return made


if __name__ == "__main__":
    triton.runtime.interpreter.GridExecutor.__call__ = _start
    apply_liger_kernel_to_llama()
    print(json.dumps({"full": a_layer(False), "lora": a_layer(True)}))
