"""The paper's own numbers, (forget accuracy, utility): SEUF, ACL 2025 (arXiv 2411.18797), tables 1 to 5.

WMDP as forget set, zero-shot MMLU as utility; Qwen is Qwen1.5-MoE-A2.7B, DeepSeek is DeepSeek-V2-Lite. Single runs.
"""

from __future__ import annotations

Pair = tuple[float | None, float]  # forget accuracy, utility

QWEN: dict[tuple[str, str], Pair] = {  # (method, algorithm), as in our rows
    ("original", ""): (0.4192, 0.5979),
    ("full", "ga"): (0.2953, 0.3393),
    ("full", "gdiff"): (0.2964, 0.2965),
    ("full", "npo"): (0.3447, 0.4612),
    ("full", "rmu"): (0.2612, 0.3560),
    ("seuf_one", "ga"): (0.2987, 0.5012),
    ("seuf_one", "gdiff"): (0.2445, 0.5295),
    ("seuf_one", "npo"): (0.3200, 0.5468),
    ("seuf_one", "rmu"): (0.2536, 0.5351),
    ("lora", "ga"): (0.2459, 0.2689),
    ("esft", "ga"): (0.3145, 0.4514),
    ("random", "rmu"): (0.3505, 0.5947),
    ("routers", "ga"): (0.2526, 0.2977),
    ("experts", "ga"): (0.2536, 0.3242),
}
DEEPSEEK: dict[tuple[str, str], Pair] = {
    ("original", ""): (0.3804, 0.5548),
    ("full", "ga"): (0.2457, 0.3145),
    ("full", "gdiff"): (0.2898, 0.3929),
    ("full", "npo"): (0.3200, 0.4700),
    ("full", "rmu"): (0.2530, 0.4540),
    ("seuf_one", "ga"): (0.2700, 0.5100),
    ("seuf_one", "gdiff"): (0.2677, 0.4895),
    ("seuf_one", "npo"): (0.2898, 0.4790),
    ("seuf_one", "rmu"): (0.2859, 0.5424),
    ("lora", "ga"): (0.2657, 0.2295),
    ("esft", "ga"): (0.2737, 0.5108),
    ("random", "rmu"): (0.2722, 0.5183),
}
# Utility at forget accuracy of about .25 on WMDP; the last three only in a figure of the paper (GA).
TOP_M = "same layer, 1 / 6 experts: .5100 / .4652; different layers, 1 / 3 / 6 experts: .5100 / .2852 / .2567"
ANCHORS = "with the anchor .51, without it about .44; top-2 about .48, a random expert about .42"
# One expert D (3 F) and its router E D; the top expert of every MoE layer.
RATIO = (
    "one expert 0.056 % (DeepSeek-V2-Lite), 0.061 % (Qwen1.5-MoE-A2.7B); top-1 of each layer 1.45 to 1.47 %"
)
