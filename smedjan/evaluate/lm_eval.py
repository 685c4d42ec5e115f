"""A model here, as lm-evaluation-harness asks for one: `pip install 'smedjan[lm-eval]'`.

    import lm_eval
    from smedjan.evaluate.lm_eval import SmedjanLM
    lm_eval.simple_evaluate(SmedjanLM("run"), tasks=["arc_easy"])

Tokens, truncation and stop strings are those of its own `HFLM`, so that scores may be compared: a context is cut on the
left where it does not fit, and text is scored in windows of the whole context, each token once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smedjan.errors import ConfigError
from smedjan.evaluate.score import BATCH, score_pairs
from smedjan.generate.batch import generate_many
from smedjan.generate.sampling import Sampling
from smedjan.generate.text import TextStream
from smedjan.hf.load import open_model, open_session, resolve
from smedjan.hf.tokenizer import load_tokenizer
from smedjan.runtime.select import backend as select_backend

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    raise ConfigError(
        f"lm-evaluation-harness is not whole here: {error}", remedy="pip install 'smedjan[lm-eval]'"
    ) from error

KNOBS = {"top_k", "top_p", "min_p", "repetition_penalty"}
"""Of a task's generation arguments those that Sampling has too, under the same names."""


@register_model("smedjan")
class SmedjanLM(TemplateLM):
    """`path`, `adapter`, `backend`, `dtype` as in `smedjan.load`; `max_length` (default: the context) and
    `max_gen_toks` (default of tasks that say nothing) as in HFLM. `seed` is of tasks that sample: request i draws
    with seed + i."""

    def __init__(
        self,
        path: str | Path,
        *,
        adapter: str | Path | None = None,
        backend: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = BATCH,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        base, laid = resolve(path, adapter)
        files = open_model(base, laid)
        self.path = files.path
        # Not `tokenizer`: the harness takes that for one of transformers'
        self.text = load_tokenizer(files.tokenizer_path)
        self.session = open_session(files, select_backend(backend), dtype=dtype, adapter=laid)
        context = self.session.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= context:
            raise ConfigError(f"is {max_length}, the context {context}", field="max_length", remedy="give no more")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"is {batch_size!r}", field="batch_size", remedy="give a number of 1 or more")
        self.max_length = max_length or context
        self.max_gen_toks, self.batch_size, self.seed = max_gen_toks, int(batch_size), seed

    @property
    def eot_token_id(self) -> int:
        if self.text.eos_token_id is None:
            raise ConfigError("has no EOS token", file=self.path, field="eos_token", remedy="name one")
        return self.text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing else does."""
        return self.eot_token_id if self.text.bos_token_id is None else self.text.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template is False or chat_template is None:
            return None
        return self.text.template_for(name=None if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text, _ = self.text.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With the tokenizer's specials, unless told otherwise or the text begins with the prefix already."""
        if add_special_tokens is None:
            prefix = self.text.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self.text.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a request of {len(context)} and {len(continuation)} tokens",
                    field="max_length",
                    remedy=f"give a context, and a continuation of 1 to {self.max_length} tokens",
                )
            # The last token is predicted and never read: one more than the context holds may be there.
            kept = max(1, self.max_length + 1 - len(continuation))
            pairs.append((context[-kept:], continuation))
        scores = score_pairs(self.session, pairs, batch_size=self.batch_size)
        found = [(score.logprob, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows.extend(made)
            counts.append(len(made))
        found = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(found)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        eos = self.text.decode([self.eot_token_id], skip_special_tokens=False)
        prompts, most, streams, sampling = [], [], [], []
        for index, (context, given) in enumerate(request.args for request in requests):
            kwargs = normalize_gen_kwargs(given, self.max_gen_toks)
            room = int(kwargs["max_gen_toks"])
            if room >= self.max_length:
                raise ConfigError(f"is {room}, the context {self.max_length}", field="max_gen_toks", remedy="give less")
            prompts.append(self.tok_encode(context)[-(self.max_length - room) :])
            most.append(room)
            streams.append(TextStream(self.text.decode, [stop for stop in [*kwargs["until"], eos] if stop]))
            sampling.append(_sampling(kwargs, self.seed + index))

        stop = {self.eot_token_id, *self.text.eos_token_ids, *self.session.config.eos_token_id}

        def ended(row: int, token: int) -> bool:
            if token not in stop:
                streams[row].push(token)
            return streams[row].stopped

        generate_many(
            self.session,
            prompts,
            max_new_tokens=most,
            stop=stop,
            sampling=sampling,
            batch_size=self.batch_size,
            ended=ended,
        )
        for request, stream in zip(requests, streams, strict=True):
            stream.finish()
            self.cache_hook.add_partial("generate_until", request.args, stream.text)
        return [stream.text for stream in streams]


def _sampling(kwargs: dict[str, Any], seed: int) -> Sampling:
    """Of the harness's arguments, which are transformers'."""
    unknown = kwargs.keys() - KNOBS - {"until", "max_gen_toks", "do_sample", "temperature"}
    if unknown:
        raise ConfigError(
            "is no setting of generation here", field=sorted(unknown)[0], remedy=f"give {', '.join(sorted(KNOBS))}"
        )
    temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
    return Sampling(temperature=temperature, seed=seed, **{name: kwargs[name] for name in KNOBS & kwargs.keys()})
