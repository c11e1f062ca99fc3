"""`llamba serve`: an OpenAI server for one model."""

import importlib.util
import os

from llamba.base.arguments import Parser, decoding_options

ABOUT = """Serves /v1/chat/completions and /v1/completions (streaming, stop, seed, logprobs, cancelling), /v1/models and /health, by
transformers' own server with one model. Requests are answered one after the other: a recurrent state is not batched continuously. For
load, write the student for vLLM or llama.cpp (`llamba export --help`)."""
PACKAGES = ("fastapi", "uvicorn", "openai")


def serve(argv: list[str]) -> None:
    """serve a model over OpenAI's protocol"""
    parser = Parser("llamba serve", "Serve a model over OpenAI's protocol.", ABOUT)
    parser.add_argument("model", help="run folder, model folder or hub name")
    parser.add_argument("--draft", help='a smaller model (or the run that made it) drafts, or "lookup"; the output stays the same')
    parser.add_argument("--name", help="what requests call the model (default: as it is given here)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1; elsewhere a key is needed)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--api-key", default=os.environ.get("LLAMBA_API_KEY"), help="key that requests must show (default: LLAMBA_API_KEY)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait or run at a time (default 64)")
    decoding_options(parser)
    args = parser.read(argv)
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}, not installed; pip install 'llamba[serve]'")
    if args.queue < 1:
        raise ValueError(f"--queue must be at least 1; got {args.queue}")
    from llamba.chat.conversation import load, load_draft
    from llamba.chat.serving import check_host
    from llamba.chat.serving import serve as run

    check_host(args.host, args.api_key)
    model, tokenizer = load(args.model, args.dtype, args.device, args.bits)
    draft = None if args.draft is None else load_draft(args.draft, model, args.bits)
    print(f"http://{args.host}:{args.port}/v1", flush=True)
    run(args.name or args.model, model, tokenizer, args.host, args.port, draft, args.api_key, args.queue)
