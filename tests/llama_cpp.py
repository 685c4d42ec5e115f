"""A real llama.cpp, for the tests: the prebuilt libraries of an npm package, called through ctypes.

`npm ci --prefix tests` installs them (`make test` does); nothing is compiled, no node runs. The structures below are
those of the pinned release: its defaults are checked when it is loaded.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

_PACKAGES = Path(__file__).parent / "node_modules" / "@node-llama-cpp"
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    **{kind: LlamaFileType[f"MOSTLY_{kind}"] for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q6_K")},
    **{kind: LlamaFileType[f"MOSTLY_{kind}"] for kind in ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")},
}
_GGML_LOG_ERROR = 4


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _QuantizeParams(ctypes.Structure):
    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        ("allow_requantize", c_bool),
        ("quantize_output_tensor", c_bool),
        ("only_copy", c_bool),
        ("pure", c_bool),
        ("keep_split", c_bool),
        ("dry_run", c_bool),
        ("imatrix", c_void_p),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("max_buf_size", c_size_t),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_model_default_params": (_ModelParams, ()),
    "llama_context_default_params": (_ContextParams, ()),
    "llama_model_quantize_default_params": (_QuantizeParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _ModelParams)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_model_quantize": (c_uint32, (c_char_p, c_char_p, POINTER(_QuantizeParams))),
    "llama_init_from_model": (c_void_p, (c_void_p, _ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_init": (_Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (c_int32, (c_void_p, _Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_detokenize": (c_int32, (c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool)),
}

_messages: list[str] = []


@_LogCallback
def _log(level: int, text: bytes, _: object) -> None:
    if level >= _GGML_LOG_ERROR:
        _messages.append(text.decode("utf-8", "replace").rstrip("\n"))


def _refused(what: str) -> RuntimeError:
    found = "".join(_messages) or "no reason given"
    _messages.clear()
    return RuntimeError(f"llama.cpp {what}: {found}")


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """(libggml-base, libllama), with the best of the package's CPU backends loaded."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    folders = sorted(_PACKAGES.glob(f"{sys.platform}-{machine}/bins/*"))
    if not folders:
        raise RuntimeError("the tests need a llama.cpp: npm ci --prefix tests")
    folder = folders[0]
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    base.ggml_quantize_chunk.restype = c_size_t
    base.ggml_quantize_chunk.argtypes = (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
    (ggml_path,), (llama_path,) = folder.glob("libggml.v*.so"), folder.glob("libllama.v*.so")
    ggml = ctypes.CDLL(str(ggml_path), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(llama_path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_log_set(_log, None)
    ggml.ggml_backend_load_all_from_path.argtypes = (c_char_p,)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama.llama_backend_init()
    context = llama.llama_context_default_params()
    quantize = llama.llama_model_quantize_default_params()
    # Another release may have other structures: half-precision caches and 8 GiB buffers are where we look for them.
    assert (context.n_ctx, context.type_k, context.type_v, context.n_samplers) == (512, 1, 1, 0)
    assert (quantize.ftype, quantize.quantize_output_tensor, quantize.max_buf_size) == (7, True, 8 << 30)
    assert llama.llama_model_default_params().use_extra_bufts
    return base, llama


def quantize_chunk(values: np.ndarray, kind: str) -> np.ndarray:
    """ggml's own encoder: float32 [rows, n] -> uint8 [rows, bytes]."""
    quantization = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[quantization]
    source = np.ascontiguousarray(values, np.float32)
    rows, n = source.shape
    out = np.zeros((rows, n // block * size), np.uint8)
    written = _libraries()[0].ggml_quantize_chunk(
        int(quantization), source.ctypes.data, out.ctypes.data, 0, rows, n, None
    )
    assert written == out.nbytes
    return out


def quantize_file(source: Path, out: Path, file_type: str) -> None:
    """What `llama-quantize source out file_type` does."""
    _, llama = _libraries()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(_FILE_TYPES[file_type]), 1
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), byref(parameters)):
        raise _refused(f"cannot quantize {source.name}")


class Model:
    """A GGUF file in llama.cpp, on one CPU thread, attention and its cache in float32."""

    def __init__(self, path: Path, *, context: int = 512, vocab_only: bool = False) -> None:
        _, self._llama = _libraries()
        _messages.clear()
        parameters = self._llama.llama_model_default_params()
        parameters.vocab_only = vocab_only
        # Repacked weights are multiplied in other types.
        parameters.use_extra_bufts = False
        self._context = None
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise _refused(f"cannot load {path.name}")
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self.vocab_size: int = self._llama.llama_vocab_n_tokens(self._vocab)
        if vocab_only:
            return
        settings = self._llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.context = context
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = int(GGMLQuantizationType.F32)
        settings.flash_attn_type = 0
        settings.swa_full = True
        self._context = self._llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise _refused(f"cannot run {path.name}")

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    @property
    def chat_template(self) -> str | None:
        found = self._llama.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode()

    @property
    def stop_tokens(self) -> set[int]:
        """The ids at which llama.cpp ends a generation."""
        return {token for token in range(self.vocab_size) if self._llama.llama_vocab_is_eog(self._vocab, token)}

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        raw = text.encode("utf-8")
        room = len(raw) + 16
        ids = (c_int32 * room)()
        count = self._llama.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
        assert count >= 0, f"{-count} tokens for {len(raw)} bytes"
        return list(ids[:count])

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        tokens = (c_int32 * len(ids))(*ids)
        needed = 64 * len(ids) + 64
        while True:
            room = needed
            text = ctypes.create_string_buffer(room)
            needed = self._llama.llama_detokenize(self._vocab, tokens, len(ids), text, room, False, special)
            if needed >= 0:
                return text.raw[:needed].decode("utf-8", "replace")
            needed = -needed

    def _decode(self, ids: Sequence[int], position: int) -> np.ndarray:
        """The logits after each of `ids`, which begin at `position`: float32 [len(ids), vocab]."""
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position + at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        code = self._llama.llama_decode(self._context, batch)
        self._llama.llama_batch_free(batch)
        if code:
            raise _refused(f"stopped with {code}")
        found = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (len(ids), self.vocab_size)).copy()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [len(ids), vocab], of a fresh sequence."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        return self._decode(ids, 0)

    def continued(self, token: int, position: int) -> np.ndarray:
        """float32 [vocab] after one more token of the sequence."""
        return self._decode([token], position)[-1]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens after `ids`, one at a time through the cache, whatever they are."""
        last = self.logits(ids)[-1]
        out: list[int] = []
        while len(out) < count:
            out.append(int(last.argmax()))
            if len(out) < count:
                last = self._decode(out[-1:], len(ids) + len(out) - 1)[-1]
        return out
