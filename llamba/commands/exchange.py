"""`llamba export` and `llamba import`: students in other people's formats, and theirs as students."""

from llamba.base.arguments import Parser

EXPORT = """formats:
  granite      (default) a GraniteMoeHybrid folder, which transformers 5.23 or later, vLLM and SGLang load without llamba
  bamba        a Bamba folder, for transformers 5.23 or later
  gguf         (default where OUT ends in .gguf) a file for llama.cpp, Ollama and LM Studio, checked in llama.cpp before it is done
  remote-code  the student with its code beside the weights and a model card; loads with trust_remote_code=True
A student that a format cannot hold is refused with the reason."""
IMPORT = """formats, told by their files: MambaInLlama and M1 (mamba_config.json; Mamba-1 and Mamba-2), Phi-Mamba and Hybrid-Phi-Mamba,
Cartesia's Llamba-1B, 3B and 8B. Zebra-Llama and Apriel-H1 are refused with the reason."""


def export(argv: list[str]) -> None:
    """write a student as a stock architecture, a GGUF file, or with its code"""
    parser = Parser("llamba export", "Write a student in a format that loads without llamba.", EXPORT)
    parser.add_argument("model", help="run folder or model folder")
    parser.add_argument("out", help="new folder, or new file that ends in .gguf")
    parser.add_argument("--format", help="granite, bamba, gguf or remote-code")
    parser.add_argument("--type", default="f32", help="numbers of a GGUF file: f32 (default), f16, bf16 or q8_0")
    args = parser.read(argv)
    from llamba.interop.exporting import export as write

    print(write(args.model, args.out, args.format, args.type))


def import_(argv: list[str]) -> None:
    """make a student of a published hybrid's folder"""
    parser = Parser("llamba import", "Make a student of a published hybrid's folder.", IMPORT)
    parser.add_argument("source", help="the checkpoint's folder")
    parser.add_argument("out", help="new folder for the student")
    parser.add_argument("--base", help="folder of the transformer it was made from, for weights that the checkpoint leaves out")
    args = parser.read(argv)
    from llamba.interop.importing import import_checkpoint

    print(import_checkpoint(args.source, args.out, args.base))
