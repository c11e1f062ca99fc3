"""Make the embedded teacher: an ordinary Llama checkpoint folder, trained from nothing on the chat language.

    python recipes/tiny/make_teacher.py [--out recipes/tiny/teacher] [--seed 0] [--from-phase 0]

After each phase the folder is written, so that `--from-phase N` goes on from the N phases that it holds.

Writes config, tokenizer (with its chat template), bf16 safetensors and `made_by.json` with the command and the scores.
"""

import argparse
import copy
import json
import random
from pathlib import Path

import torch
from demo import score
from language import conversation, drill
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

CONTEXT = 1024
# Conversation length in tokens, conversations per optimizer step, steps, schedule. Short conversations first: in a long one every word
# recurs many times, and the attention patterns that copying and recall need do not form.
PHASES = (
    (128, 16, 3000, "constant_with_warmup", 0.0),
    (128, 32, 700, "constant_with_warmup", 0.7),
    (512, 8, 400, "constant_with_warmup", 0.1),
    (CONTEXT, 4, 700, "cosine", 0.0),
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 1,536 entries, each digit its own token."""
    rng = random.Random(seed)
    texts = [message["content"] for _ in range(2000) for message in conversation(rng)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1536, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>", model_max_length=CONTEXT,
        additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
            initializer_range=0.05, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class Conversations(torch.utils.data.Dataset):
    """Row i is one conversation made from (seed, i), cut at `length` tokens; only the assistant's tokens are targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int, drills: float):
        self.tokenizer, self.seed, self.rows, self.length, self.drills = tokenizer, seed, rows, length, drills

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = random.Random(f"{self.seed}/{index}")
        messages = drill(rng, self.length) if rng.random() < self.drills else conversation(rng, self.length)
        made = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor(made["input_ids"][: self.length])
        mask = torch.tensor(made["assistant_masks"][: self.length])
        return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: LlamaForCausalLM, rows: Conversations, batch: int, schedule: str, seed: int, out: Path) -> None:
    """One phase: next-token loss on the assistant's tokens."""
    arguments = TrainingArguments(
        output_dir=str(out / "training"), max_steps=rows.rows // batch, per_device_train_batch_size=batch, learning_rate=2e-3,
        lr_scheduler_type=schedule, warmup_steps=50, weight_decay=0.05, max_grad_norm=1.0, adam_beta2=0.98, bf16=True,
        use_cpu=not torch.cuda.is_available(), logging_steps=50, save_strategy="no", report_to="none", seed=seed,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()


def main() -> None:
    """Train phase after phase, and write folder and scores after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from-phase", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.out) if args.from_phase else make_tokenizer(args.seed)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32) if args.from_phase else make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    for phase, (length, batch, steps, schedule, drills) in enumerate(PHASES):
        if phase < args.from_phase:
            continue
        rows = Conversations(tokenizer, args.seed + phase, steps * batch, length, drills)
        train(model.train(), rows, batch, schedule, args.seed, args.out)
        scores = score(model.eval(), tokenizer)
        print(json.dumps(scores), flush=True)
        save(model, tokenizer, args.out, args.seed, scores)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, seed: int, scores: dict[str, float]) -> None:
    """bf16 weights, tokenizer, and a note of the command and the scores."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(out)
    note = {"command": f"python recipes/tiny/make_teacher.py --seed {seed}", "held_out_exact": scores}
    (out / "made_by.json").write_text(json.dumps(note, indent=2) + "\n")


if __name__ == "__main__":
    main()
