"""Sets of lm-eval's tasks, named after the papers' tables."""

PUBMEDQA = "pubmedqa_labelled"  # lm-eval's own `pubmedqa` wants a script dataset, which datasets no longer runs
TASK_SETS: dict[str, tuple[str, ...]] = {
    "mamba_in_llama_table3": (
        "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "openbookqa", "truthfulqa", PUBMEDQA, "race",
    ),
    "mamba_in_llama_table4": ("openllm",),
    "mamba_in_llama_table8": ("lambada_openai", "mmlu", "arc_challenge", "truthfulqa_mc2", "hellaswag"),
    "mohawk_table1": ("winogrande", "arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada_openai"),
}  # fmt: skip
ABOUT = {
    "mamba_in_llama_table3": "zero-shot; the paper's numbers are acc_norm for HellaSwag, ARC-C and OpenBookQA, acc for the rest",
    "mamba_in_llama_table4": "lm-eval's `openllm`: ARC 25 shots, HellaSwag 10, TruthfulQA 0, MMLU 5, WinoGrande 5, GSM8K 5",
    "mamba_in_llama_table8": "zero-shot, with LAMBADA's perplexity",
    "mohawk_table1": "zero-shot; the paper's numbers are acc_norm for ARC-C and HellaSwag",
}
