"""Rows of two shapes that are everywhere, as the row types that are trained on. Whoever reads them is told so.

ShareGPT   {"conversations": [{"from": "human", "value": str}, ...], "system": str, "tools": [...] or JSON}

    becomes `messages`; the roles go by the names that LLaMA-Factory, Axolotl and Unsloth know. A `function_call` is the
    JSON of {"name", "arguments"}, the assistant's `tool_calls`. Turns of `role` and `content` stay as they are (TRL).

Alpaca     {"instruction": str, "input": str, "output": str, "system": str, "history": [[question, answer], ...]}

    becomes `messages` where the model has a chat template (the user's: instruction, line break, input, as in
    LLaMA-Factory), since that is how the model is asked later on; `prompt` + `completion` where it has none, in the
    words of Stanford Alpaca up to "### Response:" and a line break, as the `text` of tatsu-lab/alpaca has them. That
    column, where it is there too, is not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from smedjan.data.files import Source

Origin = Literal["ShareGPT", "Alpaca"]

COLUMNS = {"conversations", "instruction", "input", "output", "system", "history"}

_ROLES = {
    **dict.fromkeys(("human", "user", "input"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "output"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
}
_CALL = "function_call"

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Taori et al. 2023, stanford_alpaca/train.py."""

HOW: dict[tuple[Origin, str], str] = {
    ("ShareGPT", "messages"): "ShareGPT rows are read as messages: human is the user, gpt the assistant",
    ("Alpaca", "messages"): "Alpaca rows are read as messages: instruction and input are the user's, output the answer",
    ("Alpaca", "prompt+completion"): "Alpaca rows are read as prompt + completion, with Stanford Alpaca's prompt text",
}
"""The line that says what became of the rows, by where they come from and the type that they are now."""


def origin_of(given: set[str], native: bool) -> Origin | None:
    """What a row with these keys is converted from, if from anything; `native`: it is of a row type as it is."""
    if native and "text" not in given:
        return None
    if "conversations" in given:
        return "ShareGPT"
    return "Alpaca" if given >= {"instruction", "output"} else None


def convert(record: Mapping[str, Any], origin: Origin, source: Source, *, chat: bool) -> dict[str, Any]:
    """The record as one of `messages`, or of `prompt` + `completion`; what it holds is checked there."""
    return _sharegpt(record, source) if origin == "ShareGPT" else _alpaca(record, source, chat)


def _sharegpt(record: Mapping[str, Any], source: Source) -> dict[str, Any]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise source.error("`conversations` is not a list", 'write [{"from": "human", "value": ...}, ...]')
    system = record.get("system")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("from") is None:
            messages.append(turn)
            continue
        where = f"conversations[{index}]"
        if turn.get("value") is None:
            raise source.error(f"`{where}` lacks `value`", "add `value`, or remove the row")
        if turn["from"] == _CALL:
            messages.append({"role": "assistant", "tool_calls": [_call(turn["value"], where, source)]})
            continue
        role = _ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join((*_ROLES, _CALL))
            raise source.error(f"`{where}.from` is {turn['from']!r}, not one of {known}", "name one of them")
        messages.append({"role": role, "content": turn["value"]})
    return {"messages": messages, "tools": record.get("tools") or None}


def _call(value: object, where: str, source: Source) -> dict[str, Any]:
    call = None
    if isinstance(value, str):
        try:
            call = json.loads(value)
        except (ValueError, RecursionError):
            call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise source.error(f"`{where}.value` is no function call", 'write it as the JSON of {"name", "arguments"}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _alpaca(record: Mapping[str, Any], source: Source, chat: bool) -> dict[str, Any]:
    instruction, output = record["instruction"], record["output"]
    given, system, history = record.get("input") or "", record.get("system") or "", record.get("history") or []
    for name, value in (("instruction", instruction), ("input", given), ("output", output), ("system", system)):
        if not isinstance(value, str):
            raise source.error(f"`{name}` is not a string", f"write `{name}` as a string")
        if not value and name in ("instruction", "output"):
            raise source.error(f"`{name}` is empty", f"fill `{name}`, or remove the row")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise source.error("`history` is not a list of [question, answer]", "write it so, or remove it")
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = "\n".join((instruction, given)) if given else instruction
        return {"messages": [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]}
    if system or history:
        raise source.error(
            f"has a `{'system' if system else 'history'}`, and the model has no chat template to put it into",
            "use an instruct model, or give rows of `prompt` + `completion`",
        )
    words = _WITH_INPUT if given else _WITHOUT_INPUT
    return {"prompt": words.format(instruction=instruction, input=given), "completion": output}
