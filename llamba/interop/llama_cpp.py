"""What llama.cpp (PyPI: xllamacpp) makes of a GGUF file; run as a process of its own, because the engine aborts on files that do not fit.

python -m llamba.interop.llama_cpp < request.json > answer.json
"""

import json
import sys
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations of prompts (token ids), with the log-probabilities of the likeliest tokens at each place.

    `request`: "model", "prompts", "new" tokens of each, "threads", "probabilities" at each place, "exact": keys and values in fp32 and
    plain attention (default), or the engine's own choice.
    Returns "seconds", two for each prompt (for the prompt, for the new tokens), "tokens", one list a prompt, and "logprobs", for each of
    its tokens a map from token id (as text) to log-probability; an empty one for a token that ends within a character, of which the
    engine says none.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = max(map(len, request["prompts"])) + request["new"] + 8
    params.n_parallel = 1
    params.warmup = False
    if request.get("exact", True):
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 10  # the answer holds the tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request.get("threads", 1)
    server, tokens, logprobs, seconds = xllamacpp.Server(params), [], [], []
    for prompt in request["prompts"]:
        wanted = {
            "prompt": prompt, "n_predict": request["new"], "temperature": 0, "n_probs": request["probabilities"], "cache_prompt": False,
            "return_tokens": True, "ignore_eos": True,
        }  # fmt: skip
        found = server.handle_completions(wanted)
        if "timings" not in found:
            raise SystemExit(f"error of llama.cpp: {found.get('error', found)}")
        seconds.append((found["timings"]["prompt_ms"] / 1000, found["timings"]["predicted_ms"] / 1000))
        tokens.append(found["__verbose"]["tokens"])
        places = (found["choices"][0]["logprobs"] or {"content": []})["content"]
        logprobs.append(_aligned(tokens[-1], places))
    return {"tokens": tokens, "logprobs": logprobs, "seconds": seconds}


def _aligned(tokens: list[int], places: list[dict[str, Any]]) -> list[dict[str, float]]:
    found, rest = [], list(places)
    for token in tokens:
        place = rest.pop(0) if rest and rest[0]["id"] == token else {"top_logprobs": []}
        found.append({str(top["id"]): top["logprob"] for top in place["top_logprobs"]})
    return found


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
