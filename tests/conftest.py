"""A small random Llama with a trained tokenizer, chat rows, and a recipe file: what the training tests run on."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton; "auto" still means PyTorch on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamba.data.tokens import StageData, tokenize
from llamba.settings import Data

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = "red green blue cat dog bird tree house runs sleeps sings and or the a big small".split()


def chats(number: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Chat rows of uneven length: one or two turns, answers of 1 to 12 words."""
    rng = random.Random(seed)

    def say(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    def turns() -> list[dict[str, str]]:
        return [{"role": "user", "content": say(6)}, {"role": "assistant", "content": say(12)}]

    return [{"messages": [turn for _ in range(rng.randint(1, 2)) for turn in turns()]} for _ in range(number)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tokenizer(words: list[str] = WORDS, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose post-processor puts a BOS before every text, like Llama 3's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(words)] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """The makers of this file, for tests that want their own."""
    return SimpleNamespace(chats=chats, write_rows=write_rows, tokenizer=make_tokenizer, llama=small_llama)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def small_llama(vocabulary: int, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, initializer_range=0.2, **special, **{**shape, **changes})
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tokenizer) -> Path:
    """A teacher as users have it: a folder with weights, config, tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("teacher")
    small_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public benchmark data, which is not shipped."""
    folder = os.environ.get("LLAMBA_TEST_DATA")
    if not folder:
        pytest.skip("needs public data: set LLAMBA_TEST_DATA to a folder with mt_bench/, alpaca_eval/, lm/")
    return Path(folder)


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "chats.jsonl", chats(64))


@pytest.fixture(scope="session")
def data(tmp_path_factory, chat_file, tokenizer) -> StageData:
    folder = tmp_path_factory.mktemp("data")
    config = Data(train=str(chat_file), length=48)
    tokenize(config, tokenizer, "assistant", folder / "assistant")
    return StageData(config, 0, folder / "assistant")


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, teacher_folder, tokenizer) -> str:
    """The teacher converted, with mixers in layers 0 and 2."""
    from llamba.models.convert import convert

    folder = tmp_path_factory.mktemp("student")
    convert(str(teacher_folder), mixer="mamba2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


RECIPE_FILE = """
from llamba import Data, Distill, Recipe, Student, launch

recipe = Recipe(
    teacher={teacher!r},
    student=Student(mixer="mamba2", attention=0.5),
    data=Data(train={train!r}, length=48),
    stages=[Distill({stage})],
    output="run",
)

if __name__ == "__main__":
    launch(recipe)
"""


@pytest.fixture
def recipe_file(tmp_path, teacher_folder, chat_file) -> Callable[[str], Path]:
    """Writes a recipe file with the given stage arguments."""

    def write(stage: str) -> Path:
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE_FILE.format(teacher=str(teacher_folder), train=str(chat_file), stage=stage))
        return path

    return write
