"""`llamba bench …`: one parser per benchmark; what is measured is in `llamba.bench`."""

from llamba.base.arguments import Parser, device_options, dispatch

WORKS = ("distill", "hidden", "select", "decode")  # of the bench `laptop`


def _parser(name: str, about: str) -> Parser:
    parser = Parser(f"llamba bench {name}", about)
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (default 5)")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    return parser


def _on_device(parser: Parser) -> None:
    device_options(parser, "default: float32 on a CPU where that is what runs there, else bfloat16")
    parser.add_argument("--shrink", type=int, default=1, help="divide widths, layers and tokens by this (to try it out)")


def _mixer(parser: Parser) -> None:
    parser.add_argument("--mixer", default="mamba2", choices=("mamba2", "mamba1"), help="default mamba2")


def cold(argv: list[str]) -> None:
    """a new process that loads a model and answers one token, against a bare transformers script"""
    parser = _parser(
        "cold", "CPU-seconds of a new process that loads a model and answers one token: command, API, bare transformers script."
    )
    parser.add_argument("--model", required=True, help="run folder, model folder or GGUF file")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.read(argv)
    from llamba.bench.cold import main

    main(args)


def decode(argv: list[str]) -> None:
    """decoding in CUDA graphs against Hugging Face's loop, and against the memory's bandwidth"""
    parser = _parser("decode", "Decoding in CUDA graphs at the shapes of Llama-3-8B, batch 1: against Hugging Face's generate.")
    _on_device(parser)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default 128)")
    args = parser.read(argv)
    from llamba.bench.decode import main

    main(args)


def gpu(argv: list[str]) -> None:
    """everything that only a GPU can say, part by part, in a few minutes"""
    parser = _parser("gpu", "What only a GPU can say of this project, in the order of its value; goes on where it was stopped.")
    parser.add_argument("--dry", action="store_true", help="pass through every part on the CPU, with shrunken shapes")
    parser.add_argument("--minutes", type=float, default=6.0, help="at most, in all (default 6)")
    parser.add_argument("--pack", nargs="+", help="folders with what recipes/real/carry.py packed: distil that teacher, and nothing else")
    args = parser.read(argv)
    from llamba.bench.gpu import main

    main(args)


