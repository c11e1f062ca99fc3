"""Students in other people's formats: which there are, and what a student can go to."""

from pathlib import Path

from transformers import PreTrainedConfig

from llamba.interop.gguf import TYPES, export_gguf, gguf_obstacle
from llamba.interop.remote_code import export_remote_code
from llamba.interop.stock import BAMBA, GRANITE, LAYOUTS, Exported, export_stock, obstacle

FORMATS = (*LAYOUTS, "gguf", "remote-code")


def export(folder: str | Path, out: str | Path, kind: str | None = None, gguf_type: str = "f32") -> Exported:
    """Write a student in a format of FORMATS; by default "gguf" where `out` ends so, else "granite".

    Raises ValueError for an unknown format, a student that the format cannot hold (with the reason), and where `out` is not new.
    """
    kind = kind or ("gguf" if str(out).endswith(".gguf") else "granite")
    if kind not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}; got {kind!r}")
    if kind == "gguf":
        return export_gguf(folder, out, gguf_type)
    return export_remote_code(folder, out) if kind == "remote-code" else export_stock(folder, out, LAYOUTS[kind])


def destinations(config: PreTrainedConfig) -> dict[str, str | None]:
    """For each engine the reason why a student of this configuration cannot go there, None where it can. Needs no weights."""
    granite, heads = obstacle(config, GRANITE), config.num_attention_heads
    narrow = None
    if granite is None and config.to_dict()["mixer"]["head_dim"] * heads != config.hidden_size:
        narrow = f"they take {config.hidden_size} / {heads} for the width of a head"
    if granite is None and "full_attention" not in config.layer_types:
        narrow = "they need a layer with attention"
    return {
        "transformers (GraniteMoeHybrid)": granite,
        "vLLM, SGLang (GraniteMoeHybrid)": granite or narrow,
        "transformers (Bamba)": obstacle(config, BAMBA),
        "llama.cpp (GGUF)": gguf_obstacle(config),
    }


def where_to(config: PreTrainedConfig) -> list[str]:
    """`destinations` as lines of a plan."""
    reasons = destinations(config)
    able = [name for name, reason in reasons.items() if reason is None]
    lines = [f"goes to   {', '.join(able) or 'no stock architecture'}, and with its own code anywhere (llamba export)"]
    return lines + [f"    not to {name}: {reason}" for name, reason in reasons.items() if reason is not None]


__all__ = ["FORMATS", "TYPES", "Exported", "destinations", "export", "where_to"]
