"""One engine as its own documentation has it used, in its own environment: reads requests, writes greedily, tells the seconds.

Usage: python clients.py KIND FOLDER THREADS TOKENS BATCH: at most so many tokens in a sequence, and sequences at once.
A line `{"prompts": [[ids]], "new": n}` is answered by `{"seconds": s, "tokens": [[ids]]}`, every text of exactly n tokens; by how
many they are in place of the ids where an engine tells no more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
Write = Callable[[Tokens, int], "Tokens | list[int]"]
"""Texts of so many new tokens behind prompts of one length."""


def eager(folder: str, threads: int, tokens: int, batch: int, compiled: bool = False) -> Write:
    """transformers' `generate` in float32."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    kind: Any = getattr(transformers, f"AutoModelFor{_head(folder)}")
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if compiled:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward)
    return _generating(model)


def _head(folder: str) -> str:
    """As the names of transformers' classes end."""
    return "Seq2SeqLM" if _config(folder).get("is_encoder_decoder") else "CausalLM"


def _config(folder: str) -> dict[str, Any]:
    return dict(json.loads((Path(folder) / "config.json").read_text()))


def _generating(model: Any) -> Write:
    """By the `generate` of transformers, which ends at nothing but the length."""
    import torch

    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None

    def write(prompts: Tokens, new: int) -> Tokens:
        ids = torch.tensor(prompts)
        lengths = {"max_new_tokens": new, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **lengths)[:, -new:].tolist()

    return write


def torch_compile(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """The same with torch.compile and a static cache."""
    return eager(folder, threads, tokens, batch, compiled=True)


def genai(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """ONNX Runtime GenAI's generator."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def write(prompts: Tokens, new: int) -> Tokens:
        length = len(prompts[0])
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length + new, min_length=length + new, batch_size=len(prompts))
        generator = og.Generator(model, params)
        generator.append_tokens(prompts)
        for _ in range(new):
            generator.generate_next_token()
        return [generator.get_sequence(index)[length:].tolist() for index in range(len(prompts))]

    return write


def ctranslate2(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """CTranslate2's generator or translator, on the folder that its converter wrote."""
    import ctranslate2 as ct2

    shared = Path(folder) / "shared_vocabulary.json"
    pieces = json.loads((shared if shared.exists() else Path(folder) / "vocabulary.json").read_text())
    ids = {piece: index for index, piece in enumerate(pieces)}
    how = {"device": "cpu", "intra_threads": threads, "inter_threads": 1}
    generator = ct2.Translator(folder, **how) if shared.exists() else ct2.Generator(folder, **how)

    def write(prompts: Tokens, new: int) -> Tokens:
        texts = [[pieces[one] for one in row] for row in prompts]
        if shared.exists():
            told = {"max_decoding_length": new, "min_decoding_length": new, "end_token": [], "beam_size": 1}
            return [[ids[piece] for piece in one.hypotheses[0]] for one in generator.translate_batch(texts, **told)]
        told = {"max_length": new, "min_length": new, "end_token": [], "include_prompt_in_result": False}
        return [[ids[piece] for piece in one.sequences[0]] for one in generator.generate_batch(texts, **told)]

    return write


def llama_cpp(file: str, threads: int, tokens: int, batch: int) -> Write:
    """llama.cpp's own server, in this process, by its binary wheel."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_parallel, params.n_ctx, params.warmup = batch, batch * (-(-tokens // 256) * 256), True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt, params.verbosity = False, -1
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(batch)

    def write(prompts: Tokens, new: int) -> list[int]:
        def one(prompt: list[int]) -> int:
            asked = {"prompt": prompt, "n_predict": new, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
            return int(server.handle_completions(asked)["usage"]["completion_tokens"])

        return list(pool.map(one, prompts))

    return write


def openvino(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """optimum-intel's model, as `optimum-cli export openvino` wrote it."""
    from optimum import intel

    kind = getattr(intel, f"OVModelFor{_head(folder)}")
    return _generating(kind.from_pretrained(folder, ov_config={"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}))


def optimum(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """Optimum's model on ONNX Runtime, as `optimum-cli` wrote it."""
    from onnxruntime import SessionOptions
    from optimum import onnxruntime

    options = SessionOptions()
    options.intra_op_num_threads = threads
    return _generating(getattr(onnxruntime, f"ORTModelFor{_head(folder)}").from_pretrained(folder, session_options=options))


def vllm(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """vLLM's offline engine in bfloat16."""
    from vllm import LLM, SamplingParams

    room = {"max_model_len": tokens, "max_num_seqs": batch, "gpu_memory_utilization": 0.2}  # of a CPU's memory too
    engine = LLM(model=folder, dtype="bfloat16", enable_prefix_caching=False, **room)

    def write(prompts: Tokens, new: int) -> Tokens:
        sampling = SamplingParams(temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True)
        found = engine.generate([{"prompt_token_ids": row} for row in prompts], sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return write


def featherweight(folder: str, threads: int, tokens: int, batch: int) -> Write:
    """A folder that Featherweight serves, by its own worker."""
    from featherweight.runtimes.client import open_worker

    worker = open_worker(Path(folder), threads, tokens, batch)
    return worker.generate


ALL = (eager, torch_compile, genai, ctranslate2, llama_cpp, openvino, optimum, vllm, featherweight)
KINDS = {one.__name__: one for one in ALL}


def main() -> None:
    """Answer on the standard output that was; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kind, folder, *numbers = sys.argv[1:]
    write = KINDS[kind](folder, *map(int, numbers))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = write(asked["prompts"], asked["new"])
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