def llama_cpp(argv: list[str]) -> None:
    """GGUF files in llama.cpp behind texts of several lengths"""
    parser = _parser("llama-cpp", "How fast llama.cpp runs GGUF files behind texts of several lengths.")
    parser.add_argument("files", nargs="+", help="GGUF files, measured in turns")
    parser.add_argument("--contexts", default="512,4096,8000", help="tokens of the text, with commas (default 512,4096,8192)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    args = parser.read(argv)
    from llamba.bench.llama_cpp import main

    main(args)


def laptop(argv: list[str]) -> None:
    """what converting a small model costs on a CPU, against another checkout of this project"""
    parser = _parser("laptop", "Training steps, selection and decoding of a small model on a CPU, each in a process of its own.")
    parser.add_argument("--model", required=True, help="run folder, model folder or GGUF file of the teacher")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or hub sets with chats")
    parser.add_argument("--template", help="chat template that marks the assistant's words, e.g. llama3")
    parser.add_argument("--student", help="model folder of a converted student (default: half Mamba-2, made here)")
    parser.add_argument("--against", help="folder of another checkout, measured in turn")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--steps", type=int, default=5, help="training steps measured (default 5)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences that layers are ranked on (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    args = parser.read(argv)
    from llamba.bench.laptop import main

    main(args)


def losses(argv: list[str]) -> None:
    """distillation's loss in chunks against whole logits"""
    args = _parser("losses", "Distillation's loss in chunks against whole logits: time and memory, on a CPU.").read(argv)
    from llamba.bench.losses import main

    main(args)


def matrices(argv: list[str]) -> None:
    """how closely structured matrices come to a teacher's attention (MOHAWK, Table 3)"""
    parser = _parser("matrices", "How closely structured matrices come to a teacher's attention (MOHAWK, Table 3).")
    parser.add_argument("--model", help="run folder, model folder or hub name")
    parser.add_argument("--data", nargs="+", help="files, folders or hub sets with texts or messages")
    parser.add_argument("--matrices", type=int, default=32, help="how many, one head of every layer in turn (default 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--steps", type=int, default=2000, help="of gradient descent, for low-rank and SSD (default 2000)")
    parser.add_argument("--picture", help="draw the table to this file")
    args = parser.read(argv)
    from llamba.bench.matrices import main

    main(args)


def mfu(argv: list[str]) -> None:
    """a distillation step of an 8B-shaped student, as a part of the device's arithmetic"""
    parser = _parser("mfu", "A distillation step of an 8B-shaped student: operations per second as a part of the measured matrix product.")
    _on_device(parser)
    args = parser.read(argv)
    from llamba.bench.mfu import main

    main(args)


def multistep(argv: list[str]) -> None:
    """several tokens a launch against one (Mamba-in-Llama, Figure 3)"""
    parser = _parser("multistep", "Several tokens a launch against one token a launch (Mamba-in-Llama, Figure 3).")
    _on_device(parser)
    _mixer(parser)
    parser.add_argument("--picture", help="draw the table to this file")
    args = parser.read(argv)
    from llamba.bench.multistep import main

    main(args)


def ops(argv: list[str]) -> None:
    """whole mixers against those of transformers"""
    parser = _parser("ops", "Whole mixers against those of transformers, which run in mamba-ssm where it is installed.")
    _on_device(parser)
    parser.add_argument("--compile", action="store_true", help="also time ours under torch.compile")
    kinds = ("mamba2", "mamba1", "gated_delta", "kda")
    parser.add_argument("--mixers", nargs="+", default=list(kinds), choices=kinds, help="default: all")
    parser.add_argument("--fla", action="store_true", help="the gated delta rule's training step beside flash-linear-attention's, alone")
    parser.add_argument("--own", action="store_true", help="our other mixers, and the default one, beside our Mamba-2, alone")
    args = parser.read(argv)
    from llamba.bench.ops import main

    main(args)


def speculative(argv: list[str]) -> None:
    """speculative against plain decoding with the same code"""
    parser = _parser("speculative", "Speculative against plain decoding with the same code, of --model with --draft, or of a --preset.")
    _on_device(parser)
    parser.add_argument("--model", help="run folder, model folder or hub name")
    parser.add_argument("--draft", help='with --model and --prompts: a smaller model of the same vocabulary, or "lookup"')
    parser.add_argument("--prompts", help="a .jsonl file of rows with messages, which end with the user's question")
    parser.add_argument("--preset", help="instead of a model: table1, table5, or a row of them; random weights of its shapes")
    parser.add_argument("--acceptance", type=float, help="of a preset's drafts (default: what its published row implies)")
    parser.add_argument("--lookahead", default="1,2,3,4,5,6,7,8", help="drafted tokens or trees (3x2x1), with commas (default 1 to 8)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per prompt (default 128)")
    args = parser.read(argv)
    from llamba.bench.speculative import main

    main(args)


def smoke(argv: list[str]) -> None:
    """does it run: every Triton kernel against PyTorch, and one captured graph"""
    parser = _parser("smoke", "Every Triton kernel, forward and backward, against PyTorch in fp64, and one captured graph.")
    _on_device(parser)
    args = parser.read(argv)
    from llamba.bench.smoke import main

    main(args)


def teacher(argv: list[str]) -> None:
    """a chat model distilled for so many minutes, and its distance to the teacher on the way"""
    parser = _parser("teacher", "Distil SmolLM2-135M-Instruct, as recipes/real/carry.py packed it, or random weights of its shape.")
    _on_device(parser)
    parser.add_argument("--pack", nargs="+", default=[], help="folders with the pieces of a pack (default: random weights and tokens)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole command (default 5)")
    args = parser.read(argv)
    from llamba.bench.teacher import main

    main(args)


def train(argv: list[str]) -> None:
    """a training step of a mixer's recurrence: Triton against PyTorch and other packages"""
    parser = _parser("train", "A training step of a mixer's recurrence: Triton against PyTorch, mamba-ssm and flash-linear-attention.")
    _on_device(parser)
    _mixer(parser)
    args = parser.read(argv)
    from llamba.bench.train import main

    main(args)


BENCHES = {
    "cold": cold, "decode": decode, "gpu": gpu, "laptop": laptop, "llama-cpp": llama_cpp, "losses": losses, "matrices": matrices,
    "mfu": mfu, "multistep": multistep, "ops": ops, "smoke": smoke, "speculative": speculative, "teacher": teacher, "train": train,
}  # fmt: skip


def bench(argv: list[str]) -> None:
    """benchmarks against peers, in one process"""
    dispatch("llamba bench", "Benchmarks, each against a peer on the same work in the same process.", BENCHES, argv)
